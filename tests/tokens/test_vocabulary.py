import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from symbiotic.errors import DataError
from symbiotic.tokens.vocabulary import IMAGE_CONTROLS, TEXT_CONTROLS, VocabularyLayout


def build(**changes) -> VocabularyLayout:
    options = {
        "text_size": 1000,
        "codebook_size": 64,
        "resolutions": [(4, 4), (6, 16)],
        "multiple": 64,
        "tokenizer_digest": "abc",
    }
    return VocabularyLayout.build(**options | changes)


@pytest.fixture
def edit(tmp_path):
    """Saves a layout, changes its JSON tree by a function and gives the path back."""

    def edited(change) -> str:
        path = tmp_path / "vocabulary.json"
        tree = build().to_dict()
        change(tree)
        path.write_text(json.dumps(tree))
        return str(path)

    return edited


def test_ids_by_hand():
    layout = build()
    assert (layout.bos, layout.eod, layout.pad, layout.begin_understanding_image) == (1000, 1001, 1002, 1003)
    assert (layout.text_part, layout.image_part, layout.size) == (1024, 128, 1152)
    assert (layout.begin_generation_image, layout.end_of_image, layout.end_of_row) == (1024, 1025, 1026)
    assert layout.resolutions == {1027: (4, 4), 1028: (6, 16)}
    assert (layout.resolution_id(6, 16), layout.resolution(1027)) == (1028, (4, 4))
    assert layout.image_offset == 1024 + 64


@given(
    text_size=st.integers(1, 5000),
    codebook_size=st.integers(0, 5000),
    resolutions=st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), max_size=20, unique=True),
    multiple=st.sampled_from([1, 8, 64, 1024]),
)
def test_ids_never_overlap_and_parts_are_padded(text_size, codebook_size, resolutions, multiple):
    layout = build(text_size=text_size, codebook_size=codebook_size, resolutions=resolutions, multiple=multiple)
    ids = [*range(text_size), *layout.controls.values(), *layout.resolutions]
    ids += range(layout.image_offset, layout.image_offset + codebook_size)
    assert len(set(ids)) == len(ids)
    assert np.flatnonzero(layout.used_mask()).tolist() == sorted(ids)
    assert layout.text_part % multiple == layout.image_part % multiple == 0
    assert all(layout.controls[name] < layout.text_part for name in TEXT_CONTROLS)
    assert all(layout.text_part <= layout.controls[name] for name in IMAGE_CONTROLS)
    assert all(layout.resolution_id(*layout.resolution(token)) == token for token in layout.resolutions)


def test_file_round_trip(tmp_path):
    build().save(tmp_path / "vocabulary.json")
    loaded = VocabularyLayout.load(tmp_path / "vocabulary.json")
    assert loaded == build()
    assert loaded.digest == build().digest


def test_digest_leaves_padding_out_and_nothing_else():
    layout = build()
    assert replace(layout, image_part=layout.image_part + 64).digest == layout.digest
    others = [
        build(text_size=999),
        build(codebook_size=63),
        build(resolutions=[(6, 16), (4, 4)]),
        build(tokenizer_digest="abd"),
        build(image_control_slots=65),
        replace(layout, controls=layout.controls | {"bos": layout.eod, "eod": layout.bos}),
    ]
    digests = {other.digest for other in others} | {layout.digest}
    assert len(digests) == len(others) + 1


def test_ids_are_read_from_the_file_not_computed_again(edit):
    """A later release may lay new vocabularies out otherwise; a file keeps its ids."""
    swapped = replace(build(), controls=build().controls | {"end_of_row": 1025, "end_of_image": 1026})
    path = edit(lambda tree: tree.update(swapped.to_dict()))
    assert VocabularyLayout.load(path).end_of_row == 1025


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(version=2), "version 2 is no vocabulary layout"),
        (lambda tree: tree["used"].update(codebook_size=63), "the digest .* isn't that of its content"),
        (lambda tree: tree["used"].update(surprise=1), "not a vocabulary layout"),
        (lambda tree: tree["used"].pop("controls"), "not a vocabulary layout"),
        (lambda tree: tree["used"]["controls"].pop("eod"), r"the controls \['eod'\] are missing or unknown"),
        (lambda tree: tree["used"]["controls"].update(eod=1000), "overlap or leave their part"),
        (lambda tree: tree["used"].update(image_offset=1024), "overlap or leave their part"),
        (lambda tree: tree["used"].update(text_size="1000"), "text_size is '1000', not a whole number"),
        (lambda tree: tree["padded"].update(image_part=64), "overlap or leave their part"),
        (lambda tree: tree["used"]["resolutions"][0].update(rows=0), "no rows or columns"),
        (lambda tree: tree["used"]["resolutions"][0].update(rows=4.0), "a number of a resolution is 4.0, not a whole"),
        (lambda tree: tree["used"]["controls"].update(eod="1001"), "controls.eod is '1001', not a whole number"),
        (
            lambda tree: tree["used"].update(codebook_size=2**31),
            "codebook_size is 2147483648, not a whole number from 0",
        ),
        (lambda tree: tree.update(surprise=1), "it has keys or an order that no layout has"),
        (lambda tree: tree["used"]["resolutions"].reverse(), "it has keys or an order that no layout has"),
    ],
)
def test_edited_files_are_refused_by_name(edit, change, message):
    path = edit(change)
    with pytest.raises(DataError, match=message) as refusal:
        VocabularyLayout.load(path)
    assert str(refusal.value).startswith(f"{path}: ")


def test_missing_file_and_broken_json(tmp_path):
    path = tmp_path / "vocabulary.json"
    with pytest.raises(DataError, match=r"vocabulary\.json: the vocabulary can't be read \(No such file"):
        VocabularyLayout.load(path)
    path.write_text("{")
    with pytest.raises(DataError, match=r"vocabulary\.json: the vocabulary isn't JSON"):
        VocabularyLayout.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_size": 0}, "can't be built"),
        ({"resolutions": [(4, 4), (4, 4)]}, "name one size twice"),
        ({"resolutions": [(4, 0)]}, "no rows or columns"),
        ({"image_control_slots": 4}, "at least 5 image control slots"),
    ],
)
def test_impossible_layouts(changes, message):
    with pytest.raises(DataError, match=message):
        build(**changes)


def test_unknown_resolutions_are_named():
    with pytest.raises(DataError, match=r"5x4 codes has no resolution id in the vocabulary \(it has 4x4, 6x16\)"):
        build().resolution_id(5, 4)
    with pytest.raises(DataError, match="id 1029 is no resolution"):
        build().resolution(1029)
