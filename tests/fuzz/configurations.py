"""Configurations to change, and the verdict on what loading makes of a changed one."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from symbiotic.config import Config, load_config, save_config
from symbiotic.config.plan import plan
from symbiotic.config.schema import YAML_NAMES, section_names
from symbiotic.config.yaml_tree import dump_yaml
from symbiotic.model.partition import by_index
from symbiotic.tokens.vocabulary import VocabularyLayout
from tests.config.trees import tree, vocabulary
from tests.fuzz.changes import CHANGED, REFUSED, SAME, refusal_or_value, time_limit
from tests.support.repository import ROOT

DIGITS = ROOT / "examples" / "digits"
SUFFIXES = (".bin", ".idx", ".manifest.json")


def digits_trees() -> dict[str, dict[str, Any]]:
    """The trees of the digits recipe's files, read by PyYAML itself."""
    return {name: yaml.safe_load((DIGITS / f"{name}.yaml").read_text()) for name in ("base", "generation")}


def whole_trees() -> list[dict[str, Any]]:
    """Valid configurations without ``extends``: a small one, and one that uses every section."""
    return [tree(), _rich_tree()]


def _rich_tree() -> dict[str, Any]:
    return tree(
        **{
            "run.seed": 7,
            "model.dense_blocks": ...,
            "model.blocks": ...,
            "model.layer_pattern": "*-*E*E*E",
            "model.tie_embeddings": False,
            "groups.generation": {"experts": 4, "own": ["attention"], "own_start": "copy_from:understanding"},
            "routers": {
                "reading": {"types": ["text", "understanding_code"], "group": "understanding"},
                "drawing": {"types": ["generation_code"], "group": "generation"},
            },
            "partition": {"method": "random", "seed": 3},
            "balance": {"norm": "hunyuan", "orthogonality": 1e-4},
            "shield": {"targets": {"shared_expert": "weights", "norm": "weights"}},
            "data.packing": "concatenate",
            "schedule": {"warmup_steps": 3, "decay": "cosine", "decay_steps": 12, "final_factor": 0.05},
            "stages.1": {
                "name": "release",
                "steps": 7,
                "shield": {"generation_code": {"from": 0, "to": 0.1, "steps": 4}},
                "rate_factors": {"router.*": 0.5},
                "loss_weights": {"generation": 2},
                "mixture": {"text": 1, "digits": 3},
                "frozen": ["norm"],
            },
            "maop": {"roles": ["shared_expert"]},
            "checkpoint": {"interval": 4, "keep": 3, "keep_every": 8, "verify": "sizes"},
            "logging": {"interval": 1, "tensorboard": False},
            "routing_metrics": {"interval": 2},
            "diagnostics": {"interval": 6, "gradients": False},
            "training.evaluation_interval": 4,
            "TransformerConfig.tensor_model_parallel_size": 2,
            "TransformerConfig.sequence_parallel": True,
            "TransformerConfig.expert_model_parallel_size": 2,
            "TransformerConfig.pipeline_model_parallel_size": 2,
            "OptimizerConfig": {"clip_grad": 1.0, "adam_beta2": 0.95},
            "DistributedDataParallelConfig": {"use_distributed_optimizer": True, "overlap_grad_reduce": True},
        }
    )


def make_corpora(folder: Path) -> None:
    """The files that the valid configurations name: a vocabulary, and shards that are there but never opened."""
    layout = vocabulary()
    for place in (folder, folder / "runs" / "digits" / "corpus"):
        (place / "shards").mkdir(parents=True)
        layout.save(place / "vocabulary.json")
        names = ["text", "digits", "held-out"]
        names += [
            f"{name}_{part}" for name in ("text", "understanding", "generation") for part in ("train", "validation")
        ]
        for name in names:
            for suffix in SUFFIXES:
                (place / "shards" / f"{name}{suffix}").touch()
    (folder / "runs" / "digits" / "split").mkdir()
    by_index({"understanding": 12, "generation": 4}, range(4)).save(folder / "runs/digits/split/partition.json")


