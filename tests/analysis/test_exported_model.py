import numpy as np
import pytest
import torch

from symbiotic.analysis.exported_model import ExportedModel
from symbiotic.analysis.sequences import TokenSequence, image_to_draw, whole_image
from symbiotic.errors import CheckpointError, DataError
from symbiotic.tokens.documents import ImageUse
from tests.analysis.models import tiny_model


@pytest.fixture(scope="module")
def exported():
    return tiny_model()


def log_probabilities(exported, sequence):
    """float64 [s, V] of one sequence by itself, without padding and without a cache."""
    ids, types = torch.from_numpy(sequence.ids)[None], torch.from_numpy(sequence.types)[None].long()
    with torch.no_grad():
        logits = exported.model(input_ids=ids, token_type_ids=types, use_cache=False).logits[0]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def documents(exported):
    generator, read = np.random.default_rng(1), ImageUse.UNDERSTAND
    return [
        exported.sequence("read" * (n % 3 + 1), whole_image(generator.integers(8, size=(2, 2)), use=use))
        for n, use in enumerate([read, ImageUse.GENERATE, read, ImageUse.GENERATE, read])
    ]


def test_token_log_likelihoods_in_padded_batches_equal_those_of_single_sequences(exported):
    sequences = documents(exported)
    for sequence, scores in zip(sequences, exported.token_log_likelihoods(sequences), strict=True):
        expected = log_probabilities(exported, sequence)[np.arange(len(sequence) - 1), sequence.ids[1:]]
        np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_candidates_after_a_shared_cache_equal_whole_sequences(exported):
    prefixes = documents(exported)
    candidates = [exported.sequence(text) for text in ("a", "seven", "one", "five.")]
    scores = exported.candidate_log_likelihoods(prefixes, candidates)
    assert scores.shape == (5, 4)
    for row, prefix in zip(scores, prefixes, strict=True):
        for score, candidate in zip(row, candidates, strict=True):
            table = log_probabilities(exported, TokenSequence.join([prefix, candidate]))
            positions = np.arange(len(prefix) - 1, len(prefix) + len(candidate) - 1)
            assert score == pytest.approx(table[positions, candidate.ids].sum(), abs=1e-5)


def test_candidates_of_one_token_need_no_second_pass(exported):
    prefix = documents(exported)[0]
    candidates = [exported.sequence(letter) for letter in "xyz"]
    table = log_probabilities(exported, prefix)[-1]
    np.testing.assert_allclose(
        exported.candidate_log_likelihoods([prefix], candidates)[0],
        [table[candidate.ids[0]] for candidate in candidates],
        atol=1e-5,
    )


def test_greedy_drawing_takes_the_likeliest_code_at_each_place(exported):
    prompts = [exported.sequence(text) for text in ("draw", "make it", "draw")]
    codes = exported.draw(prompts, (2, 2), temperature=0)
    start = exported.sequence(image_to_draw((2, 2)))
    for prompt, picture in zip(prompts, codes, strict=True):
        sequence = TokenSequence.join([prompt, start])
        for row in range(2):
            for column in range(2):
                likeliest = int(log_probabilities(exported, sequence)[-1, 40:48].argmax())
                assert picture[row, column] == likeliest
                code = TokenSequence(np.array([40 + likeliest]), np.array([2], dtype=np.int8))
                sequence = TokenSequence.join([sequence, code])
            sequence = TokenSequence.join([sequence, TokenSequence(np.array([34]), np.array([0], dtype=np.int8))])


def test_sampling_follows_the_distribution_over_codes(exported):
    prompt = exported.sequence("d")
    exported.batch_size, before = 500, exported.batch_size
    codes = exported.draw([prompt] * 2000, (1, 3), seed=5)[:, 0, 0]
    again = exported.draw([prompt] * 2000, (1, 3), seed=5)[:, 0, 0]
    exported.batch_size = before
    np.testing.assert_array_equal(codes, again)
    start = exported.sequence(image_to_draw((1, 3)))
    logits = log_probabilities(exported, TokenSequence.join([prompt, start]))[-1, 40:48]
    expected = np.exp(logits) / np.exp(logits).sum()
    # Five standard errors of a share of 2000 draws.
    np.testing.assert_allclose(np.bincount(codes, minlength=8) / 2000, expected, atol=5 * 0.5 / np.sqrt(2000))


def test_an_answer_is_the_likeliest_continuation(exported):
    image = whole_image(np.array([[1, 2], [3, 4]]), use=ImageUse.UNDERSTAND)
    sequence = exported.sequence(image, "q")
    possible = [*range(27), 29]  # letters and the end of the document; the image controls are unlikely here
    answer = ""
    for _ in range(6):
        likeliest = possible[int(log_probabilities(exported, sequence)[-1, possible].argmax())]
        if likeliest == 29:
            break
        answer += "abcdefghijklmnopqrstuvwxyz?"[likeliest]
        sequence = TokenSequence.join([sequence, TokenSequence(np.array([likeliest]), np.array([0], dtype=np.int8))])
    assert len(answer) > 1
    assert exported.answer(image, "q", max_tokens=6).replace(" ", "") == answer


def test_a_picture_of_an_unknown_size_is_the_users_mistake(exported):
    with pytest.raises(DataError, match=r"3x3 codes has no resolution id; the vocabulary has 2x2, 1x3"):
        exported.sequence(whole_image(np.zeros((3, 3), dtype=int), use=ImageUse.UNDERSTAND))


def test_parameters_are_counted(exported):
    # embedding and output 2 * 48 * 32; norms 5 * 32; a block: attention 32 * (32 + 16 + 16 + 32),
    # routers 6 * 32, six experts and a shared one of 3 * 16 * 32
    block = 32 * 96 + 6 * 32 + 7 * 3 * 16 * 32
    assert exported.num_parameters == 2 * 48 * 32 + 5 * 32 + 2 * block


def test_a_folder_that_is_no_export_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        ExportedModel.load(tmp_path)
