"""From a Hugging Face folder or a checkpoint of Megatron's to a checkpoint to train on.

    import_folder(ImportRequest(source="Qwen1.5-MoE", output="imported", codebook_size=8192, resolutions=((16, 16),)))

One process, no process group, a few tensors at a time. The folder is a full export of ours, a stock architecture of
``stock``, or a checkpoint of Megatron's. The output looks like a run: weights, partition and configuration in
``checkpoints/step-0``, beside them the vocabulary and ``model.yaml``, which a training configuration extends. Training
starts at step 0 with a fresh optimizer.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from symbiotic.config import Config, config_from_tree, layer_pattern, load_config
from symbiotic.config.yaml_tree import dump_yaml
from symbiotic.errors import CheckpointError, ConfigError
from symbiotic.files import sha256_of, write_text
from symbiotic.huggingface.architecture import SETTINGS, huggingface_config, training_tree
from symbiotic.huggingface.export import CODEC_FOLDER, TRAINING_FOLDER
from symbiotic.huggingface.folder_names import check_folder
from symbiotic.huggingface.homes import SYMBIOTIC, Home
from symbiotic.huggingface.mapping import Row, mapping_table
from symbiotic.huggingface.megatron_folder import MegatronFolder, is_megatron_folder
from symbiotic.huggingface.modeling.configuration_symbiotic import SymbioticConfig
from symbiotic.huggingface.ordered_threads import DEFAULT_WORKERS, in_order
from symbiotic.huggingface.output_folder import check_output, copy_file, written_at_once
from symbiotic.huggingface.safetensors_reader import SafetensorsFolder, read_json
from symbiotic.huggingface.stock import model_type_of, read_stock
from symbiotic.huggingface.vocabulary_rows import VOCABULARY_KEYS, extend_vocabulary, source_rows
from symbiotic.model.expert_start import NormalStart, SharedExpert, upcycle_dense
from symbiotic.model.partition import ExpertPartition, by_index
from symbiotic.model.routing import RoutingTable
from symbiotic.model.split import split_routers
from symbiotic.tokens.vocabulary import DEFAULT_MULTIPLE, VocabularyLayout
from symbiotic.training.checkpoint.manifest import MANIFEST_FILE
from symbiotic.training.checkpoint.weights import WeightsWriter

log = logging.getLogger(__name__)

DEFAULT_SEQUENCE_LENGTH = 4096
DEFAULT_TOPK = 2
LAID_OUT_HERE = ("codebook_size", "resolutions", "multiple")
"""Settings of a vocabulary that the import lays out itself."""
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
ROUTER_KEY = re.compile(r"(decoder\.layers\.\d+\.mlp\.)router\.weight")


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """What to import and how the parts that the folder lacks start.

    Attributes:
        source: the folder.
        output: a folder that doesn't exist yet.
        config: for a checkpoint of Megatron's: the configuration file that describes its model, with one group.
        vocabulary: layout file; None takes that of our own export, or lays one out around a stock model's ids.
        codebook_size, resolutions, multiple: images of a vocabulary that is laid out here, see VocabularyLayout.build;
            None takes no images and its default.
        groups: group -> experts, the first group taking the first expert numbers; empty for one group.
        shared_expert: size of a shared expert to add, whose output starts at zero.
        upcycle: experts of each block that a dense model's MLPs become.
        topk: experts a token chooses of them; None takes 2.
        sequence_length: tokens in a sample; None takes the model's context, at most 4096 of a stock model's.
        bos, eod: for a checkpoint of Megatron's: its tokenizer's ids of begin of text and end of document, whose rows
            ours take; None draws them.
        seed: of everything that is drawn.
        workers: threads that read tensors; the checkpoint doesn't depend on their number.
    """

    source: Path
    output: Path
    config: Path | None = None
    vocabulary: Path | None = None
    codebook_size: int | None = None
    resolutions: Sequence[tuple[int, int]] = ()
    multiple: int | None = None
    groups: Mapping[str, int] = field(default_factory=dict)
    shared_expert: int | None = None
    upcycle: int | None = None
    topk: int | None = None
    sequence_length: int | None = None
    bos: int | None = None
    eod: int | None = None
    seed: int = 0
    workers: int = DEFAULT_WORKERS


def import_folder(request: ImportRequest) -> Path:
    """Write the checkpoint.

    Returns:
        The output folder.

    Raises:
        CheckpointError, ConfigError, DataError: nothing was written; a tensor that is missing, left over, misshaped
            or corrupted is named.
    """
    check_output(request.output, source=request.source)
    incoming = _open_megatron(request) if is_megatron_folder(request.source) else _open_huggingface(request)
    config, partition = incoming.config, incoming.partition
    origin = _origin(request.source)
    with written_at_once(request.output) as folder:
        incoming.layout.save(folder / "vocabulary.json")
        _copy_companions(request.source, folder)
        write_text(folder / "model.yaml", _model_yaml(config, request.output))
        with WeightsWriter(
            _made(folder / "checkpoints") / "step-0",
            common={},
            partition=partition.to_dict(),
            config=config.to_dict(),
            provenance={"source": str(request.source), "architecture": incoming.kind, "seed": request.seed} | origin,
        ) as writer:
            stream = _stream(incoming, request)
            routing = RoutingTable.build(
                list(config.groups), {name: (router.types, router.group) for name, router in config.routers.items()}
            )
            if request.groups:
                stream = split_routers(stream, partition=partition, routing=routing, source=str(request.source))
            for key, tensor in stream:
                writer.add(key, tensor)
            experts = [row for row in incoming.rows if row.expert is not None]
            for row, part in zip(experts, in_order(incoming.read, experts, workers=request.workers), strict=True):
                offsets = (row.expert,) + (0,) * part.dim()
                writer.add_part(row.megatron, part.unsqueeze(0), shape=row.stored_shape, offsets=offsets)
    log.info("%s: imported %s (%d rows of the table)", request.output, request.source, len(incoming.rows))
    return request.output


@dataclass(frozen=True, kw_only=True)
class _Incoming:
    """An opened source.

    Attributes:
        kind: its model type, or ``megatron``.
        model: the model as it is stored.
        rows: its mapping table.
        read: a row -> the checkpoint's tensor, or its expert's part of it.
        layout: the vocabulary of the checkpoint.
        extended: whether the stored rows of the vocabulary are those of another layout.
        config, partition: of the checkpoint.
    """

    kind: str
    model: SymbioticConfig
    rows: list[Row]
    read: Callable[[Row], Tensor]
    layout: VocabularyLayout
    extended: bool
    config: Config
    partition: ExpertPartition


def _open_huggingface(request: ImportRequest) -> _Incoming:
    if request.config is not None:
        raise ConfigError(f"--config is for Megatron's checkpoints; {request.source} has its own config.json")
    _refuse_without_use(request, ("bos", "eod"), f"is for Megatron's checkpoints; {request.source} names its own ids")
    home, model = _read_model(request)
    tensors = SafetensorsFolder(request.source)
    rows = mapping_table(model, home)
    check_folder(rows, tensors, model)
    layout = _vocabulary(request, home, model)
    target = _target_model(request, model, layout)
    config, partition = _configuration(request, home, target)
    return _Incoming(
        kind=home.model_type,
        model=model,
        rows=rows,
        read=lambda row: row.to_megatron(tensors, source=str(request.source)),
        layout=layout,
        extended=home is not SYMBIOTIC,
        config=config,
        partition=partition,
    )


def _open_megatron(request: ImportRequest) -> _Incoming:
    """A checkpoint of Megatron's; its sizes and vocabulary stand in the configuration that the user gives."""
    if (request.source / MANIFEST_FILE).is_file():
        raise ConfigError(f"{request.source} is a checkpoint of ours; training loads it with checkpoint.load as it is")
    if request.config is None:
        raise ConfigError(f"{request.source} is a Megatron checkpoint; describe its model with --config FILE")
    _refuse_without_use(
        request,
        ("vocabulary", "upcycle", "topk", "sequence_length", *LAID_OUT_HERE),
        f"is for Hugging Face folders; a Megatron checkpoint's model is described in {request.config}",
    )
    described = load_config(request.config, check_files=False)
    if len(described.groups) != 1:
        raise ConfigError(f"{request.config}: groups names {len(described.groups)}, a Megatron checkpoint has one")
    layout = VocabularyLayout.load(described.model.vocabulary)
    folder = MegatronFolder(request.source)
    one = by_index(
        {name: group.experts for name, group in described.groups.items()}, layer_pattern(described).moe_blocks
    )
    stored = huggingface_config(described, vocabulary=layout, partition=one, dtype="float32")
    num_ids = folder.shape(VOCABULARY_KEYS[0])[0]
    if layout.text_size > num_ids:
        raise CheckpointError(
            f"{described.model.vocabulary} has {layout.text_size} text pieces, {request.source} only {num_ids} ids"
        )
    for name, number in (("bos", request.bos), ("eod", request.eod)):
        if number is not None and not 0 <= number < num_ids:
            raise ConfigError(f"--{name} {number}: {request.source} has the ids 0 to {num_ids - 1}")
    model = _changed(stored, vocab_size=num_ids, bos_token_id=request.bos, eos_token_id=request.eod)
    rows = mapping_table(model)
    folder.check(rows)
    target = _target_model(request, model, layout)
    tree = described.to_dict()
    tree["model"]["vocabulary"] = str(request.output / "vocabulary.json")
    tree["run"]["folder"] = str(request.output)
    if request.shared_expert:
        tree["TransformerConfig"]["moe_shared_expert_intermediate_size"] = request.shared_expert
    config, partition = _grouped(request, tree, target)
    return _Incoming(
        kind="megatron",
        model=model,
        rows=rows,
        read=folder.read,
        layout=layout,
        extended=True,
        config=config,
        partition=partition,
    )


