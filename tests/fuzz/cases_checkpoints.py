"""Changed checkpoint folders, in a process with megatron-core; run by ``run_ranks`` on one rank.

Each change is made to the newer of two checkpoints. Loading has to end in one of three ways: as before the change;
in a refusal of the folder, in one sentence; or, where the run has an older checkpoint, in that one, with a sentence
about the newer.
"""

import copy
import io
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from symbiotic.model.partition import ExpertPartition, at_random
from symbiotic.training.checkpoint import manifest as manifests
from symbiotic.training.checkpoint.storage import CheckpointStore
from symbiotic.training.checkpoint.weights import COMMON_STATE_KEY, open_weights
from tests.config.trees import config
from tests.fuzz.changes import (
    CHANGED,
    ODD_VALUES,
    REFUSED,
    SAME,
    Tally,
    changed_bytes,
    changed_tree,
    check_sentence,
    for_each,
    refusal_or_value,
)

OLDER, NEWER = 4, 8
PARTITION = at_random({"understanding": 3, "generation": 1}, (0, 1), seed=1)
WORDS = [
    b"null",
    b"[" * 100_000,
    b"{",
    b"\xff",
    b"\x00",
    b"9" * 5000,
    b"&a [*a]",
    b"!!timestamp x",
    b"\n",
    b'"step": 4,',
]


def common(step: int) -> dict[str, Any]:
    """Common state with the kinds of values that a run's has."""
    return {
        "state": {"step": step, "skipped": 0, "labels": [1.0, 2.0, 3.0]},
        "callbacks": {"routing": {"counts": torch.arange(4)}},
        "data": {"next_sample": step * 16, "identity": ["text", "digits"]},
        "identity": {"stages": [{"name": "warm-up", "steps": 5}], "data": {"global_batch_size": 16}},
        "layout": {"ranks": 1, "tensor": 1},
    }


