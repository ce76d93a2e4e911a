"""Other people's layouts against the documents they mean, written by hand."""

import hashlib
import json

import pytest

from symbiotic.data.formats import FORMATS, corpus_format
from symbiotic.data.readers import RawRecord, parse
from symbiotic.errors import DataError
from symbiotic.tokens.documents import ImageSegment, ImageUse, RecordError

READ, DRAW = ImageUse.UNDERSTAND, ImageUse.GENERATE


def segments_of(name: str, value: object) -> list[tuple]:
    """(text, loss) and (image, use, loss) of the document."""
    document = parse(RawRecord("folder/corpus.jsonl", 3, value, 0), format=corpus_format(name))
    return [
        (segment.path or segment.data, segment.use, segment.loss)
        if isinstance(segment, ImageSegment)
        else (segment.text, segment.loss)
        for segment in document.segments
    ]


def identity_of(name: str, value: object) -> str:
    return parse(RawRecord("folder/corpus.jsonl", 3, value, 0), format=corpus_format(name)).id


def test_plain_text():
    assert segments_of("text", {"text": "a <image> b", "url": "x", "meta": 4}) == [("a <image> b", True)]
    assert identity_of("text", {"text": "a"}) == "corpus.jsonl:3"
    assert identity_of("text", {"text": "a", "id": 17}) == "17"
    record = RawRecord("a.jsonl", 1, {"text": "a", "meta": {"license": "MIT"}}, 0)
    assert parse(record, format=corpus_format("text")).license == "MIT"


def test_llava():
    value = {
        "id": "1",
        "image": ["a.jpg", "b.jpg"],
        "conversations": [
            {"from": "human", "value": "<image>\nAnd <image>?"},
            {"from": "gpt", "value": "Two <image> tags."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    }
    assert segments_of("llava", value) == [
        ("a.jpg", READ, False),
        ("\nAnd ", False),
        ("b.jpg", READ, False),
        ("?\n", False),
        ("Two <image> tags.\n", True),
        ("Sure?\n", False),
        ("Yes.\n", True),
    ]
    only_text = {"id": "2", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    assert segments_of("llava", only_text) == [("Hi\n", False), ("Hello\n", True)]


def test_obelics():
    value = {"images": [None, "1.png", None, {"bytes": b"png", "path": None}], "texts": ["a", None, "b", None]}
    assert segments_of("obelics", value) == [
        ("a", True), ("1.png", READ, False), ("b", True), (b"png", READ, False),
    ]  # fmt: skip


def test_mmc4():
    images = [
        {"image_name": "late.png", "matched_text_index": 1},
        {"image_name": "first.png", "matched_text_index": 0, "matched_sim": 0.3},
        {"image_base64": "iVBORw0KGgo=", "image_name": "later.png", "matched_text_index": 1},
        {"image_base64": "Qk0=", "matched_text_index": 1},
    ]
    value = {"url": "https://a.b", "text_list": ["a", "b"], "image_info": images, "similarity_matrix": [[1]]}
    assert segments_of("mmc4", value) == [
        ("first.png", READ, False),
        ("a", True),
        ("late.png", READ, False),
        (b"\x89PNG\r\n\x1a\n", READ, False),
        (b"BM", READ, False),
        ("b", True),
    ]


def test_bagel_text_to_image_chooses_a_caption_by_the_records_name():
    captions = {"short": "A cat.", "long": "A cat on a mat."}
    value = {"image": b"png", "captions": json.dumps(captions)}
    chosen = list(captions.values())[int(hashlib.sha256(b"corpus.jsonl:3").hexdigest()[:16], 16) % 2]
    assert segments_of("bagel_text_to_image", value) == [(chosen, False), (b"png", DRAW, True)]
    found = {segments_of("bagel_text_to_image", value | {"id": f"{n}"})[0][0] for n in range(20)}
    assert found == set(captions.values())


def test_bagel_editing():
    value = {"image_list": [b"1", b"2", b"3"], "instruction_list": [["Make it red."], "Make it blue."]}
    assert segments_of("bagel_editing", value) == [
        (b"1", READ, False),
        ("Make it red.", False),
        (b"2", DRAW, True),
        (b"2", READ, False),
        ("Make it blue.", False),
        (b"3", DRAW, True),
    ]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("text", {"txt": "a"}, "text is absent"),
        ("text", {"text": 5}, "text is int"),
        ("text", {"text": ""}, "give text of at least one character"),
        ("text", ["a"], "the record is list"),
        ("llava", {"image": "a.png", "conversations": [{"from": "human", "value": "Hi"}]}, "0 <image> for 1 images"),
        ("llava", {"conversations": [{"from": "human", "value": "<image>"}]}, "1 <image> for 0 images"),
        ("llava", {"conversations": [{"from": "alien", "value": "Hi"}]}, "from is 'alien'"),
        ("llava", {"conversations": [{"from": "gpt"}]}, "value is absent"),
        ("llava", {"conversations": []}, "the document has no segments"),
        ("obelics", {"images": ["a.png"], "texts": ["a", "b"]}, "1 images and 2 texts"),
        ("obelics", {"images": ["a.png"], "texts": ["a"]}, "slot 0 has both"),
        ("obelics", {"images": [None], "texts": [None]}, "slot 0 has neither"),
        ("obelics", {"images": ["https://a/b.png"], "texts": [None]}, "download the images"),
        ("obelics", {"images": ["../b.png"], "texts": [None]}, "leaves the image root"),
        ("obelics", {"images": [], "texts": []}, "the document has no segments"),
        ("mmc4", {"text_list": ["a"], "image_info": [{"matched_text_index": 1}]}, "matched with text 1"),
        ("mmc4", {"text_list": ["a"], "image_info": [{"matched_text_index": 0}]}, "image_info[0] holds no image"),
        ("mmc4", {"text_list": ["a"], "image_info": [{"matched_text_index": True}]}, "matched with text True"),
        ("bagel_text_to_image", {"image": b"x", "captions": "{"}, "captions isn't JSON"),
        ("bagel_text_to_image", {"image": b"x", "captions": "{}"}, "captions holds no texts"),
        ("bagel_text_to_image", {"captions": '{"a": "b"}'}, "image holds no image"),
        ("bagel_editing", {"image_list": [b"x"], "instruction_list": []}, "1 images and 0 instructions"),
        ("bagel_editing", {"image_list": [b"x", b"y"], "instruction_list": []}, "2 images and 0 instructions"),
        ("bagel_editing", {"image_list": [b"x", b"y"], "instruction_list": [[]]}, "instruction_list[0] holds no texts"),
    ],
)
def test_what_does_not_fit_is_refused(name, value, reason):
    with pytest.raises(RecordError) as refusal:
        segments_of(name, value)
    assert reason in refusal.value.reason
    assert str(refusal.value).startswith("folder/corpus.jsonl:3: ")


@pytest.mark.parametrize("name", FORMATS)
def test_any_json_value_is_a_document_or_a_named_refusal(name):
    values = [None, True, 0, 1.5, "a", [], {}, b"x"]
    keys = FORMATS[name].columns or ("id", "segments", "meta")
    for key in keys:
        for value in [*values, *([inner] for inner in values), *({"a": inner} for inner in values)]:
            with pytest.raises(DataError):
                segments_of(name, {key: value, "id": value} if key != "text" else {"text": [value]})