def _refuse_without_use(request: ImportRequest, names: Sequence[str], reason: str) -> None:
    """Refuse options that would do nothing (ConfigError)."""
    given = [name for name in names if getattr(request, name) not in (None, (), [], {})]
    if given:
        option = {"resolutions": "resolution"}.get(given[0], given[0]).replace("_", "-")
        raise ConfigError(f"--{option} {reason}")


def _read_model(request: ImportRequest) -> tuple[Home, SymbioticConfig]:
    """The folder's home and model.

    Raises:
        CheckpointError: it is none that we can read.
        ConfigError: an option has no use for it, or one that it needs is missing.
    """
    if model_type_of(request.source) != SYMBIOTIC.model_type:
        home, model = read_stock(request.source)
        if not model.num_experts and request.upcycle is None:
            raise ConfigError(
                f"{request.source} is a dense model, and training needs experts; give --upcycle EXPERTS to make every "
                "MLP a mixture of copies of it"
            )
        if request.upcycle is None:
            _refuse_without_use(
                request, ("topk",), "says how many of the experts of --upcycle a token chooses; give both"
            )
        if request.vocabulary is not None:
            _refuse_without_use(request, LAID_OUT_HERE, f"has no use beside --vocabulary {request.vocabulary}")
        if model.num_experts and request.upcycle is not None:
            raise ConfigError(f"--upcycle is for a dense model; {request.source} has {model.num_experts} experts")
        if request.shared_expert and model.shared_expert_intermediate_size:
            raise ConfigError(f"--shared-expert: {request.source} has a shared expert already; leave the option out")
        return home, model
    _refuse_without_use(
        request,
        ("groups", "shared_expert", "upcycle", "topk", *LAID_OUT_HERE),
        f"has no use: {request.source} is a full export with its own groups and vocabulary; import it as it is and "
        "change it with tools/partition_experts.py",
    )
    tree = json.loads((request.source / "config.json").read_text(encoding="utf-8"))
    try:
        return SYMBIOTIC, SymbioticConfig(**{name: tree[name] for name in SETTINGS if name in tree})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{request.source / 'config.json'}: {error}; export the checkpoint again") from error


