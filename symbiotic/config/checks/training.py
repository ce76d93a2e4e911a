"""Checks of stages, rates, mixtures, batch sizes and the intervals of a run."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from symbiotic.config.layout import check_world_size, parallel_layout
from symbiotic.config.megatron_fields import value_of
from symbiotic.config.messages import KeyPath, did_you_mean, shown
from symbiotic.config.roles import roles_of
from symbiotic.config.routing_defaults import type_names
from symbiotic.config.schema import Config, ShieldRamp
from symbiotic.tokens.types import LossClass


def check_batch(config: Config) -> None:
    """A global batch is a whole number of micro batches, at least on the smallest number of processes that fits."""
    micro, total = config.training.micro_batch_size, config.training.global_batch_size
    if total % micro:
        raise config.origin.error(
            "training.global_batch_size",
            f"= {total} is not a multiple of training.micro_batch_size = {micro}; change one of them",
        )
    check_world_size(config, parallel_layout(config).smallest_world)


def _check_unique(config: Config, names: Iterable[str], *, path: KeyPath, what: str) -> None:
    seen: list[str] = []
    for index, name in enumerate(names):
        if name in seen:
            raise config.origin.error(
                (*path, str(index), "name"),
                f"= {shown(name)} is the name of {what} {seen.index(name)} already; choose another",
            )
        seen.append(name)


def check_stage_names(config: Config) -> None:
    """Stage names are unique: curves and resume speak of stages by name."""
    _check_unique(config, [stage.name for stage in config.stages], path=("stages",), what="stage")


def check_source_names(config: Config) -> None:
    """Source names are unique in each list."""
    for section in ("sources", "validation"):
        names = [source.name for source in getattr(config.data, section)]
        _check_unique(config, names, path=("data", section), what="source")


def check_mixtures(config: Config) -> None:
    """A mixture names known sources, and some source has a weight in every stage."""
    known = [source.name for source in config.data.sources]
    for index, stage in enumerate(config.stages):
        path = ("stages", str(index), "mixture")
        for name in stage.mixture:
            if name not in known:
                remedy = did_you_mean(name, known, what="source")
                raise config.origin.error((*path, name), f"is not a name in data.sources: {remedy}")
        if stage.mixture and sum(stage.mixture.values()) == 0.0:
            raise config.origin.error(path, "has no positive weight; give one source a weight above 0")
    needs_weights = not config.stages or any(not stage.mixture for stage in config.stages)
    if known and needs_weights and sum(source.weight for source in config.data.sources) == 0.0:
        raise config.origin.error("data.sources", "has no positive weight; give one source a weight above 0")


def check_shield_types(config: Config) -> None:
    """Shield tables name token types."""
    for index, stage in enumerate(config.stages):
        for name in stage.shield:
            if name not in type_names():
                remedy = did_you_mean(name, type_names(), what="token type")
                raise config.origin.error(("stages", str(index), "shield", name), f"is not a token type: {remedy}")


def check_shield_ramps(config: Config) -> None:
    """A ramp fits into its stage and has a first and a last step."""
    for index, stage in enumerate(config.stages):
        for name, value in stage.shield.items():
            if not isinstance(value, ShieldRamp):
                continue
            path = ("stages", str(index), "shield", name)
            if value.steps is not None and value.steps > stage.steps:
                raise config.origin.error(
                    (*path, "steps"), f"= {value.steps} is longer than the stage of {stage.steps} steps; lower it"
                )
            if stage.steps < 2:
                raise config.origin.error(path, "is a ramp in a stage of one step; give it one number")


def check_projection(config: Config) -> None:
    """maop.roles match roles."""
    _check_role_keys(config, config.maop.roles, path=("maop", "roles"))


def check_loss_classes(config: Config) -> None:
    """Loss weights name loss classes, and one of them counts."""
    known = [member.name.lower() for member in LossClass]
    for index, stage in enumerate(config.stages):
        path = ("stages", str(index), "loss_weights")
        for name in stage.loss_weights:
            if name not in known:
                remedy = did_you_mean(name, known, what="loss class")
                raise config.origin.error((*path, name), f"is not a loss class: {remedy}")
        if all(stage.loss_weights.get(name, 1.0) == 0.0 for name in known):
            raise config.origin.error(
                path, "sets every loss class to 0, so nothing is learned; give one a weight above 0"
            )


def _check_role_keys(config: Config, keys: Iterable[str], *, path: KeyPath) -> None:
    roles = roles_of(config)
    for key in keys:
        if not any(fnmatchcase(role, key) for role in roles):
            remedy = did_you_mean(key, roles, what="role")
            raise config.origin.error((*path, key), f"matches no role of this model: {remedy}")


def check_rates(config: Config) -> None:
    """Every role has a rate, and every key of the table matches a role."""
    for role in roles_of(config):
        if not any(fnmatchcase(role, key) for key in config.rates):
            raise config.origin.error(
                ("rates", role), "is missing: every role needs a learning rate; set it, or add a pattern such as '*'"
            )
    _check_role_keys(config, config.rates, path=("rates",))


def check_stage_roles(config: Config) -> None:
    """rate_factors and frozen of a stage match roles, and something is left to train."""
    roles = roles_of(config)
    for index, stage in enumerate(config.stages):
        _check_role_keys(config, stage.rate_factors, path=("stages", str(index), "rate_factors"))
        _check_role_keys(config, stage.frozen, path=("stages", str(index), "frozen"))
        if all(any(fnmatchcase(role, key) for key in stage.frozen) for role in roles):
            raise config.origin.error(("stages", str(index), "frozen"), "freezes every role; leave one to train")


def check_schedule(config: Config) -> None:
    """Warm-up and decay fit the run."""
    schedule, steps = config.schedule, config.training.steps
    if schedule.warmup_steps > steps:
        raise config.origin.error(
            "schedule.warmup_steps", f"= {schedule.warmup_steps} is longer than the run of {steps} steps; lower it"
        )
    if schedule.decay != "constant" and schedule.warmup_steps >= (schedule.decay_steps or steps):
        raise config.origin.error(
            "schedule.decay_steps",
            f"= {schedule.decay_steps or steps} is not after schedule.warmup_steps = {schedule.warmup_steps}; "
            "raise it or lower the warm-up",
        )


def check_skip_steps(config: Config) -> None:
    """The spans are in order, don't overlap and leave the run's last step, at which its end is measured."""
    reached, steps = 0, config.training.steps
    for index, span in enumerate(config.training.skip_steps):
        path = ("training", "skip_steps", str(index))
        if span.end < span.start:
            raise config.origin.error(
                (*path, "to"), f"= {span.end} is before its from = {span.start}; a span needs from <= to"
            )
        if span.start <= reached:
            raise config.origin.error(
                (*path, "from"),
                f"= {span.start} is not after the span before, which ends at {reached}; put the spans in order, "
                "without overlap",
            )
        if span.end >= steps:
            raise config.origin.error(
                (*path, "to"),
                f"= {span.end} is not before the last step, training.steps = {steps}; lower it, or end the run earlier",
            )
        reached = span.end


def check_evaluation(config: Config) -> None:
    """Evaluation at an interval needs something to evaluate on."""
    if config.training.evaluation_interval is not None and not config.data.validation:
        raise config.origin.error(
            "training.evaluation_interval", "is given, but data.validation names no source; name one or set it to null"
        )


def check_diagnostics(config: Config) -> None:
    """Drift and probes have held-out data, and weight gradients can be told apart by row."""
    settings = config.diagnostics
    if settings.interval is None:
        return
    for name in ("drift", "probes"):
        if getattr(settings, name) and not config.data.validation:
            raise config.origin.error(
                f"diagnostics.{name}", "= true needs held-out data; set it to false or name some in data.validation"
            )
    if settings.gradients and value_of(config, "gradient_accumulation_fusion"):
        raise config.origin.error(
            "diagnostics.gradients",
            "= true can't tell rows apart in fused weight gradients; set it to false or remove "
            "TransformerConfig.gradient_accumulation_fusion",
        )


def check_checkpoints(config: Config) -> None:
    """A checkpoint that is to be kept for ever is one that is saved, and there is training beside an async one."""
    interval, keep_every = config.checkpoint.interval, config.checkpoint.keep_every
    if config.checkpoint.async_save and interval is None:
        raise config.origin.error(
            "checkpoint.async_save",
            "= true does nothing for the checkpoint at the end, which is waited for; set checkpoint.interval too",
        )
    if keep_every is not None and (interval is None or keep_every % interval):
        raise config.origin.error(
            "checkpoint.keep_every",
            f"= {keep_every} is not a multiple of checkpoint.interval = {interval}; change one of them",
        )
