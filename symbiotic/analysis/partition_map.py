"""The picture of a partition: which experts serve which data, and which group each expert was given to.

A row of panels for each kind of data, a panel for each token type; in a panel a row is a block and a column an
expert. A cell's hue is the expert's group, and its depth the expert's share of the type's choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from symbiotic.analysis.expert_use import ExpertUse
from symbiotic.analysis.figures import Picture, as_svg, new_figure
from symbiotic.files import replacing
from symbiotic.model.partition import ExpertPartition
from symbiotic.tokens.types import TokenType

GROUP_MAPS = ("Blues", "Oranges", "Greens", "Purples", "Reds", "Greys")
"""Matplotlib's colour maps of the groups; after the last one from the first again."""

PALEST = 0.12
"""Depth of an expert that nothing chose, so that its group can still be seen."""

MOST_NUMBERS = 24
"""Most numbers that an axis shows."""


def write_partition_map(
    path: Path, counts: np.ndarray, *, kinds: Sequence[str], blocks: Sequence[int], partition: ExpertPartition
) -> None:
    """Write ``partition_map`` as SVG, by rename.

    Args:
        path: the file.
        counts: int64 [kinds, blocks, 16 token types, experts], see ``training.calibration``.
        kinds: names of the kinds of data.
        blocks: the counted blocks.
        partition: the groups of the experts; it may have experts, and blocks, that weren't counted.
    """
    rows = [partition.row(block)[: counts.shape[3]] for block in blocks]
    groups = tuple(tuple(partition.groups[index] for index in row) for row in rows)
    uses = [ExpertUse(kind_counts, tuple(blocks), groups) for kind_counts in counts]
    with replacing(path) as file:
        file.write(partition_map(list(zip(kinds, uses, strict=True)), groups=partition.groups).data)


def partition_map(uses: Sequence[tuple[str, ExpertUse]], *, groups: Sequence[str]) -> Picture:
    """Share of each type's choices that each expert got, a row of panels for each (kind of data, use).

    Args:
        uses: all of the same blocks and experts.
        groups: names of the groups, in the order of their hues.
    """
    types = sorted({token_type for _, use in uses for token_type in use.present_types()} - {TokenType.PADDING})
    blocks, experts = len(uses[0][1].blocks), uses[0][1].counts.shape[2]
    width, height = min(9.0, 1.2 + 0.16 * experts), min(7.0, 0.9 + 0.2 * blocks)
    figure = new_figure(max(5.0, width * max(1, len(types))), height * len(uses) + 0.8)
    panels = figure.subplots(len(uses), max(1, len(types)), squeeze=False)
    full = min(1.0, 4.0 / experts)
    for row, (kind, use) in zip(panels, uses, strict=True):
        for axes, token_type in zip(row, types, strict=False):
            _draw(axes, use, token_type, groups=groups, full=full)
            axes.set_title(f"{kind}: {token_type.name.lower()} tokens", fontsize=9)
    present = [name for name in groups if any(name in row for _, use in uses for row in use.groups)]
    patches = [Patch(color=_colours(groups.index(name), np.array(0.6)), label=name) for name in present]
    title = f"group of the expert; depth: share of the type's choices, full at {full:.1%} or more"
    figure.legend(
        handles=patches, title=title, loc="outside upper center", ncols=len(patches), fontsize=8, title_fontsize=8
    )
    titles = ", ".join(kind for kind, _ in uses)
    return as_svg(figure, alternative=f"Expert use by block and token type, with the experts' groups: {titles}")


def cell_colours(use: ExpertUse, token_type: TokenType, *, groups: Sequence[str], full: float) -> np.ndarray:
    """Colours of a panel: float [blocks, experts, 4], the hue by group, the depth by share up to ``full``."""
    depth = np.minimum(1.0, use.shares(token_type) / full)
    names = np.array(use.groups)
    colours = np.ones((*depth.shape, 4))
    for index, group in enumerate(groups):
        colours[names == group] = _colours(index, depth[names == group])
    return colours


def _colours(group: int, depth: np.ndarray) -> np.ndarray:
    """RGBA of a group's hue at depths between 0 and 1: [..., 4]."""
    return matplotlib.colormaps[GROUP_MAPS[group % len(GROUP_MAPS)]](PALEST + (1.0 - PALEST) * depth)


def _draw(axes: Axes, use: ExpertUse, token_type: TokenType, *, groups: Sequence[str], full: float) -> None:
    colours = cell_colours(use, token_type, groups=groups, full=full)
    axes.imshow(colours, aspect="auto", interpolation="nearest")
    blocks, experts = colours.shape[:2]
    step = -(-experts // MOST_NUMBERS)
    axes.set_xticks(range(0, experts, step), range(0, experts, step))
    step = -(-blocks // MOST_NUMBERS)
    axes.set_yticks(range(0, blocks, step), use.blocks[::step])
    axes.tick_params(labelsize=7)
    axes.set_xlabel("expert", fontsize=8)
    axes.set_ylabel("block", fontsize=8)
    if experts <= 2 * MOST_NUMBERS:
        _rule(axes, blocks=blocks, experts=experts)
    if not use.counts[:, token_type].any():
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        axes.text(0.5, 0.5, "no such token", transform=axes.transAxes, ha="center", va="center", fontsize=8, bbox=box)


def _rule(axes: Axes, *, blocks: int, experts: int) -> None:
    """White lines between the cells, where these are large enough."""
    axes.set_xticks(np.arange(1, experts) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, blocks) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