def _vocabulary(request: ImportRequest, home: Home, model: SymbioticConfig) -> VocabularyLayout:
    """The layout of the imported model.

    Raises:
        CheckpointError: the given one is of other ids than the folder's.
    """
    path = request.vocabulary
    own = request.source / TRAINING_FOLDER / "vocabulary.json"
    if path is None and home is SYMBIOTIC:
        if not own.is_file():
            raise CheckpointError(f"{own} is missing; name the run's vocabulary with --vocabulary FILE")
        path = own
    if path is None:
        return VocabularyLayout.build(
            text_size=model.vocab_size,
            codebook_size=request.codebook_size or 0,
            resolutions=request.resolutions,
            tokenizer_digest=_tokenizer_digest(request.source) or "",
            multiple=request.multiple or DEFAULT_MULTIPLE,
        )
    layout = VocabularyLayout.load(path)
    if home is SYMBIOTIC and layout.size != model.vocab_size:
        raise CheckpointError(f"{path} has {layout.size} ids, the model in {request.source} {model.vocab_size}")
    if home is SYMBIOTIC and own.is_file() and layout.digest != VocabularyLayout.load(own).digest:
        raise CheckpointError(
            f"{path} is another layout than {own}, so its ids would mean other tokens than the model's; leave "
            "--vocabulary out"
        )
    if home is not SYMBIOTIC and layout.text_size > model.vocab_size:
        raise CheckpointError(
            f"{path} has {layout.text_size} text pieces, the model in {request.source} only {model.vocab_size} ids; "
            "lay the vocabulary out for the model's own tokenizer"
        )
    digest = _tokenizer_digest(request.source)
    if home is not SYMBIOTIC and digest not in (None, layout.tokenizer_digest):
        raise CheckpointError(
            f"{path} is laid out for another tokenizer than that in {request.source}, so its ids would mean other "
            "pieces than the model's; lay it out for that tokenizer"
        )
    return layout


