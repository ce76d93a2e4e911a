"""The pictures of a report, drawn with matplotlib and returned as SVG or PNG bytes.

Vector pictures for curves and maps, PNG for samples. Nothing is shown on a screen and no global state of
matplotlib is changed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from symbiotic.analysis.expert_use import ExpertUse
from symbiotic.analysis.run_log import Curve, RunLog
from symbiotic.tokens.types import TokenType

CLASS_COLOURS = {"text": "#1f5fa8", "understanding": "#2e8b57", "generation": "#d2552d"}
OTHER_COLOUR = "#666666"
GROUP_FRAME_COLOUR = "#d2552d"
RIGHT_COLOUR, WRONG_COLOUR = "#2e7d32", "#c62828"
GAP = 2
"""White pixels between the pictures of a mosaic."""

SMOOTHING_POINTS = 40
"""A training curve is averaged over 1/40 of its points, so that the trend shows through the batch noise."""


@dataclass(frozen=True)
class Picture:
    """An encoded picture: ``media_type`` is image/svg+xml or image/png."""

    data: bytes
    media_type: str
    alternative: str

    @property
    def data_uri(self) -> str:
        """The picture as a ``data:`` address, so that a page needs no other file."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.data).decode()}"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_svg(figure: Figure, *, alternative: str) -> Picture:
    """The figure as a vector picture; ``alternative`` says in words what it shows."""
    buffer = io.BytesIO()
    # A fixed salt and no date: the same measurements give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "symbiotic"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Picture(buffer.getvalue(), "image/svg+xml", alternative)


def _as_png(figure: Figure, *, alternative: str) -> Picture:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return Picture(buffer.getvalue(), "image/png", alternative)


