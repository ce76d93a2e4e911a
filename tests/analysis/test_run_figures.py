import numpy as np
import pytest
from matplotlib.colors import to_rgb

from symbiotic.analysis.run_figures import (
    FAINTEST,
    GROUP_COLOURS,
    drift_curves,
    gradient_curves,
    load_maps,
    load_picture,
    probe_curves,
    rate_curves,
    routing_maps,
    step_edges,
)
from symbiotic.analysis.runs import read_run
from tests.analysis.run_folder import write_run
from tests.analysis.test_figures import svg_text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read_run(write_run(tmp_path_factory.mktemp("figures") / "run"))


def shows(picture, *words):
    text = svg_text(picture)
    return [word for word in words if f"<!-- {word} -->" not in text] == []


def test_an_expert_has_its_groups_hue_and_its_load_as_strength():
    """method.md section 6: load by expert, with the groups of the partition."""
    load, groups = np.array([[0.0, 0.5, 0.25, np.nan]]), np.array([[0, 0, 1, 1]])
    picture = load_picture(load, groups, ["#000000", "#ff0000"], largest=0.5)
    half = FAINTEST + (1 - FAINTEST) / 2
    expected = [[1 - FAINTEST] * 3, [0, 0, 0], [1, 1 - half, 1 - half], [1, 1 - FAINTEST, 1 - FAINTEST]]
    np.testing.assert_allclose(picture, [expected], atol=1e-12)


def test_load_maps_show_the_first_and_the_last_step_of_every_type(run):
    picture = load_maps(run.log.routing, run.partition)
    titles = [f"{name}, step {step}" for name in ("text", "generation_code", "all") for step in (5, 10)]
    assert shows(picture, *titles, "group understanding", "group generation")
    assert picture.data == load_maps(run.log.routing, run.partition).data


def test_load_maps_use_the_colours_of_the_partition(run, monkeypatch):
    seen = []

    def spy(load, groups, colours, **scale):
        seen.append((load, groups, colours, scale["largest"]))
        return load_picture(load, groups, colours, **scale)

    monkeypatch.setattr("symbiotic.analysis.run_figures.load_picture", spy)
    load_maps(run.log.routing, run.partition)
    # Columns are text, understanding_code, generation_code and all, each at two steps.
    load, groups, colours, largest = seen[4]
    np.testing.assert_array_equal(groups, run.partition.assignment)
    assert colours == list(GROUP_COLOURS[:2])
    generation = run.partition.assignment == 1
    np.testing.assert_allclose(load.sum(axis=1), 1.0)
    np.testing.assert_allclose(load[~generation], 0.0)
    assert largest == pytest.approx(1 / 3)
    assert np.allclose(to_rgb(colours[1]), [0xD2 / 255, 0x55 / 255, 0x2D / 255])


def test_load_maps_of_one_step_and_without_a_partition(run):
    only = {5: run.log.routing[5]}
    text = svg_text(load_maps(only, None))
    assert "<!-- text, step 5 -->" in text
    assert "step 10" not in text
    assert "<!-- group all -->" in text


def test_a_type_that_came_later_has_an_empty_map(run):
    first = run.log.routing[5]
    without = first | {"types": {name: values for name, values in first["types"].items() if name != "generation_code"}}
    routing = {5: without, 10: run.log.routing[10]}
    assert shows(load_maps(routing, run.partition), "generation_code, step 5", "generation_code, step 10")
    assert shows(routing_maps(routing, run.log.stages), "capacity rate, generation_code")


def test_columns_of_a_map_reach_halfway_to_their_neighbours():
    np.testing.assert_allclose(step_edges([10, 20, 40]), [5, 15, 30, 50])
    np.testing.assert_allclose(step_edges([7]), [6.5, 7.5])


def test_routing_maps_have_a_panel_for_every_metric_and_type(run):
    titles = [
        f"{metric}, {name}"
        for metric in ("entropy (nats)", "dead experts", "capacity rate")
        for name in ("text", "understanding_code", "generation_code", "all")
    ]
    assert shows(routing_maps(run.log.routing, run.log.stages), *titles)


def test_curves_name_what_they_show_and_mark_the_stages(run):
    stages = run.log.stages
    drift = drift_curves(run.log.drift, stages)
    assert shows(drift, "routing of text tokens", "mean over blocks", "warm-up", "release")
    gradients = gradient_curves(run.log.gradients, stages)
    assert shows(gradients, "gradient norm by loss class", "cosine by rows", "understanding/generation", "other")
    assert shows(probe_curves(run.log.probes, stages), "source: held-out", "text, shared only", "generation, whole")
    assert not shows(probe_curves(run.log.probes, stages), "understanding, whole")


def test_rates_that_are_equal_share_a_line(run):
    picture = rate_curves(run.rates, run.log.stages)
    assert shows(picture, "attention, norm", "expert.generation", "head")