def _tokenizer_digest(folder: Path) -> str | None:
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return sha256_of(found[0]) if found else None


def _changed(model: SymbioticConfig, **changes: Any) -> SymbioticConfig:
    """A model with other settings."""
    return SymbioticConfig(**{name: getattr(model, name) for name in SETTINGS} | changes)


def _target_model(request: ImportRequest, model: SymbioticConfig, layout: VocabularyLayout) -> SymbioticConfig:
    """The model that the checkpoint will hold, still with one group."""
    changes: dict[str, Any] = {"vocab_size": layout.size}
    if request.shared_expert:
        changes |= {"shared_expert_intermediate_size": request.shared_expert, "shared_expert_gate": False}
    if request.upcycle is not None:
        changes |= {
            "dense_layers": [],
            "num_experts": request.upcycle,
            "num_experts_per_tok": request.topk or DEFAULT_TOPK,
            "moe_intermediate_size": model.intermediate_size,
            "expert_groups": None,
        }
    return _changed(model, **changes)


def _configuration(request: ImportRequest, home: Home, target: SymbioticConfig) -> tuple[Config, ExpertPartition]:
    """The configuration and the partition of the checkpoint."""
    length = request.sequence_length or target.max_position_embeddings
    if home is not SYMBIOTIC and request.sequence_length is None:
        length = min(length, DEFAULT_SEQUENCE_LENGTH)
    vocabulary = request.output / "vocabulary.json"
    tree = training_tree(target, vocabulary=vocabulary, sequence_length=length, run=str(request.output))
    name = _origin(request.source).get("name")
    if name is not None:
        tree["run"]["name"] = name
    return _grouped(request, tree, target)


def _grouped(request: ImportRequest, tree: dict[str, Any], target: SymbioticConfig) -> tuple[Config, ExpertPartition]:
    """The checked configuration and the partition, in the groups that are asked for."""
    if request.groups:
        if sum(request.groups.values()) != target.num_experts:
            raise ConfigError(
                f"--groups sum to {sum(request.groups.values())} experts, the model has {target.num_experts} in a block"
            )
        tree["groups"] = {group: {"experts": size} for group, size in request.groups.items()}
        tree["routers"] = {}
    config = config_from_tree(tree, check_files=False)
    blocks = layer_pattern(config).moe_blocks
    if request.groups:
        return config, by_index(dict(request.groups), blocks)
    groups = list(target.expert_groups)
    table = {block: [0] * target.num_experts for block in blocks}
    for index, group in enumerate(groups):
        for block in blocks:
            for expert in target.expert_groups[group][block]:
                table[block][expert] = index
    return config, ExpertPartition.from_dict(
        {"version": 1, "groups": groups, "blocks": {str(block): row for block, row in table.items()}},
        source=str(request.source),
    )


