"""The understanding half of a model as a stock architecture, which transformers loads without code of ours.

    export_understanding(source, "exports/reader")

Text and the codes of images to understand go through one router and the experts of its group; everything else is
shared. So what these tokens see is an ordinary mixture of experts, which one of the homes in ``stock`` computes: the
logits are those of the whole model. Images to generate need the whole model.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from symbiotic.errors import CheckpointError
from symbiotic.files import write_json, write_text
from symbiotic.huggingface.architecture import huggingface_config
from symbiotic.huggingface.export import (
    check_dtype,
    check_tensors,
    main_dtype,
    read_chat_template,
    write_generation_config,
    write_weights,
)
from symbiotic.huggingface.homes import Home
from symbiotic.huggingface.mapping import mapping_table
from symbiotic.huggingface.model_card import understanding_card
from symbiotic.huggingface.modeling.configuration_symbiotic import SymbioticConfig
from symbiotic.huggingface.ordered_threads import DEFAULT_WORKERS
from symbiotic.huggingface.output_folder import check_output, written_at_once
from symbiotic.huggingface.source import Source
from symbiotic.huggingface.stock import choose_home, stock_config
from symbiotic.huggingface.tokenizer import write_tokenizer
from symbiotic.tokens.tokenizer import Tokenizer, tokenizer_beside

log = logging.getLogger(__name__)


def export_understanding(
    source: Source,
    output: Path | str,
    *,
    tokenizer: Path | str | None = None,
    home: str | None = None,
    text_only: bool = False,
    dtype: str | None = None,
    license_id: str = "unknown",
    max_shard_bytes: int = 5_000_000_000,
    chat_template: Path | str | None = None,
    workers: int = DEFAULT_WORKERS,
) -> Home:
    """Write the folder.

    Args:
        source: what ``open_source`` returned.
        output: a folder that doesn't exist yet, or is empty.
        tokenizer: SentencePiece model or tokenizer.json; None takes the one beside the vocabulary.
        home: model type of the architecture; None takes the first that fits.
        text_only: cut the vocabulary to text and text controls, without images to understand.
        dtype, license_id, max_shard_bytes, chat_template, workers: see ``export_checkpoint``.

    Returns:
        The architecture.

    Raises:
        CheckpointError, ConfigError, DataError: nothing was written; where no architecture fits, with the reasons.
    """
    output = Path(output)
    check_dtype(dtype)
    check_output(output, source=source.folder)
    template = read_chat_template(chat_template)
    stored = main_dtype(source.weights)
    model = huggingface_config(
        source.config, vocabulary=source.vocabulary, partition=source.partition, dtype=dtype or stored
    )
    router = understanding_router(model, text_only=text_only)
    chosen = choose_home(model, router=router, wanted=home)
    pieces = Tokenizer(tokenizer or tokenizer_beside(source.vocabulary_path))
    size = source.vocabulary.text_part if text_only else source.vocabulary.size
    rows = mapping_table(model, chosen, router=router, vocab_size=size)
    check_tensors(rows, source.weights, whole=False)
    with written_at_once(output) as folder:
        # The tokenizer is compared as transformers loads it: see export_checkpoint.
        write_tokenizer(folder, tokenizer=pieces, layout=source.vocabulary, max_length=model.max_position_embeddings)
        write_json(folder / "config.json", stock_config(model, chosen, router=router, vocab_size=size))
        write_generation_config(folder, model, suppressed=suppressed_ids(source, size))
        write_text(folder / "chat_template.jinja", template)
        plans = write_weights(
            folder, rows, source.weights, dtype=dtype, max_shard_bytes=max_shard_bytes, workers=workers
        )
        card = understanding_card(
            model, source.origin, home=chosen, router=router, plans=plans, layout=source.vocabulary,
            text_only=text_only, license_id=license_id,
        )  # fmt: skip
        write_text(folder / "README.md", card)
    log.info("%s: exported %s as %s (%d tensors)", output, source.folder, chosen.model_type, len(plans))
    return chosen


def understanding_router(model: SymbioticConfig, *, text_only: bool) -> str:
    """The one router that serves text and, unless ``text_only``, codes of images to understand.

    Raises:
        CheckpointError: two routers serve them.
    """
    types = ["text"] if text_only or model.image_vocabulary is None else ["text", "understanding_code"]
    routers = list(dict.fromkeys(model.router_of_token_type[model.token_types[name]] for name in types))
    if len(routers) > 1:
        raise CheckpointError(
            f"text goes through router {routers[0]!r} and images to understand through {routers[1]!r}; a stock "
            "architecture has one router: cut the vocabulary with --text-vocabulary, or export the whole model"
        )
    return routers[0]


def suppressed_ids(source: Source, size: int) -> list[int]:
    """Ids below ``size`` that a model which writes text may not draw: unused rows and everything of images."""
    drawn = source.vocabulary.used_mask()
    drawn[source.vocabulary.text_part :] = False
    drawn[[source.vocabulary.pad, source.vocabulary.bos, source.vocabulary.begin_understanding_image]] = False
    return np.flatnonzero(~drawn[:size]).tolist()
