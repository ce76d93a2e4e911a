"""Progressive training: which stage a global step belongs to (method.md section 4).

A stage fixes shield factors, rate factors, loss weights, data mixture and frozen roles. It is a function of the
global step and of nothing else, so a resumed run is in the right stage by construction.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from symbiotic.config.schema import ShieldRamp
from symbiotic.tokens.types import NUM_TOKEN_TYPES, LossClass, TokenType, type_by_name

if TYPE_CHECKING:
    from symbiotic.config import Config
    from symbiotic.config.schema import StageConfig

WHOLE_RUN = "training"
"""Name of the only stage of a run whose configuration names none."""


@dataclass(frozen=True)
class Ramp:
    """A factor that changes linearly from ``start`` in the stage's first step to ``end`` in its step number ``steps``.

    Step i of the stage, counted from 0, has start + (end - start) * i / (steps - 1), and ``end`` from i = steps - 1 on.
    """

    start: float
    end: float
    steps: int

    def at(self, index: int) -> float:
        """The factor of step ``index`` of the stage, counted from 0."""
        if index >= self.steps - 1:
            return self.end
        return self.start + (self.end - self.start) * index / (self.steps - 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, under the names of the configuration."""
        return {"from": self.start, "to": self.end, "steps": self.steps}

    def __str__(self) -> str:
        return f"{self.start:g} to {self.end:g} in {self.steps} steps"


@dataclass(frozen=True)
class Stage:
    """One stretch of steps.

    Attributes:
        name: unique name.
        start, end: the stage holds steps start, ..., end - 1, counted from 0 over the whole run.
        shield: gradient factor of each of the 16 token types, or a ramp of it, for the targets of the shield.
        rate_factors: role or pattern -> factor on its learning rate.
        loss_weights: weight of each LossClass in the loss, by its value.
        mixture: source -> weight; empty keeps the configured weights.
        frozen: roles or patterns whose parameters stay untouched.
    """

    name: str
    start: int
    end: int
    shield: tuple[float | Ramp, ...] = (1.0,) * NUM_TOKEN_TYPES
    rate_factors: Mapping[str, float] = field(default_factory=dict)
    loss_weights: tuple[float, ...] = (1.0,) * len(LossClass)
    mixture: Mapping[str, float] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()

    def shield_at(self, step: int) -> tuple[float, ...]:
        """The gradient factor of each of the 16 token types in a global step of the stage."""
        return tuple(item.at(step - self.start) if isinstance(item, Ramp) else item for item in self.shield)

    def shield_words(self) -> dict[str, float | str]:
        """Token type -> factor, or ramp in words, for every type that isn't left alone; for the log."""
        return {
            TokenType(kind).name.lower(): str(item) if isinstance(item, Ramp) else item
            for kind, item in enumerate(self.shield)
            if item != 1.0
        }


class StageTable:
    """The stages of a run in order, covering every step."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        assert stages and stages[0].start == 0, "the first stage starts at step 0"
        assert all(left.end == right.start for left, right in pairwise(stages)), "no gap"
        self.stages = tuple(stages)
        self._starts = [stage.start for stage in stages]

    @classmethod
    def from_config(cls, config: Config) -> StageTable:
        """The table of a resolved configuration."""
        if not config.stages:
            return cls([Stage(name=WHOLE_RUN, start=0, end=config.training.steps)])
        stages, start = [], 0
        for item in config.stages:
            stages.append(_stage(item, start))
            start += item.steps
        return cls(stages)

    def at(self, step: int) -> Stage:
        """The stage of a global step, counted from 0; steps past the end belong to the last stage."""
        return self.stages[bisect_right(self._starts, step) - 1]

    def to_list(self) -> list[dict[str, Any]]:
        """Plain values, as they stand in checkpoints: two runs have equal stages if and only if these are equal.

        The end of the last stage is left out: a longer run trains the same steps first.
        """
        return [
            {
                "name": stage.name,
                "start": stage.start,
                "shield": [item.to_dict() if isinstance(item, Ramp) else item for item in stage.shield],
                "rate_factors": dict(stage.rate_factors),
                "loss_weights": list(stage.loss_weights),
                "mixture": dict(stage.mixture),
                "frozen": list(stage.frozen),
            }
            for stage in self.stages
        ]


def first_difference(saved: Sequence[Mapping[str, Any]], current: Sequence[Mapping[str, Any]]) -> str | None:
    """Where two tables made by ``to_list`` differ first, in words; None when they are equal."""
    for index in range(max(len(saved), len(current))):
        if index >= len(saved) or index >= len(current):
            return f"{len(saved)} stages then, {len(current)} now"
        before, now = saved[index], current[index]
        for key in now:
            if before.get(key) != now[key]:
                return f"stage {before.get('name')!r} had {key} {before.get(key)!r}, now {now[key]!r}"
    return None


def _stage(item: StageConfig, start: int) -> Stage:
    """A stage from its configuration, whose names are checked already."""
    shield: list[float | Ramp] = [1.0] * NUM_TOKEN_TYPES
    for name, value in item.shield.items():
        if isinstance(value, ShieldRamp):
            shield[type_by_name(name)] = Ramp(value.start, value.end, value.steps or item.steps)
        else:
            shield[type_by_name(name)] = float(value)
    return Stage(
        name=item.name,
        start=start,
        end=start + item.steps,
        shield=tuple(shield),
        rate_factors=item.rate_factors,
        loss_weights=tuple(float(item.loss_weights.get(member.name.lower(), 1.0)) for member in LossClass),
        mixture=item.mixture,
        frozen=tuple(item.frozen),
    )
