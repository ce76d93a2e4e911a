"""Pictures of one training run's routing metrics, diagnostics and rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from symbiotic.analysis.figures import CLASS_COLOURS, OTHER_COLOUR, Picture, as_svg, mark_stages, new_figure
from symbiotic.analysis.run_log import Curve
from symbiotic.analysis.runs import Event, numbers
from symbiotic.model.partition import ExpertPartition

GROUP_COLOURS = ("#1f5fa8", "#d2552d", "#2e8b57", "#8a4fa3", "#a8861f", "#3a9ca8")
"""Colours of the expert groups, in their order; repeated where there are more."""

FAINTEST = 0.07
"""Tint of an expert that nobody chose, so that its group still shows."""

METRICS = {"entropy": "entropy (nats)", "dead_experts": "dead experts", "capacity_rate": "capacity rate"}
"""Routing metrics by block, and what the picture calls them."""

SERIES_COLOURS = CLASS_COLOURS | {"other": OTHER_COLOUR}
"""Colours of gradients: of loss classes, and of generation tokens' rows and all others."""

MODE_STYLES = {"whole": "-", "shared_only": "--", "no_shared": ":"}
"""Lines of the probes: the model as it is, with shared experts only, without shared experts."""

Stages = Sequence[tuple[int, str]]


def _group_colours(groups: Sequence[str]) -> dict[str, str]:
    return {group: GROUP_COLOURS[index % len(GROUP_COLOURS)] for index, group in enumerate(groups)}


def load_picture(load: np.ndarray, groups: np.ndarray, colours: Sequence[str], *, largest: float) -> np.ndarray:
    """Loads as colours: an expert's hue is its group's, the more load the stronger.

    Args:
        load: [blocks, experts], NaN where nothing was measured.
        groups: int [blocks, experts], index into ``colours``.
        colours: of the groups.
        largest: the load that has the full colour.

    Returns:
        float [blocks, experts, 3] in 0..1.
    """
    hues = np.array([to_rgb(colour) for colour in colours])[groups]
    strength = FAINTEST + (1.0 - FAINTEST) * np.clip(np.nan_to_num(load) / largest, 0.0, 1.0)
    return 1.0 - strength[..., None] * (1.0 - hues)


def _shares(load: Any) -> np.ndarray:
    """Share of a type's choices that each expert got, by block: [blocks, experts], 0 without a token."""
    values = np.nan_to_num(numbers(load))
    totals = values.sum(axis=1, keepdims=True)
    return np.divide(values, totals, out=np.zeros_like(values), where=totals > 0)


def load_maps(routing: Mapping[int, Event], partition: ExpertPartition | None) -> Picture:
    """Expert load by block and expert, a column a token type, at the first and the last logged step.

    Each token type has a scale of its own, since a small group's experts get larger shares.

    Args:
        routing: step -> ``routing`` event.
        partition: gives every expert the colour of its group; without one all have the same.
    """
    steps = sorted({min(routing), max(routing)})
    events = [routing[step] for step in steps]
    types = list(events[-1]["types"])
    names = partition.groups if partition is not None else ("all",)
    colours = _group_colours(names)
    loads = {
        name: [_shares(event["types"][name]["load"]) if name in event["types"] else None for event in events]
        for name in types
    }
    num_blocks, num_experts = loads[types[0]][-1].shape
    groups = np.zeros((num_blocks, num_experts), dtype=int)
    if partition is not None:
        groups = np.stack([partition.row(block) for block in events[-1]["blocks"]])
    height = len(steps) * (0.7 + min(4.0, max(0.9, 0.18 * num_blocks))) + 0.5
    figure = new_figure(max(3.2, min(5.0, 0.08 * num_experts + 1.4)) * len(types), height)
    panels = figure.subplots(len(steps), len(types), squeeze=False)
    for column, name in enumerate(types):
        largest = max(float(load.max()) for load in loads[name] if load is not None) or 1.0
        for axes, step, event, load in zip(panels[:, column], steps, events, loads[name], strict=True):
            axes.set_title(f"{name}, step {step}", fontsize=9)
            _label_blocks(axes, event["blocks"])
            axes.set_xlabel("expert", fontsize=8)
            axes.tick_params(labelsize=7)
            if load is not None:
                picture = load_picture(load, groups, list(colours.values()), largest=largest)
                axes.imshow(picture, aspect="auto", interpolation="nearest")
    patches = [Patch(color=colour, label=f"group {name}") for name, colour in colours.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8)
    return as_svg(figure, alternative=f"Expert load by block and expert of the token types {', '.join(types)}")


def _label_blocks(axes: Axes, blocks: Sequence[int]) -> None:
    shown = np.unique(np.linspace(0, len(blocks) - 1, min(8, len(blocks))).round().astype(int))
    axes.set_yticks(shown, [str(blocks[index]) for index in shown], fontsize=7)
    axes.set_ylabel("block", fontsize=8)


