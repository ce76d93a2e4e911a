"""The comparison of logits: it measures what it says, and sees each way in which an export can be wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from symbiotic.data.shards import DocumentRecord, ShardWriter
from symbiotic.errors import CheckpointError
from symbiotic.huggingface.exported_logits import RoutingMargins
from symbiotic.huggingface.logit_batch import LogitBatch, TokenRow, random_rows, shard_rows
from symbiotic.huggingface.verify import VerifyReport, behind_ties, compare_logits
from symbiotic.tokens.types import TokenType, mode_byte
from tests.huggingface.checkpoints import Corpus
from tests.huggingface.reference import random_row, small_config
from tests.huggingface.test_modeling import build, random_weights

BATCH = LogitBatch(
    tokens=np.array([[1, 2, 3, 0], [4, 5, 6, 7]]),
    token_types=np.array([[0, 1, 2, 15], [0, 0, 2, 2]], dtype=np.int8),
)
USED = np.array([True, True, True, False])


def logits(seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(2, 4, 4)).astype(np.float32) * 3
    values[..., 3] = -np.inf
    return values


def test_equal_logits_differ_by_nothing() -> None:
    rows = compare_logits(logits(0), logits(0), batch=BATCH, used=USED)
    assert [row.tokens for row in rows] == ["all", "text", "understanding_code", "generation_code"]
    assert [row.num_tokens for row in rows] == [7, 3, 1, 3]
    assert all((row.max_over_std, row.mean_kl, row.same_argmax) == (0.0, 0.0, 1.0) for row in rows)


def test_one_wrong_logit_by_hand() -> None:
    expected, found = logits(1), logits(1)
    found[0, 1, 2] += 0.5
    rows = compare_logits(expected, found, batch=BATCH, used=USED)
    values = expected[BATCH.real][:, USED].astype(np.float64)
    assert rows[0].max_over_std == pytest.approx(0.5 / values.std(), rel=1e-5)
    assert rows[0].mean_over_std == pytest.approx(0.5 / values.std() / values.size, rel=1e-5)
    assert rows[1].max_over_std == 0.0, "the text rows are equal"
    p, q = (np.exp(v[0, 1, :3].astype(np.float64)) for v in (expected, found))
    kl = sum(a / p.sum() * math.log(a / p.sum() / (b / q.sum())) for a, b in zip(p, q, strict=True))
    assert rows[2].mean_kl == pytest.approx(kl, rel=1e-5)


def test_padding_and_unused_ids_are_left_out() -> None:
    found = logits(2)
    found[0, 3] = 99.0
    found[..., 3] = 7.0
    assert compare_logits(logits(2), found, batch=BATCH, used=USED)[0].max_over_std == 0.0


def test_tokens_behind_a_routing_tie_are_left_out() -> None:
    margins = np.full((2, 4), 0.3, dtype=np.float32)
    margins[1, 2] = 1e-7
    tied = behind_ties(margins)
    assert tied.tolist() == [[False] * 4, [False, False, True, True]]
    found = logits(3)
    found[1, 2:] += 5.0
    rows = compare_logits(logits(3), found, batch=BATCH, used=USED, left_out=tied)
    assert rows[0].max_over_std == 0.0 and rows[0].num_tokens == 5
    found[0, 0, 0] += 5.0
    assert compare_logits(logits(3), found, batch=BATCH, used=USED, left_out=tied)[0].max_over_std > 1
    with pytest.raises(CheckpointError, match="no token is left"):
        compare_logits(found, found, batch=BATCH, used=USED, left_out=np.ones_like(tied))


def test_margin_is_the_gap_to_the_first_rejected_expert() -> None:
    config = small_config()
    model = build(config, random_weights(config))
    margins = RoutingMargins(model)
    ids, types = random_row(12, seed=9)
    captured = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0][0]))
    with torch.no_grad():
        model(input_ids=ids[None], token_type_ids=types[None])
    for place, token_type in enumerate(types.tolist()):
        gaps = []
        for layer, hidden in zip(model.model.layers, captured, strict=True):
            gate = layer.mlp.routers[config.router_of_token_type[token_type]].weight
            ordered = sorted((gate.detach() @ hidden[place]).tolist(), reverse=True)
            gaps.append(ordered[1] - ordered[2])
        assert float(margins.smallest[place]) == pytest.approx(min(gaps), abs=1e-5)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"logits \(2, 4, 3\), the checkpoint \(2, 4, 4\)"):
        compare_logits(logits(0), logits(0)[..., :3], batch=BATCH, used=USED)
    with pytest.raises(CheckpointError, match="not finite for ids in use"):
        compare_logits(logits(0), np.full((2, 4, 4), np.nan), batch=BATCH, used=USED)


def test_report_says_which_side_of_the_tolerance() -> None:
    found = logits(1)
    found[0, 0, 0] += 0.01
    rows = compare_logits(logits(1), found, batch=BATCH, used=USED)
    assert VerifyReport(rows, tolerance=0.1).holds
    failed = VerifyReport(rows, tolerance=1e-5)
    assert not failed.holds and "PAST the tolerance of 1e-05" in failed.table()
    assert failed.to_dict()["max_over_std"] == failed.rows[0].max_over_std


def test_random_rows_hold_every_type(corpus: Corpus) -> None:
    rows = random_rows(corpus.vocabulary, count=3, length=40)
    assert {len(row.ids) for row in rows} == {40}
    codes = np.arange(16) + corpus.vocabulary.image_offset
    for row in rows:
        assert set(row.types) == {TokenType.TEXT, TokenType.UNDERSTANDING_CODE, TokenType.GENERATION_CODE}
        assert np.array_equal(np.isin(row.ids, codes), row.types != TokenType.TEXT)
        assert corpus.vocabulary.used_mask()[row.ids].all()
    again = random_rows(corpus.vocabulary, count=3, length=40)
    assert all(np.array_equal(one.ids, two.ids) for one, two in zip(rows, again, strict=True))


def test_shard_rows_are_whole_documents(corpus: Corpus, tmp_path: pytest.TempPathFactory) -> None:
    vocabulary = corpus.vocabulary
    image = np.array([vocabulary.resolution_id(2, 2), 80, 81, 82, 83])
    image[1:] += vocabulary.image_offset - 80
    with ShardWriter(tmp_path / "shard", vocabulary=vocabulary) as writer:
        for number in range(5):
            text = np.array([number + 1, 9])
            writer.add_document(
                DocumentRecord(id=str(number), source_file="a", line=number, license=None),
                [
                    (text, mode_byte(TokenType.TEXT, loss=True)),
                    (image, mode_byte(TokenType.GENERATION_CODE, loss=True)),
                ],
            )
        writer.finalize()
    rows = shard_rows(tmp_path / "shard", vocabulary, count=3, length=64)
    begin, row_end = vocabulary.begin_generation_image, vocabulary.end_of_row
    assert [row.ids[0] for row in rows] == [1, 3, 5]
    assert rows[0].ids.tolist() == [
        1, 9, begin, image[0], image[1], image[2], row_end, image[3], image[4], row_end, vocabulary.end_of_image,
        vocabulary.eod,
    ]  # fmt: skip
    assert rows[0].types.tolist() == [0, 0, 0, 0, 2, 2, 0, 2, 2, 0, 0, 0]


def test_rows_are_padded_on_the_right() -> None:
    batch = LogitBatch.of([TokenRow.of_text([1, 2, 3]), TokenRow.of_text([4])], pad=9)
    assert batch.tokens.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch.real.tolist() == [[True, True, True], [True, False, False]]