class Judge:
    """Loads changed configurations in a folder that :func:`make_corpora` filled and that is the working directory."""

    def __init__(self, folder: Path, layout: VocabularyLayout) -> None:
        self.file, self.saved = folder / "changed.yaml", folder / "saved.yaml"
        self._layout = layout

    def original(self, given: dict[str, Any]) -> Config:
        """The configuration of a tree before it is changed."""
        self.file.write_text(dump_yaml(given), encoding="utf-8")
        return self.load()

    def tree(
        self,
        given: dict[str, Any],
        *,
        original: Config,
        expected: dict[str, Any] | None = None,
        names: Sequence[str] = (),
    ) -> tuple[str, Config | None]:
        """What became of a changed tree, written as a file; ``expected`` is what it means together with other files."""
        # A half of a surrogate pair has no UTF-8: such a file is one in a wrong encoding.
        self.file.write_text(dump_yaml(given), encoding="utf-8", errors="surrogatepass")
        return self.verdict(given if expected is None else expected, original=original, names=names)

    def load(self, overrides: Sequence[str] = ()) -> Config:
        """The configuration in :attr:`file`."""
        return load_config(self.file, overrides)

    def verdict(
        self,
        given: dict[str, Any] | None,
        *,
        original: Config,
        overrides: Sequence[str] = (),
        names: Sequence[str] = (),
    ) -> tuple[str, Config | None]:
        """What became of the file, which says ``given``: refused in one sentence, or loaded with all it says.

        Args:
            given: what the file says, as somebody else reads it; None where nobody else can.
            original: the configuration before the change.
            overrides: settings of the command line.
            names: further files that a refusal may name.
        """
        names = [f"{self.file}: ", f"{self.file}:", "command line:", *names]
        message, config = refusal_or_value(lambda: self.load(overrides), names=names)
        if config is None:
            assert any(message.startswith(name) for name in names), message
            return REFUSED, None
        with time_limit():
            resolved = config.to_dict()
            for path, value in leaves(given or {}):
                found = look_up(resolved, path)
                assert stands(value, found, path), f"{'.'.join(path)} = {value!r} became {found!r}"
            save_config(config, self.saved)
            again = load_config(self.saved)
            assert again == config
            assert again.to_dict() == resolved
        planned, _ = refusal_or_value(
            lambda: str(plan(config, vocabulary=self._layout)), names=[*names, "partition.json"]
        )
        if planned:
            return REFUSED, None
        return (SAME if config == original else CHANGED), config


def leaves(given: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(key path, value) of everything in a tree that isn't a table or list with content."""
    if isinstance(given, dict | list) and given:
        items = given.items() if isinstance(given, dict) else enumerate(given)
        for key, value in items:
            yield from leaves(value, (*path, str(key)))
    elif path:
        yield path, given


class Absent:
    """Stands for a key that isn't there."""


def look_up(resolved: Any, path: tuple[str, ...]) -> Any:
    """The value at a key path; an element of a list is named by its index."""
    for key in path:
        if isinstance(resolved, list) and key.isdigit() and int(key) < len(resolved):
            resolved = resolved[int(key)]
        elif isinstance(resolved, dict) and key in resolved:
            resolved = resolved[key]
        else:
            return Absent
    return resolved


def stands(given: Any, found: Any, path: tuple[str, ...]) -> bool:
    """Whether ``found`` is what somebody who wrote ``given`` meant."""
    if given is None:
        # Nothing written: the default of a section, an empty list or table, or lengths that follow from others.
        named = len(path) == 2 and path[0] in ("groups", "routers", "rates")
        return (
            found is None or found in ([], {}) or len(path) == 1 or path[-1] == "steps" or (named and found is Absent)
        )
    if given == {}:
        return isinstance(found, dict)
    if isinstance(given, bool) or isinstance(found, bool):
        return given is found
    if isinstance(given, int | float) and isinstance(found, int | float):
        return given == found or (isinstance(found, float) and float(given) == found)
    if isinstance(given, str) and isinstance(found, float):
        return "e" in given.lower() and float(given) == found  # what PyYAML reads as a text: 1e-4
    if isinstance(found, str) and not isinstance(given, str):
        return yaml.safe_load(found) == given  # what PyYAML reads as a number: 010 and 1:30
    return given == found


def merged(base: Any, child: Any) -> Any:
    """A tree over the one it extends, as the documentation says: tables key by key, everything else replaces."""
    if not (isinstance(base, dict) and isinstance(child, dict)):
        return child
    result = {**base, **{key: merged(base.get(key), value) for key, value in child.items() if key != "extends"}}
    result.pop("extends", None)
    for key, value in base.items():
        # An empty section changes nothing.
        if key in child and child[key] is None and isinstance(value, dict | list):
            result[key] = value
    return result


def look_up_named(resolved: dict[str, Any], key: str) -> Any:
    """The value that an override's key means: elements of lists by index or name, keys with dots."""
    found: Any = resolved
    parts = key.strip().split(".")
    while parts:
        if isinstance(found, dict) and ".".join(parts) in found:
            return found[".".join(parts)]
        if isinstance(found, dict) and parts[0] in found:
            found = found[parts[0]]
        elif isinstance(found, list):
            named = [item for item in found if isinstance(item, dict) and item.get("name") == parts[0]]
            found = named[0] if named else found[int(parts[0])]
        else:
            return Absent
        parts = parts[1:]
    return found


SIZES = st.sampled_from([1, 1, 1, 2, 2, 3, 4, 8, 16])
FACTORS = st.sampled_from([0.0, 0.1, 0.5, 1, 2.5])
ROLES = ["*", "attention", "norm", "expert.*", "expert.generation", "router.*", "shared_expert", "head", "embedding"]
TYPES = ["text", "generation_code", "understanding_code", "generation_latent", "condition_latent"]
RAMPS = st.fixed_dictionaries({"from": FACTORS, "to": FACTORS}, optional={"steps": st.integers(2, 12)})
SHIELDS = st.dictionaries(st.sampled_from(TYPES), FACTORS | RAMPS, max_size=2)
STAGES = st.fixed_dictionaries(
    {"name": st.sampled_from(["a", "b", "c"])},
    optional={
        "steps": st.integers(1, 9) | st.none(),
        "shield": SHIELDS,
        "rate_factors": st.dictionaries(st.sampled_from(ROLES), FACTORS, max_size=2),
        "frozen": st.lists(st.sampled_from(ROLES), max_size=2),
        "mixture": st.dictionaries(st.sampled_from(["text", "digits"]), FACTORS, max_size=2),
        "loss_weights": st.dictionaries(st.sampled_from(["text", "understanding", "generation"]), FACTORS, max_size=3),
    },
)
LAYOUT = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size", "expert_tensor_parallel_size", "context_parallel_size",
    "microbatch_group_size_per_vp_stage", "num_query_groups", "moe_router_topk", "recompute_num_layers",
)  # fmt: skip
FLAGS = ("sequence_parallel", "qk_layernorm", "moe_router_pre_softmax", "moe_shared_expert_gate", "bf16")


