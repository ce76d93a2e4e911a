"""From a training checkpoint to a folder that transformers loads: one process, no Megatron, one tensor at a time.

    export_checkpoint("runs/digits/generation", "exports/digits", tokenizer="corpus/tokenizer.model")

The folder holds the weights as safetensors, the configuration with its routing tables, our modeling code, the
tokenizer, the image codec and a model card. It is written under another name, flushed, and renamed when it is whole.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers

from symbiotic.data.codecs import load_codec
from symbiotic.errors import CheckpointError, DataError
from symbiotic.files import write_json, write_text
from symbiotic.huggingface.architecture import huggingface_config
from symbiotic.huggingface.mapping import Row, check_shape, mapping_table
from symbiotic.huggingface.model_card import model_card
from symbiotic.huggingface.modeling.configuration_symbiotic import SymbioticConfig
from symbiotic.huggingface.ordered_threads import DEFAULT_WORKERS, in_order
from symbiotic.huggingface.output_folder import check_output, copy_file, written_at_once
from symbiotic.huggingface.safetensors_writer import SafetensorsWriter, TensorPlan
from symbiotic.huggingface.source import Source
from symbiotic.huggingface.tokenizer import write_tokenizer
from symbiotic.tokens.tokenizer import Tokenizer, tokenizer_beside
from symbiotic.tokens.vocabulary import VocabularyLayout
from symbiotic.training.checkpoint.weights import Weights

log = logging.getLogger(__name__)

MODELING_FOLDER = Path(__file__).parent / "modeling"
MODELING_FILES = (
    "codecs_symbiotic.py",
    "configuration_symbiotic.py",
    "experts_symbiotic.py",
    "generation_symbiotic.py",
    "modeling_symbiotic.py",
    "processing_symbiotic.py",
)
"""Code that travels in the folder; it imports torch and transformers only."""

AUTO_MAP = {
    "AutoConfig": "configuration_symbiotic.SymbioticConfig",
    "AutoModel": "modeling_symbiotic.SymbioticModel",
    "AutoModelForCausalLM": "modeling_symbiotic.SymbioticForCausalLM",
}

PROCESSOR_CLASS = "SymbioticProcessor"
CODEC_FOLDER = "codec"
TRAINING_FOLDER = "training"
"""What an import needs and transformers doesn't: vocabulary layout, SentencePiece model, the run behind the weights."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] != 'text' -%}
{{ raise_exception('This template knows text only; give images to the processor, as segments of a document.') }}
{%- endif -%}
{{ part['text'] }}
{%- endfor -%}
{%- endif -%}
{{ '\n' }}
{%- endfor -%}
"""
"""Messages one after the other, each on a line of its own: a pre-trained model knows no roles."""

EXPORT_DTYPES = ("float32", "bfloat16", "float16")
EMBEDDING_KEY = "embedding.word_embeddings.weight"


def export_checkpoint(
    source: Source,
    output: Path | str,
    *,
    tokenizer: Path | str | None = None,
    codec: Path | str | None = None,
    copy_codec: bool = True,
    dtype: str | None = None,
    license_id: str = "unknown",
    max_shard_bytes: int = 5_000_000_000,
    chat_template: Path | str | None = None,
    workers: int = DEFAULT_WORKERS,
) -> Path:
    """Write the exported folder.

    Args:
        source: what ``open_source`` returned.
        output: a folder that doesn't exist yet, or is empty.
        tokenizer: SentencePiece model or tokenizer.json; None takes the one beside the vocabulary.
        codec: folder of the image codec; None leaves images to the user.
        copy_codec: copy that folder into the export; else only its path and digest are written down, for codecs
            whose licence forbids to pass them on.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None keeps each tensor as it is stored.
        license_id: licence of the weights, for the model card.
        max_shard_bytes: size of a safetensors file.
        chat_template: Jinja file; None takes one without roles.
        workers: threads that convert tensors; the files don't depend on their number.

    Returns:
        The folder.

    Raises:
        CheckpointError, ConfigError, DataError: nothing was written.
    """
    output = Path(output)
    check_dtype(dtype)
    check_output(output, source=source.folder)
    template = read_chat_template(chat_template)
    model = huggingface_config(
        source.config,
        vocabulary=source.vocabulary,
        partition=source.partition,
        dtype=dtype or main_dtype(source.weights),
    )
    pieces = Tokenizer(tokenizer or tokenizer_beside(source.vocabulary_path))
    image_codec = describe_codec(codec, source.vocabulary, copied=copy_codec)
    rows = mapping_table(model)
    check_tensors(rows, source.weights)
    with written_at_once(output) as folder:
        # The tokenizer is compared as transformers loads it, so it comes before a config.json that asks for trust.
        write_tokenizer(folder, tokenizer=pieces, layout=source.vocabulary, max_length=model.max_position_embeddings)
        write_config(folder, model, image_codec=image_codec)
        for name in MODELING_FILES:
            shutil.copyfile(MODELING_FOLDER / name, folder / name)
        if codec is not None and copy_codec:
            # Only data travels: code beside a network is not needed, and would not be run.
            ignored = shutil.ignore_patterns("*.py", "__pycache__", ".*")
            shutil.copytree(codec, folder / CODEC_FOLDER, ignore=ignored, copy_function=copy_file)
        write_text(folder / "chat_template.jinja", template)
        write_training_files(folder, source, tokenizer=pieces)
        plans = write_weights(
            folder, rows, source.weights, dtype=dtype, max_shard_bytes=max_shard_bytes, workers=workers
        )
        card = model_card(
            model, source.origin, plans=plans, layout=source.vocabulary,
            partition_hash=source.partition.hash, license_id=license_id, codec=image_codec,
        )  # fmt: skip
        write_text(folder / "README.md", card)
    log.info("%s: exported %s (%d tensors)", output, source.folder, len(plans))
    return output


def check_dtype(dtype: str | None) -> None:
    """Refuse an unknown dtype (CheckpointError)."""
    if dtype is not None and dtype not in EXPORT_DTYPES:
        raise CheckpointError(f"--dtype {dtype} is not a dtype to export; use one of {', '.join(EXPORT_DTYPES)}")


def read_chat_template(path: Path | str | None) -> str:
    """The text of a template file, or ours without roles.

    Raises:
        DataError: the file can't be read, or isn't Jinja.
    """
    if path is None:
        return CHAT_TEMPLATE
    try:
        text = Path(path).read_text(encoding="utf-8")
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except (OSError, UnicodeDecodeError, jinja2.TemplateSyntaxError) as error:
        raise DataError(f"{path}: the chat template can't be read ({error}); give a Jinja file in UTF-8") from error
    return text


def write_training_files(folder: Path, source: Source, *, tokenizer: Tokenizer) -> None:
    """What ``convert_checkpoint.py import`` needs beside the weights."""
    target = folder / TRAINING_FOLDER
    target.mkdir()
    source.vocabulary.save(target / "vocabulary.json")
    shutil.copyfile(tokenizer.path, target / tokenizer.file_name)
    write_json(target / "origin.json", asdict(source.origin))


def main_dtype(weights: Weights) -> str:
    """Name of the dtype that the embedding is stored in."""
    return str(weights.dtype(EMBEDDING_KEY)).removeprefix("torch.")


def describe_codec(codec: Path | str | None, vocabulary: VocabularyLayout, *, copied: bool) -> dict[str, str] | None:
    """What the processor needs to know of the image codec: class and digest, and the path if it isn't copied.

    Raises:
        DataError: the folder holds no codec, or one of another size than the vocabulary's.
    """
    if codec is None:
        return None
    opened = load_codec(codec)
    size = opened.codebook_size
    if size != vocabulary.codebook_size:
        raise DataError(
            f"{codec}: the codec has {size} codes, the vocabulary {vocabulary.codebook_size}; give the codec that the "
            "corpus was written with"
        )
    known = {"class": type(opened).__name__, "digest": opened.digest}
    return known if copied else known | {"path": str(Path(codec).resolve())}


def check_tensors(rows: Sequence[Row], weights: Weights, *, whole: bool = True) -> None:
    """Compare the table with what the checkpoint holds.

    Args:
        rows: the table.
        weights: the checkpoint.
        whole: also refuse what the table has no row for.

    Raises:
        CheckpointError: naming the first tensor that is missing, left over or of another shape.
    """
    stored = set(weights.keys())
    for row in rows:
        if row.megatron is None:
            continue
        if row.megatron not in stored:
            raise CheckpointError(
                f"{weights.folder}: tensor {row.megatron!r} is missing; the checkpoint belongs to another model than "
                "its configuration"
            )
        check_shape(weights.shape(row.megatron), row.stored_shape, name=row.megatron, source=str(weights.folder))
    left_over = sorted(stored - {row.megatron for row in rows})
    if whole and left_over:
        raise CheckpointError(
            f"{weights.folder}: tensor {left_over[0]!r} has no place in the exported model ({len(left_over)} such); "
            "the checkpoint belongs to another model than its configuration"
        )


def exported_tensors(rows: Sequence[Row], weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the export, in the order of the table; one checkpoint tensor is in memory at a time."""
    for row in rows:
        yield from _exported(row, weights).items()


