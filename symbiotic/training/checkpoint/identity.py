"""What a resumed run has in common with the one that wrote its checkpoint, and which differences may be accepted.

An identity is a list of stages and some tables of plain values, see ``symbiotic.training.setup.run_identity``. The
corpora and their order are compared by the dataset (``BlendedDataset.load_state``), the partition by its hash, the
weights by their keys and shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from symbiotic.config.messages import dotted
from symbiotic.errors import CheckpointError
from symbiotic.strict_json import brief
from symbiotic.training.stages import first_difference

ACCEPTABLE = ("stages", "rates", "schedule", "maop", "shield")
"""Parts of an identity that ``checkpoint.accept_changes`` may name. A run in which any other part differs is another
run: its weights, tokens or samples would mean something else."""

ALWAYS_ACCEPTED = ("skip_steps",)
"""Parts that change in the life of a run without a word in ``checkpoint.accept_changes``; the log has the change."""

OFF: dict[str, Any] = {"maop": {"roles": []}, "skip_steps": {"steps": []}}
"""What checkpoints that were written before a part existed were trained with."""


@dataclass(frozen=True)
class Change:
    """A difference between the run that wrote a checkpoint and the one that resumes it.

    Attributes:
        what: the part, as in ``checkpoint.accept_changes``.
        before, after: its values, of tables only the keys that differ.
        difference: in words.
    """

    what: str
    before: Any
    after: Any
    difference: str

    def event(self, *, step: int) -> dict[str, Any]:
        """The line in the log of a run that goes on all the same."""
        return {
            "event": "accepted_change",
            "step": step,
            "what": self.what,
            "difference": self.difference,
            "before": self.before,
            "after": self.after,
        }


def identity_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[Change]:
    """The parts of the identity that differ. A part of :data:`OFF` that an old checkpoint lacks counts as that."""
    changes = []
    difference = first_difference(saved["stages"], current["stages"])
    if difference:
        changes.append(Change("stages", saved["stages"], current["stages"], difference))
    for name in {**current, **saved}:
        before, now = (identity.get(name, OFF.get(name)) for identity in (saved, current))
        # Of another part that an old checkpoint lacks nothing is known.
        if name == "stages" or before is None or before == now:
            continue
        now = now or {}
        # Of a field that was not recorded when the checkpoint was written nothing is known either.
        compared = before if name == "model" else {**before, **now}
        keys = [key for key in compared if before.get(key) != now.get(key)]
        if not keys:
            continue
        words = "; ".join(
            f"{dotted((name, key))} = {brief(before.get(key))}, this run has {brief(now.get(key))}" for key in keys
        )
        changes.append(Change(name, {key: before.get(key) for key in keys}, {key: now.get(key) for key in keys}, words))
    return changes


def accepted(changes: list[Change], names: Collection[str], *, source: str) -> list[Change]:
    """The changes, all of which are accepted.

    Args:
        changes: of :func:`identity_changes`.
        names: those of ``checkpoint.accept_changes``.
        source: the checkpoint, for the message.

    Raises:
        CheckpointError: a change is not accepted, or can't be.
    """
    for change in changes:
        if change.what in ALWAYS_ACCEPTED:
            continue
        if change.what not in ACCEPTABLE:
            raise CheckpointError(
                f"{source} is a checkpoint of another model or of other samples ({change.difference}); resume with the "
                "old value, or start a new run with checkpoint.load"
            )
        if change.what not in names:
            kind = "another stage table" if change.what == "stages" else f"other {change.what}"
            raise CheckpointError(
                f"{source} was trained with {kind} ({change.difference}); resume with the old value, accept the change "
                f"with checkpoint.accept_changes=[{change.what}], or start a new run with checkpoint.load"
            )
    return changes