def smooth(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Steps and the running mean of the values around each step, over a window that shrinks at both ends."""
    steps = np.array([step for step, _ in curve])
    values = np.array([value for _, value in curve], dtype=np.float64)
    half = len(values) // SMOOTHING_POINTS // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return steps, (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def mark_stages(axes: Axes, stages: Sequence[tuple[int, str]]) -> None:
    """A dotted line with its name where each stage begins: ``stages`` are pairs of first step and name."""
    for first_step, stage in stages:
        axes.axvline(first_step, color="#888888", linewidth=0.8, linestyle=":")
        axes.annotate(stage, (first_step, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -10),
                      textcoords="offset points", fontsize=8, color="#444444")  # fmt: skip


def _draw_losses(axes: Axes, log: RunLog) -> None:
    for name, curve in log.loss.items():
        colour = CLASS_COLOURS.get(name, OTHER_COLOUR)
        axes.plot(*zip(*curve, strict=True), color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(*smooth(curve), color=colour, linewidth=1.5, label=f"{name}, training")
    markers = dict(zip(dict.fromkeys(source for _, source in log.held_out), "os^vDP*" * 5, strict=False))
    for (name, source), curve in log.held_out.items():
        colour = CLASS_COLOURS.get(name, OTHER_COLOUR)
        axes.plot(*zip(*curve, strict=True), color=colour, marker=markers[source], markersize=3.5, linewidth=0.8,
                  linestyle="--", label=f"{name} in {source}, held out")  # fmt: skip
    mark_stages(axes, log.stages)
    axes.set_title(f"run: {log.name}", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_ylim(bottom=0.0)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def loss_curves(logs: Sequence[RunLog]) -> Picture:
    """Loss by class against the step, a panel a run; dotted lines mark where each stage begins."""
    figure = new_figure(5.5 * len(logs), 3.8)
    for log, axes in zip(logs, figure.subplots(1, len(logs), squeeze=False)[0], strict=True):
        _draw_losses(axes, log)
    names = " and ".join(log.name for log in logs)
    return as_svg(figure, alternative=f"Training and held-out loss by class of the runs {names}")


def _framed_group(use: ExpertUse) -> str | None:
    """The group with the fewest experts, which the map marks; None when there is only one group."""
    names = [group for block in use.groups for group in block]
    if len(set(names)) == 1:
        return None
    return min(sorted(set(names)), key=names.count)


def _draw_use(axes: Axes, use: ExpertUse, *, token_types: Sequence[TokenType], title: str) -> None:
    """A row for each block and type, a column an expert; the experts of the smallest group are framed."""
    rows = [use.shares(token_type)[index] for index in range(len(use.blocks)) for token_type in token_types]
    names = [f"block {block}, {t.name.lower()}" for block in use.blocks for t in token_types]
    axes.imshow(np.array(rows), aspect="auto", cmap="Blues", vmin=0.0, vmax=max(0.2, float(np.max(rows))))
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xticks(range(use.counts.shape[2]), range(use.counts.shape[2]), fontsize=6)
    axes.set_xlabel("expert", fontsize=8)
    for boundary in range(len(token_types), len(rows), len(token_types)):
        axes.axhline(boundary - 0.5, color="white", linewidth=2)
    framed = _framed_group(use)
    if framed is not None:
        title = f"{title} (framed: {framed} group)"
        _frame_experts(axes, use, group=framed, rows_per_block=len(token_types))
    axes.set_title(title, fontsize=9)


def _frame_experts(axes: Axes, use: ExpertUse, *, group: str, rows_per_block: int) -> None:
    style = {"fill": False, "linewidth": 1.1, "edgecolor": GROUP_FRAME_COLOUR}
    for index, groups in enumerate(use.groups):
        top = index * rows_per_block - 0.5
        for expert in np.flatnonzero(np.array(groups) == group):
            axes.add_patch(Rectangle((expert - 0.5, top), 1, rows_per_block, **style))


def expert_use_maps(uses: Sequence[tuple[str, ExpertUse]]) -> Picture:
    """Share of each type's choices that each expert got, block by block; a panel for each (title, use)."""
    all_types = [use.present_types() for _, use in uses]
    height = 1.2 + 0.22 * max(len(use.blocks) * len(t) for (_, use), t in zip(uses, all_types, strict=True))
    figure = new_figure(5.6 * len(uses), height)
    panels = figure.subplots(1, len(uses), squeeze=False)[0]
    for (title, use), token_types, axes in zip(uses, all_types, panels, strict=True):
        _draw_use(axes, use, token_types=token_types, title=title)
    titles = ", ".join(title for title, _ in uses)
    return as_svg(figure, alternative=f"Share of choices by expert, block and token type: {titles}")


def mosaic(pictures: Sequence[Sequence[np.ndarray]], *, columns: int) -> np.ndarray:
    """Rows of equally large pictures [height, width(, 3)] as one picture in 0..1, dark on white, with white gaps.

    Grey pictures are drawn as ink: their largest value becomes black.
    """
    first = pictures[0][0]
    height, width = first.shape[:2]
    canvas = np.ones((len(pictures) * (height + GAP) - GAP, columns * (width + GAP) - GAP, *first.shape[2:]))
    largest = max(float(np.max(picture)) for row in pictures for picture in row) or 1.0
    for i, row in enumerate(pictures):
        for j, picture in enumerate(row[:columns]):
            place = np.s_[
                i * (height + GAP) : i * (height + GAP) + height, j * (width + GAP) : j * (width + GAP) + width
            ]
            canvas[place] = 1.0 - picture / largest if picture.ndim == 2 else picture / largest
    return canvas


def _inches_per_pixel(height: int, width: int) -> float:
    """Enlargement of a picture in a mosaic: about half an inch, wider where the picture is."""
    return max(0.45, 0.35 * width / height) / width


def _mosaic_figure(pictures: Sequence[Sequence[np.ndarray]], *, columns: int, title: str) -> tuple[Figure, Axes]:
    """A figure with one axes that shows the mosaic."""
    canvas = mosaic(pictures, columns=columns)
    scale = _inches_per_pixel(*pictures[0][0].shape[:2])
    figure = new_figure(canvas.shape[1] * scale + 1.0, canvas.shape[0] * scale + 0.6)
    axes = figure.subplots()
    axes.imshow(canvas, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_frame_on(False)
    return figure, axes


def sample_grid(
    pictures: np.ndarray, labels: np.ndarray, class_names: Sequence[str], *, per_class: int, title: str
) -> Picture:
    """The first ``per_class`` pictures of each class, a row a class.

    Args:
        pictures: [n, height, width] or [n, height, width, 3].
        labels: index into ``class_names`` of each [n].
        class_names: row titles.
        per_class: pictures a row; a class with fewer leaves the rest empty.
        title: above the grid.
    """
    classes = [label for label in range(len(class_names)) if (labels == label).any()]
    rows = [list(pictures[labels == label][:per_class]) for label in classes]
    figure, axes = _mosaic_figure(rows, columns=per_class, title=title)
    height = pictures.shape[1]
    axes.set_yticks([row * (height + GAP) + height / 2 - 0.5 for row in range(len(rows))])
    axes.set_yticklabels([class_names[label] for label in classes], fontsize=9)
    axes.tick_params(length=0)
    return _as_png(figure, alternative=title)


def reading_grid(
    pictures: np.ndarray, answers: Sequence[str], correct: Sequence[str], *, columns: int, title: str
) -> Picture:
    """Pictures with the model's answer under each: green when right, red above the right answer when not."""
    height, width = pictures.shape[1:3]
    # White rows below each picture hold two lines of text.
    room_height = round(0.26 / _inches_per_pixel(height, width))
    room = np.zeros((len(pictures), room_height, *pictures.shape[2:]))
    labelled = np.concatenate([pictures, room], axis=1)
    rows = [list(labelled[start : start + columns]) for start in range(0, len(labelled), columns)]
    figure, axes = _mosaic_figure(rows, columns=columns, title=title)
    for index, (answer, right) in enumerate(zip(answers, correct, strict=True)):
        row, column = divmod(index, columns)
        place = (column * (width + GAP) + width / 2 - 0.5, row * (labelled.shape[1] + GAP) + height)
        label, colour = (answer, RIGHT_COLOUR) if answer == right else (f"{answer}\n({right})", WRONG_COLOUR)
        axes.text(*place, label, fontsize=7, color=colour, ha="center", va="top", linespacing=1.0)
    return _as_png(figure, alternative=title)