def step_edges(steps: Sequence[int]) -> np.ndarray:
    """Borders between the columns of a map: halfway between steps."""
    values = np.array(steps, dtype=np.float64)
    if len(values) == 1:
        return values[0] + np.array([-0.5, 0.5])
    middles = (values[1:] + values[:-1]) / 2
    return np.concatenate([[2 * values[0] - middles[0]], middles, [2 * values[-1] - middles[-1]]])


def routing_maps(routing: Mapping[int, Event], stages: Stages) -> Picture:
    """Entropy, dead experts and capacity rate: a row each, a column a token type, steps to the right, blocks down."""
    steps, blocks = sorted(routing), routing[max(routing)]["blocks"]
    types = list(routing[steps[-1]]["types"])
    figure = new_figure(3.2 * len(types) + 0.8, len(METRICS) * (0.8 + min(3.0, max(0.8, 0.15 * len(blocks)))))
    panels = figure.subplots(len(METRICS), len(types), squeeze=False, sharex=True)
    for row, (metric, title) in zip(panels, METRICS.items(), strict=True):
        maps = [_by_block(routing, steps, name, metric, num_blocks=len(blocks)) for name in types]
        norm = _norm_of(metric, maps)
        for axes, name, values in zip(row, types, maps, strict=True):
            mesh = axes.pcolormesh(
                step_edges(steps), np.arange(len(blocks) + 1) - 0.5, values, norm=norm, rasterized=True
            )
            axes.invert_yaxis()
            _label_blocks(axes, blocks)
            axes.set_title(f"{title}, {name}", fontsize=9)
            axes.tick_params(labelsize=7)
            mark_stages(axes, [(step, "") for step, _ in stages if step >= steps[0]])
        figure.colorbar(mesh, ax=list(row), fraction=0.04).ax.tick_params(labelsize=7)
    for axes in panels[-1]:
        axes.set_xlabel("step", fontsize=8)
    return as_svg(figure, alternative=f"{', '.join(METRICS.values())} by step and block of {', '.join(types)}")


def _by_block(
    routing: Mapping[int, Event], steps: Sequence[int], token_type: str, metric: str, *, num_blocks: int
) -> np.ndarray:
    """One metric of one type: [blocks, steps], NaN where a step doesn't have it."""
    missing = {metric: [None] * num_blocks}
    return numbers([routing[step]["types"].get(token_type, missing)[metric] for step in steps]).T


def _norm_of(metric: str, maps: Sequence[np.ndarray]) -> Normalize:
    """One scale for all maps of a metric: up to 1 for the capacity rate, from 0 for the others."""
    present = np.concatenate([values[~np.isnan(values)] for values in maps])
    if metric == "capacity_rate":
        return Normalize(min(0.5, float(present.min(initial=1.0))), 1.0)
    return Normalize(0.0, max(1e-9, float(present.max(initial=0.0))))


