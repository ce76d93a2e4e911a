"""Generation: types carried from the begin token, images well-formed, batches equal single rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from symbiotic.huggingface.modeling.generation_symbiotic import ImageSpanLogitsProcessor
from symbiotic.huggingface.modeling.modeling_symbiotic import SymbioticForCausalLM
from tests.huggingface.reference import small_config
from tests.huggingface.test_modeling import build, random_weights

TEXT = [3, 14, 15, 9, 26]
DRAW_2X3 = [64, 68]
"""Begin of an image to generate, then the resolution of two rows of three codes."""


@pytest.fixture(scope="module")
def model() -> SymbioticForCausalLM:
    config = small_config()
    return build(config, random_weights(config, seed=7))


def spell(ids: list[int]) -> str:
    """A row as letters: t text, U and G begins, r resolution, c code, n end of row, E end of image."""
    names = {53: "U", 64: "G", 65: "E", 66: "n", 67: "r", 68: "r"}
    return "".join(names.get(token, "c" if 80 <= token < 96 else "t") for token in ids)


def greedy_by_hand(model: SymbioticForCausalLM, ids: list[int], *, steps: int) -> list[int]:
    """Argmax without a cache, the types counted by hand: a code is of the image that was begun last."""
    allowed = ImageSpanLogitsProcessor(model.config)
    for _ in range(steps):
        types, use = [], 0
        for token in ids:
            use = {53: 1, 64: 2, 65: 0}.get(token, use)
            types.append(use if 80 <= token < 96 else 0)
        with torch.inference_mode():
            row = torch.tensor([ids])
            logits = model(input_ids=row, token_type_ids=torch.tensor([types]), use_cache=False).logits[:, -1]
        ids = [*ids, int(allowed(row, logits.float()).argmax())]
    return ids


def generate(model: SymbioticForCausalLM, ids: Tensor, **settings: object) -> Tensor:
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 52} | settings
    with torch.inference_mode():
        return model.generate(ids, **settings)


def test_drawn_image_is_well_formed_and_carries_its_type(model: SymbioticForCausalLM) -> None:
    prompt = TEXT + DRAW_2X3
    drawn = generate(model, torch.tensor([prompt]), max_new_tokens=10)[0].tolist()
    assert spell(drawn[: 5 + 11]) == "tttttGrcccncccnE"
    assert drawn == greedy_by_hand(model, prompt, steps=10)


def test_wrong_type_would_be_seen(model: SymbioticForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: codes typed as those of an image to understand give another drawing."""
    prompt = TEXT + DRAW_2X3
    right = generate(model, torch.tensor([prompt]), max_new_tokens=10)
    monkeypatch.setitem(model.config.token_types, "generation_code", 1)
    assert not torch.equal(right, generate(model, torch.tensor([prompt]), max_new_tokens=10))


def test_prompt_with_an_image_to_understand(model: SymbioticForCausalLM) -> None:
    prompt = [*TEXT, 53, 67, 81, 82, 66, 83, 84, 66, 65, 7]
    answer = generate(model, torch.tensor([prompt]), max_new_tokens=8)[0].tolist()
    assert answer == greedy_by_hand(model, prompt, steps=8)
    types = torch.tensor([[0] * 7 + [1, 1, 0, 1, 1, 0, 0, 0]])
    assert answer == generate(model, torch.tensor([prompt]), token_type_ids=types, max_new_tokens=8)[0].tolist()


def test_code_before_any_begin_token_is_refused(model: SymbioticForCausalLM) -> None:
    with pytest.raises(ValueError, match="row 0, position 1: an image code outside an image"):
        generate(model, torch.tensor([[3, 81, 4]]), max_new_tokens=1)
    with pytest.raises(ValueError, match="id 5 after the begin of an image is no resolution"):
        generate(model, torch.tensor([[3, 64, 5]]), max_new_tokens=1)


def test_left_padded_batch_equals_single_rows(model: SymbioticForCausalLM) -> None:
    prompts = [TEXT + DRAW_2X3, [8, *DRAW_2X3], [1, 2, 3, 4, 5, 6, 64, 68]]
    width = max(map(len, prompts))
    batch = torch.tensor([[52] * (width - len(prompt)) + prompt for prompt in prompts])
    attend = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    drawn = generate(model, batch, attention_mask=attend, max_new_tokens=9)[:, width:]
    for row, prompt in zip(drawn, prompts, strict=True):
        assert row.tolist() == generate(model, torch.tensor([prompt]), max_new_tokens=9)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("settings", [{"do_sample": True, "top_k": 0}, {"num_beams": 3}], ids=["sample", "beams"])
def test_sampling_and_beams_stay_well_formed(model: SymbioticForCausalLM, settings: dict) -> None:
    torch.manual_seed(0)
    batch = torch.tensor([TEXT + DRAW_2X3, [1, 2, 3, 4, 64, 67, 90]])
    drawn = generate(model, batch, max_new_tokens=9, **settings)
    assert spell(drawn[0].tolist()) == "tttttGrcccncccnE"
    assert spell(drawn[1].tolist()).startswith("ttttGrccnccnE")


def test_free_running_sampling_is_always_well_formed(model: SymbioticForCausalLM) -> None:
    """Begin tokens made likely, so that many images are begun, at any place."""
    bias = [[[64], 4.0]]
    torch.manual_seed(1)
    drawn = generate(model, torch.tensor([[3, 5]] * 16), max_new_tokens=60, do_sample=True, top_k=0, sequence_bias=bias)
    images = 0
    for row in drawn.tolist():
        rest = spell(row)
        while "G" in rest:
            before, _, rest = rest.partition("G")
            assert set(before) <= {"t"}, "outside an image there is only text"
            whole = [form for form in ("rccnccnE", "rcccncccnE") if rest.startswith(form)]
            cut = [form for form in ("rccnccnE", "rcccncccnE") if form.startswith(rest)]
            assert whole or cut, rest
            rest = rest[len(whole[0]) :] if whole else ""
            images += bool(whole)
        assert set(rest) <= {"t"}
        assert not {50, 52, 53} & set(row[2:]), "bos, padding and begin-understanding are never drawn"
        assert all(token < 54 or 64 <= token < 69 or 80 <= token < 96 for token in row), "unused ids"
    assert images > 10


