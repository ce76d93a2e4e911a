"""The report of one training run.

RUN/log.jsonl, and where they are there RUN/partition.json and RUN/config.yaml
-> RUN/report.json, RUN/report.html
"""

from __future__ import annotations

from pathlib import Path

from symbiotic.analysis.figures import loss_curves
from symbiotic.analysis.page import Section, write_report
from symbiotic.analysis.results import Row
from symbiotic.analysis.run_figures import (
    drift_curves,
    gradient_curves,
    load_maps,
    probe_curves,
    rate_curves,
    routing_maps,
)
from symbiotic.analysis.runs import Run, final_rows, read_run


def build_run_report(folder: Path | str, *, command: str) -> list[Row]:
    """Write ``report.json`` and ``report.html`` into the run folder and return the rows.

    Args:
        folder: of a training run.
        command: what the user typed.

    Raises:
        UserError: a file of the run is missing or damaged.
    """
    run = read_run(folder)
    rows = final_rows(run)
    write_report(run.folder, title=f"Run {run.name}", rows=rows, sections=sections_of(run), command=command)
    return rows


def sections_of(run: Run) -> list[Section]:
    """A section for each kind of measurement that the run logged, and one line on those that it didn't."""
    available = {
        "losses": (bool(run.log.loss or run.log.held_out), _losses),
        "routing metrics": (bool(run.log.routing), _routing),
        "routing drift": (bool(run.log.drift), _drift),
        "shared gradients": (bool(run.log.gradients), _gradients),
        "probes": (bool(run.log.probes), _probes),
        "learning rates": (bool(run.rates), _rates),
    }
    sections: list[Section] = [make(run) for present, make in available.values() if present]
    missing = [name for name, (present, _) in available.items() if not present]
    if run.size is None:
        missing.append("parameters (no config.yaml in the folder, or its vocabulary is not there)")
    if missing:
        text = f"This run left behind no {', no '.join(missing)}; the settings are routing_metrics and diagnostics."
        sections.append(Section("Left out", text))
    return sections


def _losses(run: Run) -> Section:
    text = (
        "Loss of each class against the step: faint lines are single steps, bold lines their running mean, dots are "
        "held-out losses. Dotted vertical lines mark where a stage begins."
    )
    return Section("Losses", text, [(loss_curves([run.log]), "Nats a token; each class has its own mean.")])


def _routing(run: Run) -> Section:
    text = (
        "Which experts each token type chooses, and how evenly. The capacity rate is the share of choices that would "
        "fit if an expert took no more than routing_metrics.capacity_factor times its group's mean load, first choices "
        "first; nothing is dropped in training. The paper reports more than 0.90 for each type and about 0.95 in all."
    )
    log = run.log
    loads = "Share of a type's choices by expert, at the first and the last logged step, in the colour of its group."
    course = "By step (to the right) and block (downwards); entropy and dead experts are those of the type's group."
    pictures = [(load_maps(log.routing, run.partition), loads), (routing_maps(log.routing, log.stages), course)]
    return Section("Routing", text, pictures)


def _drift(run: Run) -> Section:
    text = (
        "KL divergence from the routing at the reference to that at the step, on fixed held-out batches, teacher-"
        "forced, over the experts of the token's group: routing collapse as one number."
    )
    return Section("Routing drift", text, [(drift_curves(run.log.drift, run.log.stages), "A line a block.")])


def _gradients(run: Run) -> Section:
    text = (
        "Gradient into the shared experts. By loss class: of each class's loss alone, which also reaches them through "
        "tokens of other types that are attended to. By rows: what arrives through generation tokens, which the "
        "shield scales, and through all others. A cosine below 0 means that the two pull in opposite directions."
    )
    caption = "Lines are means over blocks, bands go from the smallest to the largest block; a gap is a norm of 0."
    return Section(
        "Gradients into the shared experts", text, [(gradient_curves(run.log.gradients, run.log.stages), caption)]
    )


def _probes(run: Run) -> Section:
    text = (
        "Held-out loss with a part of every MoE layer switched off: with shared experts only, and with routed experts "
        "only. In the paper, what is left with shared experts only gets worse in the control and better in the method."
    )
    return Section("Probes", text, [(probe_curves(run.log.probes, run.log.stages), "Nats a token.")])


def _rates(run: Run) -> Section:
    return Section(
        "Learning rates",
        "The rate of each role: schedule and factors of the stage included.",
        [(rate_curves(run.rates, run.log.stages), "A gap is a frozen role.")],
    )