def state(step: int | None = None) -> dict[str, Any]:
    """A sharded state dict: a matrix, experts in parts, moments, an object; zeros to load into without a step."""

    def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if step is None:
            return torch.zeros(shape, dtype=dtype)
        return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape).add(step).to(dtype)

    experts = values(4, 2, 3)
    parts = {
        str(index): ShardedTensor.from_rank_offsets("experts.weight", experts[index : index + 1].clone(), (0, index, 4))
        for index in range(4)
    }
    return {
        "model": {
            "rows": ShardedTensor.from_rank_offsets("rows.weight", values(8, 3)),
            "half": ShardedTensor.from_rank_offsets("half.weight", values(6, dtype=torch.bfloat16)),
            "experts": parts,
        },
        "optimizer": {"exp_avg": ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.rows.weight", values(8, 3))},
        "rng": ShardedObject("rng_state", [{"seed": step}], (1,), (0,)),
    }


class Folder:
    """RUN/checkpoints with two checkpoints, that can be brought back after each change.

    Attributes:
        folder: RUN/checkpoints.
        newer: the checkpoint that changes are made to.
        files: name -> content of each of its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.newer = folder, folder / f"step-{NEWER}"
        store = CheckpointStore(folder)
        for step in (OLDER, NEWER):
            store.save(step, state(step), common=common(step), partition=PARTITION.to_dict(), config=config().to_dict())
        self._content = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.files = {path.name: path.read_bytes() for path in sorted(self.newer.iterdir())}
        self.older_files = {path.name: path.read_bytes() for path in sorted((folder / f"step-{OLDER}").iterdir())}

    def restore(self) -> None:
        """Put everything back as it was saved."""
        shutil.rmtree(self.folder)
        for name, content in self._content.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(content)

    def write_manifest(self, manifest: Any) -> None:
        """Another manifest, with a marker that fits."""
        text = json.dumps(manifest).encode(errors="surrogatepass")
        (self.newer / manifests.MANIFEST_FILE).write_bytes(text)
        _mark(self.newer)

    def metadata(self) -> Metadata:
        """The index as it was saved."""
        return pickle.loads(self.files[".metadata"])


def change_checkpoints(*, folder: Path, count: int) -> dict[str, dict[str, int]]:
    """Verdicts by kind of change."""
    logging.getLogger("symbiotic").setLevel(logging.ERROR)
    checkpoints, tally = Folder(folder), Tally()
    before = loaded_values(folder)

    def check(change: tuple[str, bool, Callable[[Folder], None]]) -> None:
        kind, sealed, apply = change
        checkpoints.restore()
        apply(checkpoints)
        tally.add(kind, verdict(checkpoints, before=before, sealed=sealed))

    try:
        for_each(damage(checkpoints) | forgeries(checkpoints), count, check)
    finally:
        checkpoints.restore()
    return tally.plain()


def verdict(checkpoints: Folder, *, before: dict[str, Any], sealed: bool) -> str:
    """What loading makes of the folder: by the run, and tensor by tensor."""
    names = [str(checkpoints.folder)]
    store = CheckpointStore(checkpoints.folder)
    refusal, loaded = refusal_or_value(lambda: loaded_values(checkpoints.folder, store), names=names)
    for fallback in store.fallbacks:
        check_sentence(fallback.problem, names=names)
    passed_over = any(fallback.step == NEWER for fallback in store.fallbacks)
    refused = bool(refusal) or passed_over
    if not sealed and loaded is not None:
        assert loaded["common"]["state"]["step"] == (OLDER if passed_over else NEWER)
        assert passed_over or same(loaded, before)
    refusal, weights = refusal_or_value(lambda: opened_values(checkpoints.newer), names=names)
    if weights is not None:
        for name in ("common", "partition", "config"):
            assert isinstance(weights[name], dict), f"{name} is {weights[name]!r}"
        for key in ("rows.weight", "half.weight", "experts.weight"):
            assert key not in weights or weights[key].shape == before[key].shape
            assert key not in weights or weights[key].dtype == before[key].dtype
        assert sealed or (same(weights, before) and not refused), "read tensor by tensor, but refused by the run"
    if refused or refusal:
        return REFUSED
    return SAME if same(loaded, before) and same(weights, before) else CHANGED


def loaded_values(folder: Path, store: CheckpointStore | None = None) -> dict[str, Any]:
    """The newest checkpoint as a run loads it, as name -> value."""
    store = store or CheckpointStore(folder)
    step = store.newest_complete()
    assert step is not None
    loaded = store.load(state(), step)
    model = loaded["model"]
    return {
        "rows.weight": model["rows"],
        "half.weight": model["half"],
        "experts.weight": torch.cat(list(model["experts"].values())),
        "moments": loaded["optimizer"]["exp_avg"],
        "rng": loaded["rng"],
        "common": loaded.get("common"),
    }


def opened_values(folder: Path) -> dict[str, Any]:
    """The same checkpoint as the tools read it."""
    weights = open_weights(folder, verify="full")
    values: dict[str, Any] = {key: weights.read(key) for key in weights.keys()}  # noqa: SIM118 (no mapping)
    values |= {"common": weights.common(), "partition": weights.partition(), "config": weights.config()}
    ExpertPartition.from_dict(weights.partition(), source=str(folder / "partition.json"))
    assert weights.provenance() is None or isinstance(weights.provenance(), dict)
    assert isinstance(weights.step, int) and isinstance(weights.kind, str)
    return values


def same(found: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether all that both sides have is equal."""
    shared = found.keys() & before.keys()
    return len(shared) >= 4 and all(_bytes(found[key]) == _bytes(before[key]) for key in shared)


def _bytes(value: Any) -> bytes:
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


Change = tuple[str, bool, Callable[[Folder], None]]


OTHER_DAMAGE = ["deleted", "added", "renamed", "older file", "exchanged", "older folder", "no file", "tracker"]
FORGERIES = ["manifest", "file", "file", "configuration", "partition", "index", "index", "common", "code"]


@st.composite
def damage(draw: st.DrawFn, checkpoints: Folder) -> Change:
    """What disks, copies and people do: the digests stay as they were."""
    names = sorted(checkpoints.files)
    name, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    kind = draw(st.sampled_from(["bytes"] * 8 + OTHER_DAMAGE))
    if kind == "bytes":
        how, content = draw(changed_bytes(checkpoints.files[name]))
        return f"bytes {how}", False, lambda all: (all.newer / name).write_bytes(content)
    if kind == "deleted":
        return kind, False, lambda all: (all.newer / name).unlink()
    if kind == "added":
        extra = draw(st.sampled_from(["x", "__1_0.distcp", ".hidden", "complete.tmp", "größe", "common.pt", "0"]))
        return kind, False, lambda all: (all.newer / extra).write_bytes(b"x")
    if kind == "renamed":
        return kind, False, lambda all: (all.newer / name).rename(all.newer / f"{name}.old")
    if kind == "older file":
        return kind, False, lambda all: (all.newer / name).write_bytes(all.older_files[name])
    if kind == "exchanged":
        return kind, False, lambda all: _exchange(all.newer / name, all.newer / other)
    if kind == "older folder":
        return kind, False, _older_folder
    if kind == "no file":
        make = draw(st.sampled_from([Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path.name)]))
        return kind, False, lambda all: ((all.newer / name).unlink(), make(all.newer / name))
    text = draw(st.sampled_from([b"", b"step-4\n", b"step-9", b"\xff", b"../step-8", b"step-" + b"9" * 5000, b"a\nb"]))
    return kind, False, lambda all: (all.folder / "latest").write_bytes(text)