def guided_by_hand(model: SymbioticForCausalLM, ids: list[int], *, scale: float, negative: list[int], steps: int):
    """Argmax of free + scale * (conditional - free), each from a pass without a cache; ids begin with a text."""
    allowed = ImageSpanLogitsProcessor(model.config)

    def scores(row: list[int]) -> Tensor:
        types = model.complete_token_types(torch.tensor([row]), None)
        return model(input_ids=torch.tensor([row]), token_type_ids=types, use_cache=False).logits[0, -1]

    for _ in range(steps):
        conditional = scores(ids)
        if 64 in ids and 65 not in ids:
            free = scores(negative + ids[ids.index(64) :])
            conditional = torch.where(conditional.isneginf(), conditional, free + scale * (conditional - free))
        ids = [*ids, int(allowed(torch.tensor([ids]), conditional[None]).argmax())]
    return ids


@pytest.mark.parametrize("negative", [[], [7, 8]], ids=["no prompt", "negative prompt"])
def test_guidance_is_the_formula(model: SymbioticForCausalLM, negative: list[int]) -> None:
    prompt = TEXT + DRAW_2X3
    with torch.inference_mode():
        expected = guided_by_hand(model, prompt, scale=3.0, negative=negative, steps=11)
    settings = {"negative_prompt_ids": torch.tensor([negative])} if negative else {}
    drawn = generate(model, torch.tensor([prompt]), max_new_tokens=11, guidance_scale=3.0, **settings)[0].tolist()
    assert drawn == expected
    plain = generate(model, torch.tensor([prompt]), max_new_tokens=11)[0].tolist()
    assert drawn != plain, "the scale matters"
    assert generate(model, torch.tensor([prompt]), max_new_tokens=11, guidance_scale=1.0)[0].tolist() == plain


def test_guidance_in_a_batch_of_unequal_rows(model: SymbioticForCausalLM) -> None:
    """One row begins its image later, one reads an image and writes text."""
    prompts = [[*TEXT, 64, 68], [3, 14, 64, 68], [5, 53, 67, 81, 82, 66, 83, 84, 66, 65, 7]]
    length = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[52] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    rows = generate(model, ids, attention_mask=mask, max_new_tokens=9, guidance_scale=2.0)
    for row, prompt in zip(rows.tolist(), prompts, strict=True):
        alone = generate(model, torch.tensor([prompt]), max_new_tokens=9, guidance_scale=2.0)[0].tolist()
        assert row[length:] == alone[len(prompt) :]


def test_guidance_with_beams_is_refused(model: SymbioticForCausalLM) -> None:
    with pytest.raises(ValueError, match="needs num_beams=1"):
        generate(model, torch.tensor([TEXT + DRAW_2X3]), max_new_tokens=2, guidance_scale=2.0, num_beams=2)
    with pytest.raises(ValueError, match="needs num_beams=1"):
        settings = GenerationConfig(num_beams=2, guidance_scale=2.0)
        generate(model, torch.tensor([TEXT + DRAW_2X3]), generation_config=settings)


def test_guidance_of_a_generation_config_is_ours(model: SymbioticForCausalLM) -> None:
    prompt, settings = torch.tensor([TEXT + DRAW_2X3]), {"max_new_tokens": 9, "do_sample": False}
    expected = generate(model, prompt, guidance_scale=3.0, **settings)
    assert not torch.equal(expected, generate(model, prompt, **settings))
    model.generation_config.guidance_scale = 3.0
    try:
        assert torch.equal(generate(model, prompt, generation_config=GenerationConfig(**settings)), expected)
    finally:
        model.generation_config.guidance_scale = None
    config = GenerationConfig(guidance_scale=3.0, **settings)
    assert torch.equal(generate(model, prompt, generation_config=config), expected)
    assert torch.equal(generate(model, torch.tensor([TEXT]), generation_config=config),
                       generate(model, torch.tensor([TEXT]), **settings))  # fmt: skip


def test_one_negative_prompt_serves_all_rows(model: SymbioticForCausalLM) -> None:
    rows = torch.tensor([TEXT + DRAW_2X3] * 2)
    with pytest.raises(ValueError, match="negative_prompt_ids has 2 rows"):
        generate(model, rows, max_new_tokens=2, guidance_scale=2.0, negative_prompt_ids=torch.tensor([[5], [6]]))
    with pytest.raises(ValueError, match="negative_prompt_attention_mask: one prompt serves all rows"):
        generate(model, rows, max_new_tokens=2, guidance_scale=2.0, negative_prompt_attention_mask=torch.ones(1, 1))


def test_a_setting_that_forbids_all_of_an_image_is_named(model: SymbioticForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"row 0: other settings .* forbid every id"):
        generate(model, torch.tensor([TEXT + DRAW_2X3]), max_new_tokens=9, no_repeat_ngram_size=1)


def test_bfloat16_draws_well_formed_images() -> None:
    config = small_config()
    model = build(config, random_weights(config, seed=7)).to(torch.bfloat16)
    drawn = generate(model, torch.tensor([TEXT + DRAW_2X3]), max_new_tokens=9, do_sample=True, guidance_scale=2.0)
    assert spell(drawn[0].tolist()) == "tttttGrcccncccnE"
