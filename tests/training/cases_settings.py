"""Rank-side cases for test_megatron_settings.py."""

from __future__ import annotations

import torch

from tests.training.cases import Watch, parameters, roles, trainer_of


def adam_by_hand(file: str, overrides: list[str]) -> list[tuple[float, float]]:
    """For every step the largest change of any value, and its largest difference from Adam written out in float64."""
    with trainer_of(file, overrides) as trainer:
        config = trainer._step.optimizer.config
        beta1, beta2, decay = config.adam_beta1, config.adam_beta2, config.weight_decay
        role_of = roles(trainer)
        weights = {name: value.double() for name, value in parameters(trainer).items()}
        first, second = ({name: torch.zeros_like(value) for name, value in weights.items()} for _ in range(2))
        found = []

        def look(trainer, result):
            count, difference, change = len(found) + 1, 0.0, 0.0
            for name, parameter in trainer.chunks[0].named_parameters():
                rate = result.rates[role_of[name]]
                of_heads = "q_layernorm" in name or "k_layernorm" in name
                decayed = decay if parameter.dim() > 1 or (of_heads and config.apply_wd_to_qk_layernorm) else 0.0
                before, gradient = weights[name], parameter.main_grad.double()
                if not config.decoupled_weight_decay:
                    gradient = gradient + decayed * before
                first[name] = beta1 * first[name] + (1 - beta1) * gradient
                second[name] = beta2 * second[name] + (1 - beta2) * gradient.square()
                step = first[name] / (1 - beta1**count)
                step = step / ((second[name] / (1 - beta2**count)).sqrt() + config.adam_eps)
                if config.decoupled_weight_decay:
                    step = step + decayed * before
                weights[name] = before - rate * step
                difference = max(difference, float((parameter.double() - weights[name]).abs().max()))
                change = max(change, float((weights[name] - before).abs().max()))
            found.append((change, difference))

        trainer.callbacks.append(Watch(look))
        trainer.fit()
        return found


def skipped_steps(file: str, overrides: list[str]) -> tuple[int, bool]:
    """Steps that were not applied, and whether every parameter is what it was."""
    with trainer_of(file, overrides) as trainer:
        before = parameters(trainer)
        trainer.fit()
        after = parameters(trainer)
        return trainer.state.skipped, all(torch.equal(after[name], value) for name, value in before.items())


def initial_deviation(file: str, overrides: list[str]) -> dict[str, float]:
    """Name -> standard deviation of each weight matrix before the first step."""
    with trainer_of(file, overrides) as trainer:
        return {name: float(value.std()) for name, value in parameters(trainer).items() if value.dim() > 1}
