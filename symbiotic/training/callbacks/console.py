"""What a person sees: a progress bar on a terminal, plain lines elsewhere. Rank 0 only."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from symbiotic.model.routing_metrics import ALL_TYPES
from symbiotic.training.callbacks.base import Callback, Event

if TYPE_CHECKING:
    from symbiotic.training.step import StepResult
    from symbiotic.training.trainer import Trainer


class Console(Callback):
    """Shows progress, stage, loss by class, tokens/s and time left.

    Args:
        enabled: whether this rank prints.
        terminal: draw a progress bar; None asks whether standard output is a terminal.
    """

    def __init__(self, *, enabled: bool, terminal: bool | None = None) -> None:
        self._enabled = enabled
        self._terminal = sys.stdout.isatty() if terminal is None else terminal
        self._bar: Any = None
        self._task: Any = None

    def on_start(self, trainer: Trainer) -> None:
        """Draw the bar."""
        if not (self._enabled and self._terminal):
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.fields[stage]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self._bar = Progress(*columns)
        self._task = self._bar.add_task(
            "", total=trainer.last_step, completed=trainer.state.step, stage=trainer.stages.at(trainer.state.step).name
        )
        self._bar.start()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Advance the bar."""
        if self._bar is not None:
            stage = trainer.stages.at(trainer.state.step - 1).name
            self._bar.update(self._task, completed=trainer.state.step, stage=stage)

    def on_event(self, trainer: Trainer, event: Event) -> None:
        """Print a line, or put a step's numbers beside the bar."""
        if not self._enabled:
            return
        line = describe(event)
        if self._bar is None:
            remaining = _time_left(trainer, event)
            print(line if remaining is None else f"{line} | {remaining} left", flush=True)
        elif event["event"] == "step":
            # Short: the bar shares the terminal's width with it.
            losses = " ".join(f"{name} {value:.2f}" for name, value in event["loss"].items())
            self._bar.update(self._task, description=f"{losses} {event['tokens_per_second']:,.0f} tokens/s")
        else:
            self._bar.console.print(line, highlight=False, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def describe(event: Event) -> str:
    """One line for one event."""
    kind, step = event["event"], event["step"]
    if kind == "step":
        return f"step {step} [{event['stage']}] {_numbers(event)}"
    if kind == "evaluation":
        sources = (f"{source}: {_losses(losses)}" for source, losses in event["loss"].items())
        return f"step {step} held out: {'; '.join(sources)}"
    if kind == "stage":
        shield = ", ".join(f"{kind} {factor}" for kind, factor in event.get("shield", {}).items())
        return f"step {step} stage {event['stage']!r} begins" + (f" (shield: {shield})" if shield else "")
    if kind == "checkpoint":
        blocked = event.get("blocked_seconds", event["seconds"])
        in_background = f", {blocked:.1f} s of them waited for" if blocked < event["seconds"] else ""
        return f"step {step} saved to {event['path']} ({event['seconds']:.1f} s{in_background})"
    if kind == "fallback":
        return f"step {step} goes on from here, since {event['problem']}"
    if kind == "accepted_change":
        return f"step {step} goes on with a change of {event['what']}: {event['difference']}"
    if kind == "non_finite":
        return f"step {step} {_non_finite(event)}"
    if kind == "skipped_steps":
        return f"step {step} reached without training from step {event['from']} on (training.skip_steps)"
    if kind in _MEASUREMENTS:
        return f"step {step} {_MEASUREMENTS[kind](event)}"
    rest = ", ".join(f"{key}: {value}" for key, value in event.items() if key not in ("event", "step"))
    return f"step {step} {kind}" + (f" ({rest})" if rest else "")


def _losses(losses: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.4f}" for name, value in losses.items()) or "no labels"


def _numbers(event: Event) -> str:
    parts = [f"loss {_losses(event['loss'])}"]
    if event["balance"]:
        by_group = (f"{name.split('.', 1)[-1]} {value:.3f}" for name, value in event["balance"].items())
        parts.append("balance " + " ".join(by_group))
    parts.append(f"grad norm {event['grad_norm']:.3f}")
    parts.append(f"{event['tokens_per_second']:,.0f} tokens/s")
    mfu = f" ({100 * event['mfu']:.1f} % of peak)" if event["mfu"] is not None else ""
    parts.append(f"{event['tflops']:.3g} TFLOP/s a device{mfu}")
    return " | ".join(parts)


_QUANTITIES = {"loss": "loss", "grad_norm": "gradient norm"}

_DOCUMENTS_SHOWN = 5


def _non_finite(event: Event) -> str:
    """What isn't finite, where it begins, and the documents that were read."""
    what = " and ".join(_QUANTITIES[name] for name in event["what"])
    ranks = ", ".join(map(str, event["ranks"])) or "unknown"
    if event["layer"] is None:
        place = "running it again gave finite values only"
    else:
        kind = "output" if event["direction"] == "forward" else "gradient"
        place = f"first the {kind} of {event['layer']} ({event['module']})"
    documents = [
        f"{document['source']} {document['id']} ({document['source_file']} line {document['line']})"
        if "id" in document
        else f"{document['source']} document {document['document']} of {document['shard']}"
        for document in event["documents"][:_DOCUMENTS_SHOWN]
    ]
    more = event["num_documents"] - len(documents)
    listed = ", ".join(documents) + (f" and {more} more (log.jsonl)" if more else "")
    row = f", {event['in_a_row']} in a row" if event["in_a_row"] > 1 else ""
    return f"not applied{row}: {what} not finite; {place}, rank {ranks}; documents: {listed}"


def _routing(event: Event) -> str:
    rates = " ".join(f"{kind} {_mean(values['capacity_rate'])}" for kind, values in event["types"].items())
    dead = sum(event["types"].get(ALL_TYPES, {}).get("dead_experts", ()))
    return f"routing: capacity rate {rates or 'no tokens'} | dead experts {dead}"


def _drift(event: Event) -> str:
    return "drift: KL " + " ".join(f"{kind} {_mean(values)}" for kind, values in event["kl"].items())


def _gradients(event: Event) -> str:
    cosines = event["by_class"]["cosine"].items()
    return "gradients into shared experts: cosine " + " ".join(f"{pair} {_mean(values)}" for pair, values in cosines)


def _probe(event: Event) -> str:
    experts = (
        f"{name} ({'; '.join(f'{source}: {_losses(losses)}' for source, losses in sources.items())})"
        for name, sources in event["loss"].items()
    )
    return "probe: " + " ".join(experts)


_MEASUREMENTS = {"routing": _routing, "drift": _drift, "gradients": _gradients, "probe": _probe}


def _mean(values: Sequence[float | None]) -> str:
    """Mean over the MoE blocks that have a value."""
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.4g}" if known else "-"


def _time_left(trainer: Trainer, event: Event) -> str | None:
    if event["event"] != "step":
        return None
    minutes, seconds = divmod(round((trainer.last_step - event["step"]) * event["seconds"]), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
