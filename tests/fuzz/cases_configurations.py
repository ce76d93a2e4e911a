"""Changes of the sections with Megatron's names, in a process that has megatron-core; run by ``run_ranks``."""

import dataclasses
import enum
import os
import types
import typing
from pathlib import Path
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from symbiotic.config import Config
from symbiotic.config.megatron import check_megatron_sections, ddp_config, optimizer_config, transformer_config
from symbiotic.config.megatron_fields import DERIVED
from symbiotic.config.megatron_support import UNUSED
from symbiotic.config.refused import REFUSALS
from tests.config.trees import tree, vocabulary
from tests.fuzz.changes import CHANGED, ODD_VALUES, REFUSED, SAME, Tally, for_each, misspelled, refusal_or_value
from tests.fuzz.configurations import Judge

SECTIONS = {cls.__name__: cls for cls in (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)}
BUILD = {
    "TransformerConfig": transformer_config,
    "OptimizerConfig": optimizer_config,
    "DistributedDataParallelConfig": ddp_config,
}
_TAKEN = {
    section: {
        *DERIVED[section],
        *(name for names in UNUSED[section].values() for name in names),
        *(name for refusal in REFUSALS if refusal.section == section for name in refusal.fields),
    }
    for section in SECTIONS
}
"""Fields that are refused, whatever their value or all but one."""


def change_megatron_sections(*, folder: Path, count: int) -> dict[str, dict[str, int]]:
    """Verdicts by who refuses: our checks of the file, Megatron's types and own checks, or nobody."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        judge, tally = Judge(folder, vocabulary()), Tally()
        original = judge.original(tree())

        def check(changed):
            verdict, config = judge.tree(changed, original=original)
            if config is None:
                tally.add("our checks", REFUSED)
                return
            refusal, _ = refusal_or_value(lambda: check_megatron_sections(config), names=[f"{judge.file}:"])
            if refusal is None:
                check_values(config)
            tally.add("megatron's types", REFUSED if refusal else verdict)

        for_each(changed_sections(), count, check)
        assert tally.counts["megatron's types"][SAME] or tally.counts["megatron's types"][CHANGED]
        return tally.plain()
    finally:
        os.chdir(before)


def check_values(config: Config) -> None:
    """What the file says stands in Megatron's own dataclasses."""
    sections = {"TransformerConfig": config.transformer, "OptimizerConfig": config.optimizer,
                "DistributedDataParallelConfig": config.ddp}  # fmt: skip
    for section, values in sections.items():
        built = BUILD[section](config)
        for name, value in values.items():
            found = getattr(built, name)
            expected = float(value) if type(value) is int and type(found) is float else value
            assert _plain(found) == expected or value is None, f"{section}.{name} = {value!r} became {found!r}"


def _plain(value: Any) -> Any:
    """A field of Megatron's as the file spells it."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if callable(value):
        return value.__name__
    return list(value) if isinstance(value, tuple) else value


@st.composite
def changed_sections(draw: st.DrawFn) -> dict[str, Any]:
    """The small valid tree with one or two fields set, to values of the field's type or of any other."""
    changed = tree()
    for _ in range(draw(st.integers(1, 3))):
        section = draw(
            st.sampled_from(["TransformerConfig"] * 3 + ["OptimizerConfig", "DistributedDataParallelConfig"])
        )
        hints = typing.get_type_hints(SECTIONS[section])
        names = [item.name for item in dataclasses.fields(SECTIONS[section]) if item.init]
        free = [item for item in names if item not in _TAKEN[section]]
        name = draw(st.sampled_from(free if draw(st.integers(0, 7)) else names))
        value = draw(fitting(hints[name]) if draw(st.integers(0, 4)) else st.sampled_from(ODD_VALUES))
        if not draw(st.integers(0, 15)):
            name = draw(misspelled(name))
        changed.setdefault(section, {})[name] = value
    return changed


def fitting(hint: Any) -> st.SearchStrategy[Any]:
    """Values, as a file spells them, of an annotation of Megatron's."""
    shape, arguments = typing.get_origin(hint), typing.get_args(hint)
    if shape in (types.UnionType, typing.Union):
        return st.one_of(*(fitting(item) for item in arguments))
    if shape is Literal:
        return st.sampled_from(arguments)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return st.sampled_from(list(hint.__members__))
    if hint is torch.dtype:
        return st.sampled_from(["float32", "bfloat16", "float16"])
    if shape in (list, tuple):
        return st.lists(fitting(arguments[0]), max_size=3)
    plain = {
        bool: st.booleans(),
        int: st.sampled_from([0, 1, 2, 4, 8, 16, 32, 48]),
        float: st.sampled_from([0.0, 1e-6, 0.1, 0.5, 0.9, 1.0, 2.0]),
        str: st.sampled_from(
            ["softmax", "sigmoid", "fp32", "full", "selective", "uniform", "adam", "alltoall", "none"]
        ),
        types.NoneType: st.none(),
    }
    return plain.get(hint, st.sampled_from(ODD_VALUES))
