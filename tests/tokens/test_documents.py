import base64
import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from symbiotic.data.codecs import png_bytes
from symbiotic.errors import DataError
from symbiotic.tokens.documents import ImageSegment, ImageUse, RecordError, TextSegment, parse_record

RECORD = {
    "id": "doc-17",
    "segments": [
        {"type": "text", "text": "Draw a seven.", "loss": False},
        {"type": "image", "image": "images/7.png", "use": "generate"},
        {"type": "image", "tokens": [[12, 9], [4, 63]], "use": "understand"},
        {"type": "text", "text": "This is a seven."},
    ],
    "meta": {"source": "x", "license": "CC-BY-4.0"},
}
"""The example of the schema."""


def parse(record):
    return parse_record(record, file="corpus.jsonl", line=3)


def image(**keys):
    """A record of one image segment."""
    return {"id": "a", "segments": [{"type": "image", **keys}]}


def test_the_schemas_example():
    document = parse(RECORD)
    first, generated, read, last = document.segments
    assert (first, last) == (TextSegment(text="Draw a seven.", loss=False), TextSegment(text="This is a seven."))
    assert (generated.path, generated.use, generated.loss) == ("images/7.png", ImageUse.GENERATE, True)
    assert (read.use, read.loss) == (ImageUse.UNDERSTAND, False)
    np.testing.assert_array_equal(read.codes, [[12, 9], [4, 63]])
    assert (document.id, document.source, document.line, document.license) == ("doc-17", "corpus.jsonl", 3, "CC-BY-4.0")


@pytest.mark.parametrize("loss", [None, True, False])
def test_both_is_generated_and_then_clean_context(loss):
    record = image(tokens=[[1]], use="both") if loss is None else image(tokens=[[1]], use="both", loss=loss)
    first, second = parse(record).segments
    assert (first.use, first.loss) == (ImageUse.GENERATE, loss is not False)
    assert (second.use, second.loss) == (ImageUse.UNDERSTAND, False)


def test_image_bytes_in_every_form():
    data = png_bytes(np.zeros((2, 2, 1), dtype=np.uint8))
    encoded = base64.b64encode(data).decode()
    for form in (data, encoded, f"data:image/png;base64,{encoded}"):
        (segment,) = parse(image(image=form, use="understand")).segments
        assert isinstance(segment, ImageSegment)
        assert (segment.data, segment.path) == (data, None)


def change(path, value):
    """The example with one value replaced (or, by KeyError, removed)."""
    record = copy.deepcopy(RECORD)
    *parents, last = path
    target = record
    for step in parents:
        target = target[step]
    if value is KeyError:
        del target[last]
    else:
        target[last] = value
    return record


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (["a"], "the record is a list"),
        (change(["id"], KeyError), "the record lacks the key 'id'"),
        (change(["id"], 17), "id is 17"),
        (change(["id"], "\ud800"), "id holds half of a surrogate pair"),
        (change(["ids"], "x"), "the record has the unknown key 'ids'"),
        (change(["meta"], "x"), "meta is text"),
        (change(["meta", "license"], 4), "meta.license is a number"),
        (change(["segments"], []), "the document has no segments"),
        (change(["segments"], {}), "the document has no segments"),
        (change(["segments", 0], "Draw"), r"segments\[0\] is text"),
        (change(["segments", 0, "type"], "txt"), r"segments\[0\].type is 'txt'; write text or image"),
        (change(["segments", 0, "text"], ""), r"segments\[0\].text is ''"),
        (
            change(["segments", 0, "text"], "a\udfff"),
            "half of a surrogate pair at character 1",
        ),
        (change(["segments", 0, "loss"], 0), r"segments\[0\].loss is 0; write true or false"),
        (change(["segments", 0, "use"], "both"), r"segments\[0\] has the unknown key 'use'"),
        (change(["segments", 1, "use"], "draw"), r"segments\[1\].use is 'draw'; write understand, generate or both"),
        (change(["segments", 1, "use"], KeyError), r"segments\[1\] lacks the key 'use'"),
        (change(["segments", 1, "tokens"], [[1]]), r"segments\[1\] has both of image and tokens"),
        (change(["segments", 1, "image"], KeyError), r"segments\[1\] has neither of image and tokens"),
        (change(["segments", 1, "image"], "/etc/passwd"), "leaves the image root"),
        (change(["segments", 1, "image"], "a/../../b.png"), "leaves the image root"),
        (change(["segments", 1, "image"], ""), r"segments\[1\].image is empty"),
        (change(["segments", 1, "image"], "data:image/png,x"), "a data: URI without base64"),
        (change(["segments", 1, "image"], "data:image/png;base64,x"), "isn't valid base64"),
        (change(["segments", 1, "image"], "data:image/png;base64,"), "holds no bytes"),
        (change(["segments", 2, "tokens"], [[1, 2], [3]]), "rows of different lengths"),
        (change(["segments", 2, "tokens"], [1, 2]), "no list of rows"),
        (change(["segments", 2, "tokens"], [[]]), "no list of rows"),
        (change(["segments", 2, "tokens"], [[1, -1]]), "holds -1"),
        (change(["segments", 2, "tokens"], [[1, True]]), "holds True"),
        (change(["segments", 2, "tokens"], [[1, 2.0]]), "holds 2.0"),
        (change(["segments", 2, "tokens"], [[2**40]]), "holds 1099511627776"),
    ],
)
def test_every_mistake_is_one_sentence_with_its_place(record, reason):
    with pytest.raises(RecordError, match=reason) as refusal:
        parse(record)
    error = refusal.value
    assert (error.file, error.line) == ("corpus.jsonl", 3)
    assert str(error) == f"corpus.jsonl:3: {error.reason}"
    assert "\n" not in error.reason


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "type", "text", "x"]), inner),
    max_leaves=8,
)
PLACES = [
    ["id"],
    ["segments"],
    ["segments", 0],
    ["segments", 0, "type"],
    ["segments", 0, "text"],
    ["segments", 0, "loss"],
    ["segments", 1, "image"],
    ["segments", 1, "use"],
    ["segments", 2, "tokens"],
    ["meta"],
    ["meta", "license"],
]


@given(place=st.sampled_from(PLACES), value=json_values)
def test_any_json_value_is_parsed_or_refused_by_name(place, value):
    try:
        document = parse(change(place, value))
    except DataError as error:
        assert str(error).startswith("corpus.jsonl:3: ")
    else:
        assert document.segments