def _exported(row: Row, weights: Weights) -> dict[str, torch.Tensor]:
    """Names and tensors of one row."""
    if row.megatron is None:
        tensor = None
    elif row.expert is None:
        tensor = weights.read(row.megatron)
    else:
        tensor = weights.read(row.megatron, start=row.expert, stop=row.expert + 1)[0]
    return row.to_huggingface(tensor)


def write_weights(
    folder: Path,
    rows: Sequence[Row],
    weights: Weights,
    *,
    dtype: str | None,
    max_shard_bytes: int,
    workers: int = DEFAULT_WORKERS,
) -> list[TensorPlan]:
    """Write the safetensors files with ``workers`` threads; returns what they hold."""
    wanted = getattr(torch, dtype) if dtype else None
    plans = [
        TensorPlan(name, shape, row.dtype or wanted or weights.dtype(row.megatron or EMBEDDING_KEY))
        for row in rows
        for name, shape in zip(row.huggingface, row.layout.huggingface_shapes, strict=True)
    ]
    with SafetensorsWriter(folder, plans, max_shard_bytes=max_shard_bytes) as writer:

        def write(row: Row) -> None:
            for name, tensor in _exported(row, weights).items():
                writer.write(name, tensor)

        for _ in in_order(write, rows, workers=workers):
            pass
    return plans