@st.composite
def combinations(draw: st.DrawFn, given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(what is combined, the tree with several settings of the right types)."""
    tree = copy.deepcopy(given)
    kind = draw(st.sampled_from(["layout", "stages", "groups", "length"]))
    if kind == "layout":
        for name in draw(st.lists(st.sampled_from(LAYOUT), min_size=1, max_size=4)):
            tree["TransformerConfig"][name] = draw(SIZES)
        for name in draw(st.lists(st.sampled_from(FLAGS), max_size=2)):
            tree["TransformerConfig"][name] = draw(st.booleans())
        if draw(st.booleans()):
            tensor = tree["TransformerConfig"].get("tensor_model_parallel_size", 1)
            tree["TransformerConfig"]["sequence_parallel"] = tensor > 1
        tree["model"]["blocks"] = draw(st.sampled_from([2, 4, 8, 48]))
    elif kind == "stages":
        tree["stages"] = draw(st.lists(STAGES, max_size=3))
        tree["training"]["steps"] = draw(st.none() | st.integers(1, 20))
        tree["rates"] = {"*": 1e-4, **draw(st.dictionaries(st.sampled_from(ROLES), FACTORS, max_size=3))}
    elif kind == "groups":
        names = draw(st.lists(st.sampled_from(["understanding", "generation", "third"]), min_size=1, unique=True))
        parts = st.lists(st.sampled_from(["attention", "norm", "mlp"]), max_size=2)
        sizes = st.fixed_dictionaries({"experts": st.integers(1, 16)}, optional={"own": parts})
        tree["groups"] = {name: draw(sizes) for name in names}
        routers = {
            f"r_{name}": {"types": draw(st.lists(st.sampled_from(TYPES), max_size=2)), "group": name} for name in names
        }
        if draw(st.booleans()):
            tree["routers"] = routers
        tree["rates"] = {"*": 1e-4}
        tree["shield"] = {"targets": draw(st.dictionaries(st.sampled_from(["attention", "norm"]), st.just("output")))}
    else:
        tree["schedule"] = {
            "warmup_steps": draw(st.integers(0, 15)),
            "decay": draw(st.sampled_from(["constant", "linear"])),
        }
        tree["training"] |= {"micro_batch_size": draw(SIZES), "global_batch_size": draw(SIZES)}
        tree["training"]["evaluation_interval"] = draw(st.none() | SIZES)
        tree["checkpoint"] = {"interval": draw(st.none() | SIZES), "keep_every": draw(st.none() | SIZES)}
    return kind, tree


SECTIONS = tuple(section_names())
MEGATRON_SECTIONS = tuple(YAML_NAMES.values())
