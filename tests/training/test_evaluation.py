import pytest

from tests.support.ranks import run_ranks
from tests.training.tiny import tiny_file

EVALUATED = "tests.training.cases:evaluated"
TWO_BATCHES = "training.evaluation_batches=2"


def test_held_out_losses_are_means_over_the_labels_of_each_class(corpus, tmp_path):
    answer = run_ranks(EVALUATED, file=str(tiny_file(corpus, tmp_path / "run")), overrides=[TWO_BATCHES])[0]
    assert set(answer["losses"]) == {"text", "draw"}
    assert set(answer["losses"]["text"]) == {"text"} and set(answer["losses"]["draw"]) == {"text", "generation"}
    for source, losses in answer["expected"].items():
        assert answer["losses"][source] == pytest.approx(losses, rel=1e-6)
    assert answer["training"], "training goes on in training mode"


def test_evaluation_knows_no_dropout(corpus, tmp_path):
    dropout = ["TransformerConfig.hidden_dropout=0.5", "TransformerConfig.attention_dropout=0.5"]
    plain, dropped = (
        run_ranks(EVALUATED, file=str(tiny_file(corpus, tmp_path / name)), overrides=[TWO_BATCHES, *settings])[0]
        for name, settings in (("plain", []), ("dropout", dropout))
    )
    assert dropped["losses"] == dropped["again"] == plain["losses"]


def test_all_ranks_share_the_work_and_the_answer(corpus, tmp_path):
    file = tiny_file(corpus, tmp_path / "run")
    alone = run_ranks(EVALUATED, file=str(file), overrides=[TWO_BATCHES])[0]["losses"]
    both = run_ranks(EVALUATED, world_size=2, file=str(file), overrides=[TWO_BATCHES])
    assert both[0]["losses"] == both[1]["losses"]
    for source, losses in alone.items():
        assert both[0]["losses"][source] == pytest.approx(losses, rel=1e-6)