def _exchange(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def _older_folder(checkpoints: Folder) -> None:
    """The older checkpoint under the name of the newer one."""
    shutil.rmtree(checkpoints.newer)
    shutil.copytree(checkpoints.folder / f"step-{OLDER}", checkpoints.newer)


@st.composite
def forgeries(draw: st.DrawFn, checkpoints: Folder) -> Change:
    """What a wrong or hostile writer does: digests and marker fit."""
    kind = draw(st.sampled_from(FORGERIES))
    if kind == "manifest":
        how, tree = draw(changed_tree(json.loads(checkpoints.files[manifests.MANIFEST_FILE])))
        return f"sealed {kind} {how}", True, lambda all: all.write_manifest(tree)
    if kind == "file":
        names = [name for name in checkpoints.files if name not in (manifests.MANIFEST_FILE, manifests.MARKER_FILE)]
        name = draw(st.sampled_from(names))
        how, content = draw(changed_bytes(checkpoints.files[name], words=WORDS))
        return f"sealed {name} {how}", True, lambda all: _write_sealed(all, name, content)
    if kind in ("configuration", "partition"):
        name = "config.yaml" if kind == "configuration" else "partition.json"
        tree = yaml.safe_load(checkpoints.files[name])
        how, tree = draw(changed_tree(tree) | st.tuples(st.just("whole"), st.sampled_from(ODD_VALUES)))
        text = json.dumps(tree) if kind == "partition" else yaml.safe_dump(tree, sort_keys=False)
        return f"sealed {kind}", True, lambda all: _write_sealed(all, name, text.encode(errors="surrogatepass"))
    if kind == "index":
        metadata = draw(changed_index(checkpoints.metadata()))
        return f"sealed {kind}", True, lambda all: _write_sealed(all, ".metadata", pickle.dumps(metadata))
    if kind == "common":
        wrapped = [{"common": common(NEWER)}]
        plain = copy.deepcopy(wrapped)
        plain[0]["common"]["callbacks"] = {}
        how, tree = draw(changed_tree(plain))
        return f"sealed {kind} {how}", True, lambda all: _replace_sealed(all, COMMON_STATE_KEY, tree)
    key = draw(st.sampled_from([COMMON_STATE_KEY, "rng_state/shard_0_1", "index"]))
    hostile = Hostile(checkpoints.folder.parent / "trace")
    if key == "index":
        return f"sealed {kind}", True, lambda all: _write_sealed(all, ".metadata", pickle.dumps(hostile))
    return f"sealed {kind}", True, lambda all: _replace_sealed(all, key, [hostile])


class Hostile:
    """When unpickled, leaves a file behind: stands for any code."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def _write_sealed(checkpoints: Folder, name: str, content: bytes) -> None:
    (checkpoints.newer / name).write_bytes(content)
    seal(checkpoints.newer, step=NEWER)


def _replace_sealed(checkpoints: Folder, key: str, value: Any) -> None:
    replace_item(checkpoints.newer, checkpoints.metadata(), key, value)
    seal(checkpoints.newer, step=NEWER)


def replace_item(checkpoint: Path, metadata: Metadata, key: str, value: Any) -> None:
    """Put another object in the place of an item, at the end of its file."""
    data, index = io.BytesIO(), MetadataIndex(key)
    torch.save(value, data)
    path = checkpoint / metadata.storage_data[index].relative_path
    metadata.storage_data[index] = _StorageInfo(path.name, path.stat().st_size, len(data.getvalue()))
    path.write_bytes(path.read_bytes() + data.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def _item(files: dict[str, bytes], metadata: Metadata, key: str) -> bytes:
    place = metadata.storage_data[MetadataIndex(key)]
    return files[place.relative_path][place.offset : place.offset + place.length]


def seal(checkpoint: Path, *, step: int) -> None:
    """Make digests and marker fit what stands in the folder."""
    manifests.write_manifest(checkpoint, manifests.digest_files(checkpoint), kind="training", step=step)
    _mark(checkpoint)


def _mark(checkpoint: Path) -> None:
    digest = manifests.sha256_of(checkpoint / manifests.MANIFEST_FILE)
    (checkpoint / manifests.MARKER_FILE).write_text(digest + "\n")


NUMBERS = [-1, 0, 1, 2, 3, 8, 100, 2**31, 2**62, 10**30, 0.5, None, "1", True]


@st.composite
def changed_index(draw: st.DrawFn, metadata: Metadata) -> Metadata:
    """The index with one entry, place, shape, dtype or type changed."""
    entries, places = metadata.state_dict_metadata, metadata.storage_data
    tensors = [key for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)]
    entry = entries[draw(st.sampled_from(tensors))]
    index, second = draw(st.sampled_from(list(places))), draw(st.sampled_from(list(places)))
    chunk, number = draw(st.sampled_from(entry.chunks)), draw(st.sampled_from(NUMBERS))
    kind = draw(
        st.sampled_from(["size", "offsets", "sizes", "dtype", "place", "same place", "chunks", "entries", "types"])
    )
    if kind == "size":
        entry.size = draw(
            st.sampled_from([torch.Size(()), torch.Size([2**40] * 2), [number], number, torch.Size([8, 4])])
        )
    elif kind in ("offsets", "sizes"):
        axis = draw(st.integers(0, len(chunk.offsets) - 1))
        changed = [number if position == axis else size for position, size in enumerate(getattr(chunk, kind))]
        setattr(chunk, kind, draw(st.sampled_from([tuple(changed), changed[:1], number])))
    elif kind == "dtype":
        others = [torch.float64, torch.bfloat16, torch.int8, torch.complex64, torch.quint8, "float32", None]
        entry.properties.dtype = draw(st.sampled_from(others))
    elif kind == "place":
        field = draw(st.sampled_from(["relative_path", "offset", "length"]))
        values = [number, "../x", "/etc/passwd", "", ".", "..", "a\0b", ".metadata", "x" * 5000, "complete"]
        places[index] = _StorageInfo(**{**vars(places[index]), field: draw(st.sampled_from(values))})
    elif kind == "same place":
        places[index] = places[second]
    elif kind == "chunks":
        entry.chunks = draw(
            st.sampled_from([[], entry.chunks[:-1], entry.chunks * 2, None, [None], entry.chunks[:1] * 3])
        )
    elif kind == "entries":
        table = draw(st.sampled_from([entries, places]))
        key = draw(st.sampled_from(list(table)))
        value = table.pop(key)
        if draw(st.booleans()):
            table[draw(st.sampled_from([3, None, "other", (1, 2)]))] = value
    else:
        name = draw(st.sampled_from(["state_dict_metadata", "storage_data", "storage_meta", "planner_data"]))
        setattr(metadata, name, draw(st.sampled_from([None, 3, [], {}, {"a": 1}, {None: None}])))
    return metadata


def change_state_of_a_run(*, file: str, count: int) -> dict[str, dict[str, int]]:
    """Verdicts on a run's checkpoint whose common state was changed, with digests that fit, as the run resumes it."""
    from tests.training.cases import trainer_of

    logging.getLogger("symbiotic").setLevel(logging.ERROR)
    tally = Tally()
    with trainer_of(file, ["training.steps=2", "checkpoint.interval=2"]) as trainer:
        trainer.fit()
        store = trainer._checkpoints.store
        [step] = store.steps()
        checkpoint = store.path(step)
        files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
        metadata = pickle.loads(files[".metadata"])
        [whole] = torch.load(io.BytesIO(_item(files, metadata, COMMON_STATE_KEY)), weights_only=True)

        def check(change: tuple[str, dict[str, Any]]) -> None:
            kind, changed = change
            for name, content in files.items():
                (checkpoint / name).write_bytes(content)
            replace_item(checkpoint, copy.deepcopy(metadata), COMMON_STATE_KEY, [changed])
            seal(checkpoint, step=step)
            refusal, _ = refusal_or_value(lambda: trainer.resume(step), names=[str(checkpoint), "data order"])
            tally.add(kind, REFUSED if refusal else SAME)
            if refusal is None:
                assert trainer.state.step == step
                assert changed["common"]["identity"]["stages"] == whole["common"]["identity"]["stages"]
                assert changed["optimizer"].keys() >= {"step", "adam", "groups"}

        for_each(changed_tree(whole), count, check)
    return tally.plain()
