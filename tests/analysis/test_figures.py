import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from symbiotic.analysis.expert_use import ExpertUse
from symbiotic.analysis.figures import expert_use_maps, loss_curves, reading_grid, sample_grid, smooth
from symbiotic.analysis.run_log import RunLog


def log(name="generation"):
    return RunLog(
        name=name,
        loss={"text": [(step, 5.0 - 0.01 * step) for step in range(1, 200)], "generation": [(9, 4.0)]},
        held_out={("text", "prose"): [(50, 4.6), (100, 4.2)], ("text", "digits"): [(50, 3.0)]},
        stages=[(0, "warm-up"), (60, "release")],
    )


def use(groups):
    counts = np.zeros((2, 16, 4), dtype=int)
    counts[:, 0] = [[5, 3, 2, 0], [0, 5, 5, 0]]
    counts[:, 2] = [[0, 0, 0, 10], [9, 0, 0, 1]]
    return ExpertUse(counts, (0, 1), groups)


def svg_text(picture):
    root = ElementTree.fromstring(picture.data)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    # matplotlib draws letters as paths and leaves the text as a comment
    return picture.data.decode()


def test_loss_curves_show_classes_and_stage_marks():
    text = svg_text(loss_curves([log("understanding"), log()]))
    for word in (
        "run: understanding",
        "run: generation",
        "warm-up",
        "release",
        "text, training",
        "text in prose, held out",
    ):
        assert f"<!-- {word} -->" in text
    assert text == loss_curves([log("understanding"), log()]).data.decode()


def test_loss_curves_of_a_run_that_logged_nothing():
    assert "run: empty" in svg_text(loss_curves([RunLog(name="empty")]))


def test_smoothing_keeps_a_line_a_line_and_shrinks_noise():
    steps, values = smooth([(step, 2.0 * step) for step in range(400)])
    np.testing.assert_allclose(values, 2.0 * steps)
    generator = np.random.default_rng(0)
    _, values = smooth([(step, generator.normal()) for step in range(400)])
    assert values.std() < 0.5
    assert smooth([(1, 3.0)])[1].tolist() == [3.0]


def test_expert_use_maps_mark_the_smaller_group():
    before = use((("all",) * 4,) * 2)
    after = use((("understanding",) * 3 + ("generation",), ("generation",) + ("understanding",) * 3))
    text = svg_text(expert_use_maps([("before", before), ("after", after)]))
    assert "<!-- before -->" in text
    assert "<!-- after (framed: generation group) -->" in text
    assert "<!-- block 1, generation_code -->" in text


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3)])
def test_sample_grid_is_a_png_with_pictures_in_it(shape):
    pictures = np.random.default_rng(0).integers(0, 17, size=(7, *shape)) / (16 if len(shape) == 3 else 1)
    labels = np.array([0, 0, 1, 1, 1, 3, 3])
    picture = sample_grid(pictures, labels, ["zero", "one", "two", "three"], per_class=3, title="Drawn")
    image = Image.open(io.BytesIO(picture.data))
    assert image.format == "PNG"
    assert len(image.convert("L").getcolors(256)) > 10
    assert picture.data_uri.startswith("data:image/png;base64,")


def test_reading_grid_shows_wrong_answers_in_red():
    pictures = np.random.default_rng(0).integers(0, 17, size=(3, 8, 8))

    def reds(answers):
        picture = reading_grid(pictures, answers, ["one", "two", "six"], columns=2, title="Read")
        pixels = np.asarray(Image.open(io.BytesIO(picture.data)).convert("RGB")).astype(int)
        return int((pixels[..., 0] - pixels[..., 1] > 100).sum())

    assert reds(["one", "two", "six"]) == 0
    assert reds(["one", "nine", "six"]) > 20