def write_config(folder: Path, model: SymbioticConfig, *, image_codec: dict[str, str] | None = None) -> None:
    """Write ``config.json``, ``generation_config.json`` and ``processor_config.json``.

    Readers differ in the names they know, so the rotary base and the dtype are written under both.
    """
    values = model.to_dict()
    tree = {
        "architectures": ["SymbioticForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": model.model_type,
        **{name: values[name] for name in SymbioticConfig.__annotations__ if name in values},
        "rope_theta": model.rope_parameters["rope_theta"],
        "dtype": values["dtype"],
        "torch_dtype": values["dtype"],
        "transformers_version": transformers.__version__,
    }
    write_json(folder / "config.json", tree)
    write_generation_config(folder, model)
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": PROCESSOR_CLASS,
            "auto_map": {"AutoProcessor": f"processing_symbiotic.{PROCESSOR_CLASS}"},
            "token_types": model.token_types,
            "image_vocabulary": model.image_vocabulary,
            **({"image_codec": image_codec} if image_codec else {}),
        },
    )


def write_generation_config(folder: Path, model: SymbioticConfig, *, suppressed: Sequence[int] = ()) -> None:
    """Write ``generation_config.json``: stop and padding ids, plain sampling from the model's own distribution.

    Args:
        folder: where to.
        model: the exported model.
        suppressed: ids that ``generate`` may never draw.
    """
    tree: dict[str, Any] = {
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
        "pad_token_id": model.pad_token_id,
        # transformers would keep the 50 likeliest ids.
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
    }
    if suppressed:
        tree["suppress_tokens"] = list(suppressed)
    write_json(folder / "generation_config.json", tree | {"transformers_version": transformers.__version__})
