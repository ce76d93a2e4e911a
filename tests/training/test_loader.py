from tests.support.ranks import run_ranks
from tests.training.tiny import SEQUENCE, tiny_file

LOADED = "tests.training.cases:loaded_batches"


def test_a_tensor_parallel_group_reads_once_and_agrees(corpus, tmp_path):
    """Every tensor of every microbatch, its dtype included, on both ranks as in one process."""
    file = tiny_file(corpus, tmp_path / "run")
    alone = run_ranks(LOADED, file=str(file), overrides=[], step=3)[0]
    settings = ["TransformerConfig.tensor_model_parallel_size=2", "TransformerConfig.sequence_parallel=true"]
    first, second = run_ranks(LOADED, world_size=2, layout={"tensor": 2}, file=str(file), overrides=settings, step=3)
    assert len(first) == 4 and len(first[0]["tokens"][0][0]) == SEQUENCE
    for batch, copy, expected in zip(first, second, alone, strict=True):
        assert batch == expected
        assert copy == {name: value for name, value in expected.items() if name in copy}
        assert {"tokens", "labels", "token_types", "loss_classes", "loss_weights", "document_ids"} <= set(copy)


def test_every_pipeline_stage_has_the_whole_batch(corpus, tmp_path):
    file = tiny_file(corpus, tmp_path / "run")
    settings = ["TransformerConfig.pipeline_model_parallel_size=2"]
    first, last = run_ranks(LOADED, world_size=2, layout={"pipeline": 2}, file=str(file), overrides=settings, step=0)
    assert first == last


def test_data_parallel_ranks_share_the_microbatches_of_one(corpus, tmp_path):
    """Microbatch j goes to rank j mod 2."""
    file = tiny_file(corpus, tmp_path / "run")
    alone = run_ranks(LOADED, file=str(file), overrides=[], step=1)[0]
    first, second = run_ranks(LOADED, world_size=2, file=str(file), overrides=[], step=1)
    assert [first[0], second[0], first[1], second[1]] == alone