def _stream(incoming: _Incoming, request: ImportRequest) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint keys and whole tensors of everything but the folder's own experts."""
    source, model, layout = str(request.source), incoming.model, incoming.layout
    stream: Iterator[tuple[str, Tensor]] = _plain_tensors(incoming, workers=request.workers)
    deviation = model.initializer_range
    normal = NormalStart(request.seed, deviation, deviation / math.sqrt(2 * model.num_hidden_layers))
    if incoming.extended:
        wanted = source_rows(layout, rows=model.vocab_size, bos=model.bos_token_id, eod=model.eos_token_id)
        stream = extend_vocabulary(stream, sources=wanted, seed=request.seed)
    shared = SharedExpert(request.shared_expert) if request.shared_expert else None
    if request.upcycle is not None:
        return upcycle_dense(
            stream,
            blocks=range(model.num_hidden_layers),
            num_experts=request.upcycle,
            normal=normal,
            source=source,
            shared=shared,
        )
    return stream if shared is None else _with_shared_experts(stream, shared, normal=normal)


def _plain_tensors(incoming: _Incoming, *, workers: int) -> Iterator[tuple[str, Tensor]]:
    rows = [row for row in incoming.rows if row.expert is None]
    for row, tensor in zip(rows, in_order(incoming.read, rows, workers=workers), strict=True):
        if row.megatron is not None:
            yield row.megatron, tensor if row.dtype is None else tensor.to(row.dtype)


def _with_shared_experts(
    stream: Iterable[tuple[str, Tensor]], shared: SharedExpert, *, normal: NormalStart
) -> Iterator[tuple[str, Tensor]]:
    """Add to every mixture a shared expert whose output starts at zero."""
    for key, tensor in stream:
        yield key, tensor
        if match := ROUTER_KEY.fullmatch(key):
            name = f"{match[1]}shared_experts.linear_fc1.weight"
            first = tensor.new_empty(2 * shared.size, tensor.shape[1])
            yield name, normal.draw(first, key=name, expert=0, output=False)
            yield f"{match[1]}shared_experts.linear_fc2.weight", tensor.new_zeros(tensor.shape[1], shared.size)


def _origin(folder: Path) -> dict[str, Any]:
    """What our own export says about the run behind it, as `symbiotic.huggingface.source.Origin`; else nothing.

    Raises:
        CheckpointError: its file is damaged.
    """
    path = folder / TRAINING_FOLDER / "origin.json"
    return read_json(path, {"name": str, "step": int, "data": list}) if path.is_file() else {}


def _copy_companions(source: Path, folder: Path) -> None:
    """The tokenizer that the vocabulary was laid out for and the image codec, where the folder has them."""
    # Our own export's tokenizer.json has the layout's controls added: the one to train with is in its training folder.
    own = source / TRAINING_FOLDER
    for path in [place / name for place in (own if own.is_dir() else source,) for name in TOKENIZER_FILES]:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
            break
    if (source / CODEC_FOLDER).is_dir():
        shutil.copytree(source / CODEC_FOLDER, folder / CODEC_FOLDER, copy_function=copy_file)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _model_yaml(config: Config, output: Path) -> str:
    """What a training configuration extends: the model, and where its weights are."""
    tree = config.to_dict()
    sections = {name: tree[name] for name in ("model", "groups", "routers", "TransformerConfig")}
    return (
        "# The imported model; a training configuration says `extends: " + str(output / "model.yaml") + "`.\n"
    ) + dump_yaml(sections | {"checkpoint": {"load": str(output)}})