def _finish(axes: Axes, *, title: str, stages: Stages, label: str) -> None:
    mark_stages(axes, stages)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(label, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def drift_curves(drift: Mapping[int, Event], stages: Stages) -> Picture:
    """KL from the reference routing to today's, a panel a token type, a line a block; the bold line is the mean."""
    steps = sorted(drift)
    event = drift[steps[-1]]
    figure = new_figure(5.0 * len(event["kl"]) + 0.6, 3.4)
    panels = figure.subplots(1, len(event["kl"]), squeeze=False)[0]
    colours = ScalarMappable(Normalize(min(event["blocks"]), max(event["blocks"])), matplotlib.colormaps["viridis"])
    for axes, name in zip(panels, event["kl"], strict=True):
        values = numbers([drift[step]["kl"].get(name, [None] * len(event["blocks"])) for step in steps])
        for block, line in zip(event["blocks"], values.T, strict=True):
            axes.plot(steps, line, color=colours.to_rgba(block), linewidth=0.9, marker=".", markersize=3)
        axes.plot(steps, _mean_over_blocks(values), color="black", linewidth=1.8, label="mean over blocks")
        axes.set_ylim(bottom=0.0)
        _finish(axes, title=f"routing of {name} tokens", stages=stages, label="KL (nats)")
    bar = figure.colorbar(colours, ax=list(panels), label="block", fraction=0.04)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar.ax.tick_params(labelsize=7)
    return as_svg(figure, alternative=f"Routing drift by block of {', '.join(event['kl'])}")


def _mean_over_blocks(values: np.ndarray) -> np.ndarray:
    """[steps, blocks] -> [steps]; NaN where no block has a number."""
    count = (~np.isnan(values)).sum(axis=1)
    return np.divide(np.nansum(values, axis=1), count, out=np.full(len(values), np.nan), where=count > 0)


def gradient_curves(gradients: Mapping[int, Event], stages: Stages) -> Picture:
    """Gradients into the shared experts, by loss class above and by rows below: norms left, cosines right.

    Lines are means over the blocks, bands go from the smallest to the largest block. A norm of 0, such as that of
    fully shielded rows, has no logarithm: the line has a gap.
    """
    figure = new_figure(10.5, 6.2)
    panels = figure.subplots(2, 2)
    for row, (by, title) in zip(panels, (("by_class", "by loss class"), ("by_row", "by rows")), strict=True):
        norms = _series(gradients, by, "norm")
        _draw_bands(row[0], {name: (steps, np.where(v > 0, v, np.nan)) for name, (steps, v) in norms.items()})
        row[0].set_yscale("log")
        _finish(row[0], title=f"gradient norm {title}", stages=stages, label="norm")
        _draw_bands(row[1], _series(gradients, by, "cosine"))
        row[1].axhline(0.0, color="#444444", linewidth=0.8)
        row[1].set_ylim(-1.05, 1.05)
        _finish(row[1], title=f"cosine {title}", stages=stages, label="cosine")
    return as_svg(figure, alternative="Norms and cosines of the gradients into the shared experts")


def _series(gradients: Mapping[int, Event], by: str, kind: str) -> dict[str, tuple[list[int], np.ndarray]]:
    """Name -> (steps, values [steps, blocks])."""
    names = dict.fromkeys(name for event in gradients.values() for name in event.get(by, {}).get(kind, {}))
    series = {}
    for name in names:
        steps = [step for step in sorted(gradients) if name in gradients[step].get(by, {}).get(kind, {})]
        series[name] = (steps, numbers([gradients[step][by][kind][name] for step in steps]))
    return series


def _draw_bands(axes: Axes, series: Mapping[str, tuple[list[int], np.ndarray]]) -> None:
    for index, (name, (steps, values)) in enumerate(series.items()):
        colour = SERIES_COLOURS.get(name, f"C{index}")
        middle = _mean_over_blocks(values)
        present = ~np.isnan(middle)
        if not present.any():
            continue
        shown, values = np.array(steps)[present], values[present]
        axes.plot(shown, middle[present], color=colour, linewidth=1.5, marker=".", markersize=4, label=name)
        low, high = np.nanmin(values, axis=1), np.nanmax(values, axis=1)
        axes.fill_between(shown, low, high, color=colour, alpha=0.15, linewidth=0)


def probe_curves(probes: Mapping[int, Event], stages: Stages) -> Picture:
    """Held-out loss of the whole model, with shared experts only and without them: a panel a source."""
    steps = sorted(probes)
    final = probes[steps[-1]]["loss"]
    sources = list(dict.fromkeys(source for sources in final.values() for source in sources))
    figure = new_figure(5.0 * len(sources), 3.6)
    for axes, source in zip(figure.subplots(1, len(sources), squeeze=False)[0], sources, strict=True):
        for mode, name, curve in _probe_lines(probes, source):
            axes.plot(
                *zip(*curve, strict=True),
                color=CLASS_COLOURS.get(name, OTHER_COLOUR),
                linestyle=MODE_STYLES.get(mode, "-."),
                linewidth=1.3, marker=".", markersize=4, label=f"{name}, {mode.replace('_', ' ')}",
            )  # fmt: skip
        axes.set_ylim(bottom=0.0)
        _finish(axes, title=f"source: {source}", stages=stages, label="loss (nats a token)")
    return as_svg(figure, alternative=f"Held-out loss with experts switched off, of {', '.join(sources)}")


def _probe_lines(probes: Mapping[int, Event], source: str) -> Iterable[tuple[str, str, Curve]]:
    """(mode, loss class, curve) of one source, where there is a number at all."""
    curves: dict[tuple[str, str], Curve] = {}
    for step in sorted(probes):
        for mode, sources in probes[step]["loss"].items():
            for name, value in sources.get(source, {}).items():
                if value is not None:
                    curves.setdefault((mode, name), []).append((step, value))
    return [(mode, name, curve) for (mode, name), curve in curves.items()]


def rate_curves(rates: Mapping[str, Curve], stages: Stages) -> Picture:
    """Learning rate of every role against the step, logarithmic; roles with equal rates share a line."""
    lines: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for role, curve in rates.items():
        lines.setdefault(tuple(curve), []).append(role)
    figure = new_figure(8.0, 3.6)
    axes = figure.subplots()
    for curve, roles in lines.items():
        # A rate of 0 has no logarithm: the line has a gap where a role is frozen.
        values = [rate if rate > 0 else np.nan for _, rate in curve]
        axes.plot([step for step, _ in curve], values, linewidth=1.4, label=", ".join(roles))
    axes.set_yscale("log")
    _finish(axes, title="learning rates", stages=stages, label="rate")
    return as_svg(figure, alternative="Learning rate of every role against the step")
