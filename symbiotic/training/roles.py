"""Parameter roles and their learning rates.

Every parameter has exactly one role, such as ``expert.generation``, ``router.understanding``, ``attention`` or
``generation_head``; the model builder writes it on the parameter as ``parameter.role``. Rates, rate factors and
freezing are all said by role. A key in a table is an exact role or an ``fnmatch`` pattern (``router.*``); the
exact name wins, then the first pattern in the table's order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from symbiotic.errors import ConfigError
from symbiotic.training.schedule import Schedule
from symbiotic.training.stages import Stage, StageTable


def match_role(role: str, table: Mapping[str, float]) -> float | None:
    """The value that ``table`` holds for ``role``, None when no key matches."""
    if role in table:
        return table[role]
    return next((value for pattern, value in table.items() if fnmatchcase(role, pattern)), None)


def matching_roles(roles: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The roles that any of ``patterns`` (exact names or ``fnmatch`` patterns) matches, in their order."""
    patterns = list(patterns)
    return [role for role in roles if any(fnmatchcase(role, pattern) for pattern in patterns)]


@dataclass(frozen=True)
class RoleRates:
    """Learning rate of every role at every step.

    Attributes:
        peak: role -> rate before schedule and stage; 0.0 is a rate (the role is frozen for the whole run).
        schedule: factor by step.
        stages: factors and frozen roles by stage.
    """

    peak: Mapping[str, float]
    schedule: Schedule
    stages: StageTable

    @classmethod
    def build(
        cls, roles: Iterable[str], rates: Mapping[str, float], *, schedule: Schedule, stages: StageTable
    ) -> RoleRates:
        """Give every role of the model its rate.

        Raises:
            ConfigError: a role has no rate.
        """
        peak = {}
        for role in sorted(roles):
            rate = match_role(role, rates)
            if rate is None:
                raise ConfigError(
                    f"rates: the role {role!r} has no learning rate; set rates.{role}, or a pattern that matches it "
                    "(0.0 freezes it)"
                )
            peak[role] = float(rate)
        return cls(peak, schedule, stages)

    def at(self, step: int) -> dict[str, float]:
        """Role -> learning rate of one optimizer step, counted from 0; frozen roles have 0.0."""
        stage, factor = self.stages.at(step), self.schedule.factor(step)
        return {role: self.in_stage(role, stage) * factor for role in self.peak}

    def in_stage(self, role: str, stage: Stage) -> float:
        """Peak rate of a role within a stage, before the schedule's factor."""
        if matching_roles([role], stage.frozen):
            return 0.0
        factor = match_role(role, stage.rate_factors)
        return self.peak[role] * (1.0 if factor is None else factor)

    def frozen_at(self, step: int) -> frozenset[str]:
        """Roles whose parameters the step leaves untouched: rate, rate factor or stage say so.

        The schedule's factor doesn't count: a warm-up from zero doesn't freeze anything.
        """
        stage = self.stages.at(step)
        return frozenset(role for role in self.peak if self.in_stage(role, stage) == 0.0)


def rate_table(rates: RoleRates, counts: Mapping[str, int]) -> str:
    """Roles with their parameter counts and their peak rate in each stage, as lines of text.

    Args:
        rates: the rates.
        counts: role -> parameters of the whole model, every parameter counted once.
    """
    stages = rates.stages.stages
    rows = [["role", "parameters", *(stage.name for stage in stages)]]
    for role in rates.peak:
        values = [rates.in_stage(role, stage) for stage in stages]
        rows.append([role, f"{counts[role]:,}", *("frozen" if value == 0.0 else f"{value:g}" for value in values)])
    rows.append(["total", f"{sum(counts.values()):,}", *("" for _ in stages)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
