"""The README.md of an exported folder: sizes, groups, where the weights come from, how to use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from symbiotic.huggingface.homes import Home
from symbiotic.huggingface.modeling.configuration_symbiotic import SymbioticConfig
from symbiotic.huggingface.safetensors_writer import TensorPlan
from symbiotic.huggingface.source import Origin
from symbiotic.tokens.vocabulary import VocabularyLayout

USAGE = """\
```python
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
inputs = processor([["Draw a seven.", {"type": "image", "use": "generate", "size": (4, 4)}]])
output = model.generate(**inputs, max_new_tokens=40)
```
"""


def num_parameters(plans: Sequence[TensorPlan]) -> int:
    """Values in the exported tensors."""
    return sum(plan.num_bytes // plan.dtype.itemsize for plan in plans)


def num_active_parameters(model: SymbioticConfig, plans: Sequence[TensorPlan]) -> int:
    """Values that one token goes through: everything but the routed experts that it doesn't choose."""
    routed = sum(plan.num_bytes // plan.dtype.itemsize for plan in plans if ".mlp.experts." in plan.name)
    inactive = routed * (model.num_experts - model.num_experts_per_tok) // model.num_experts if routed else 0
    return num_parameters(plans) - inactive


def model_card(
    model: SymbioticConfig,
    origin: Origin,
    *,
    plans: Sequence[TensorPlan],
    layout: VocabularyLayout,
    partition_hash: str,
    license_id: str,
    codec: Mapping[str, str] | None,
) -> str:
    """The card as Markdown with the Hub's front matter.

    Args:
        model: the exported configuration.
        origin: the run behind the weights.
        plans: the exported tensors.
        layout: the vocabulary.
        partition_hash: hash of the expert partition.
        license_id: licence of the weights.
        codec: class and digest of the image codec, and its path if it is not in the folder; None without one.
    """
    sources = ", ".join(origin.data) or "not recorded"
    lines = [
        "---",
        f"license: {license_id}",
        "library_name: transformers",
        "pipeline_tag: any-to-any",
        "tags: [mixture-of-experts, multimodal, custom_code]",
        "---",
        f"# {origin.name}",
        "",
        "A mixture-of-experts transformer that reads and draws images. Every token's type picks the expert group that",
        "it is routed in; the shared expert sees all tokens.",
        "",
        *_size_table(model, plans, layout=layout, codec=codec),
        "",
        *_group_table(model),
        "",
        "## Use",
        "",
        USAGE,
        "Image codes need `token_type_ids`, which the processor returns; `generate()` carries them on by itself and",
        "keeps images well-formed.",
        "",
        "## Where it comes from",
        "",
        f"- training steps of the last run: {origin.step}",
        f"- data sources: {sources}",
        f"- vocabulary digest: `{layout.digest}`",
        f"- tokenizer digest: `{layout.tokenizer_digest}`",
        f"- expert partition hash: `{partition_hash}`",
        "",
    ]
    return "\n".join(lines)


def _size_table(
    model: SymbioticConfig,
    plans: Sequence[TensorPlan],
    *,
    layout: VocabularyLayout,
    codec: Mapping[str, str] | None,
) -> list[str]:
    images = "none"
    if model.image_vocabulary:
        sizes = ", ".join(f"{rows}x{columns}" for _, rows, columns in model.image_vocabulary["resolutions"])
        where = "not in this folder"
        if codec is not None:
            place = "not in this folder, so name it with `codec=FOLDER`" if "path" in codec else "in `codec/`"
            where = f"`{codec['class']}` (digest `{codec['digest']}`) {place}"
        images = f"{model.image_vocabulary['codebook_size']} for images of {sizes} codes; the codec is {where}"
    return [
        "| | |",
        "|---|---|",
        f"| parameters | {num_parameters(plans):,} |",
        f"| active parameters per token | {num_active_parameters(model, plans):,} |",
        f"| blocks | {model.num_hidden_layers} ({len(model.dense_layers)} dense) |",
        f"| hidden size | {model.hidden_size} |",
        f"| experts per block, chosen per token | {model.num_experts}, {model.num_experts_per_tok} |",
        f"| context length | {model.max_position_embeddings} |",
        f"| vocabulary | {layout.text_size} text pieces; image codes: {images} |",
    ]


def _group_table(model: SymbioticConfig) -> list[str]:
    """Size and token types of every expert group."""
    return ["| expert group | experts | token types |", "|---|---|---|"] + [
        f"| {group} | {max(len(experts) for experts in layers)} | {', '.join(_types_of(model, group))} |"
        for group, layers in model.expert_groups.items()
    ]


def _types_of(model: SymbioticConfig, group: str) -> list[str]:
    """Names of the token types whose router chooses from ``group``."""
    return [
        name
        for name, value in model.token_types.items()
        if model.group_of_router[model.router_of_token_type[value]] == group
    ]


def understanding_card(
    model: SymbioticConfig,
    origin: Origin,
    *,
    home: Home,
    router: str,
    plans: Sequence[TensorPlan],
    layout: VocabularyLayout,
    text_only: bool,
    license_id: str,
) -> str:
    """The card of an understanding-only export.

    Args: as ``model_card``, and
        home: the stock architecture.
        router: the router that the exported tokens go through.
        text_only: whether the vocabulary is cut to text.
    """
    ids = "text and text controls" if text_only else "text, text controls and image codes to understand"
    lines = [
        "---",
        f"license: {license_id}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [mixture-of-experts]",
        "---",
        f"# {origin.name}: the understanding half",
        "",
        f"What the tokens of router `{router}` see of a larger model that also draws images, as `{home.architecture}`:",
        "stock transformers loads it without custom code, and its logits are those of the whole model.",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {num_parameters(plans):,} |",
        f"| hidden size | {model.hidden_size} |",
        f"| context length | {model.max_position_embeddings} |",
        f"| vocabulary | {ids} |",
        "",
        "## Where it comes from",
        "",
        f"- training steps of the last run: {origin.step}",
        f"- data sources: {', '.join(origin.data) or 'not recorded'}",
        f"- vocabulary digest: `{layout.digest}`",
        f"- tokenizer digest: `{layout.tokenizer_digest}`",
        "",
    ]
    return "\n".join(lines)
