"""Rank-side: what the stage of each step does to a run, looked up in the model itself."""

from __future__ import annotations

from typing import Any

from symbiotic.model.shield import GradientShield
from symbiotic.tokens.types import TokenType
from tests.training.cases import Watch, parameters, roles, trainer_of


def stages_at_work(file: str, overrides: list[str]) -> list[dict[str, Any]]:
    """For every step: factors of generation codes in all shields, roles that moved, token types in the batch."""
    seen: list[dict[str, Any]] = []
    with trainer_of(file, overrides) as trainer:
        role_of, before = roles(trainer), parameters(trainer)

        def look(trainer, result):
            shields = [
                module for chunk in trainer.chunks for module in chunk.modules() if isinstance(module, GradientShield)
            ]
            after = parameters(trainer)
            batches = trainer.data(trainer.state.step - 1)
            seen.append(
                {
                    "shields": {float(shield.factors[TokenType.GENERATION_CODE]) for shield in shields},
                    "moved": {role for name, role in role_of.items() if not after[name].equal(before[name])},
                    "types": {
                        TokenType(kind).name.lower()
                        for batch in batches
                        for kind in batch["token_types"].unique().tolist()
                    },
                }
            )
            before.update(after)

        trainer.callbacks.append(Watch(look))
        trainer.fit()
    return seen
