"""Datasets from the ``data`` section of a configuration."""

import numpy as np
import pytest

from symbiotic.data.blend import Mixture
from symbiotic.data.sources import build_training_dataset, build_validation_datasets, stage_mixtures
from symbiotic.errors import DataError
from tests.config.trees import config
from tests.data.corpora import Text, make_vocabulary, write_shard

VOCABULARY = make_vocabulary()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for number, name in enumerate(("text", "digits", "held-out")):
        write_shard(folder / name, [[Text((number, place))] for place in range(30)], VOCABULARY)
    return folder


def sources(folder, *names: str) -> list[dict]:
    return [{"name": name, "prefix": str(folder / name)} for name in names]


def run_config(folder, **changes):
    data = {
        "data.sources": sources(folder, "text", "digits"),
        "data.validation": sources(folder, "held-out"),
        "model.sequence_length": 16,
    }
    return config(**{**data, **changes})


def test_stages_without_mixture_take_the_sources_weights():
    made = config(**{"data/sources/1/weight": 3.0})
    weights = {"text": 1.0, "digits": 3.0}
    assert stage_mixtures(made) == [Mixture(0, weights), Mixture(5 * 16, weights)]


def test_a_stage_starts_at_its_first_sample():
    made = config(**{"stages/1/mixture": {"digits": 2.0}})
    assert stage_mixtures(made) == [Mixture(0, {"text": 1.0, "digits": 1.0}), Mixture(80, {"digits": 2.0})]


def test_the_data_seed_defaults_to_the_runs():
    assert config(**{"run.seed": 7}).data_seed == 7
    assert config(**{"run.seed": 7, "data.seed": 8}).data_seed == 8


def test_training_reads_the_sources_by_stage(folder):
    blend = build_training_dataset(run_config(folder, **{"stages/1/mixture": {"digits": 1.0}}), vocabulary=VOCABULARY)
    assert blend.names == ["text", "digits"]
    numbers, _ = blend.draws(0, 200)
    assert set(numbers[:80]) == {0, 1} and set(numbers[80:]) == {1}
    assert blend.sample(100)["tokens"][0] == 1
    assert blend.sample(100)["tokens"].shape == (16,)


def test_validation_does_not_depend_on_the_seed(folder):
    first, second = (
        build_validation_datasets(run_config(folder, **{"run.seed": seed}), vocabulary=VOCABULARY)["held-out"]
        for seed in (1, 2)
    )
    for index in range(len(first)):
        np.testing.assert_array_equal(first.sample(index)["tokens"], second.sample(index)["tokens"])


def test_training_depends_on_the_seed(folder):
    first, second = (
        build_training_dataset(run_config(folder, **{"run.seed": seed}), vocabulary=VOCABULARY) for seed in (1, 2)
    )
    assert any(first.sample(n)["tokens"].tolist() != second.sample(n)["tokens"].tolist() for n in range(10))


def test_a_missing_shard_is_named(folder):
    made = run_config(folder, **{"data.sources": sources(folder, "text", "nowhere")})
    with pytest.raises(DataError, match=r"nowhere\.manifest\.json: there is no shard of this prefix"):
        build_training_dataset(made, vocabulary=VOCABULARY)
