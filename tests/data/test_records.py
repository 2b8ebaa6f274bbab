"""Records in the forms that people use: what is read, what stays text, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from nanovlm_fast.data import prepare
from nanovlm_fast.data.sources.llava import JsonLines
from nanovlm_fast.data.sources.registry import load_source
from nanovlm_fast.data.split import split_off
from nanovlm_fast.paths import at_home


def talk(*values: str, roles: tuple[str, str] = ("human", "gpt")) -> list[dict[str, str]]:
    return [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]


RECORDS = [{"id": i, "image": f"{i}.png", "conversations": talk(f"{i}?", "it")} for i in range(3)]


def written(folder: Path, content: bytes | list, name: str = "train.jsonl") -> JsonLines:
    folder.mkdir(exist_ok=True)
    if isinstance(content, list):
        content = "\n".join(json.dumps(record) for record in content).encode()
    (folder / name).write_bytes(content)
    return JsonLines("train", folder)


BOM = "\ufeff".encode()
LINES = "\n".join(json.dumps(record) for record in RECORDS).encode()
FORMS = {
    "an array": ("train.json", json.dumps(RECORDS).encode()),
    "an indented array": ("train.json", json.dumps(RECORDS, indent=2).encode()),
    "an array after a BOM": ("train.json", BOM + json.dumps(RECORDS).encode()),
    "an array named jsonl": ("train.jsonl", b" \n" + json.dumps(RECORDS).encode() + b"\n"),
    "lines named json": ("train.json", LINES),
    "a BOM": ("train.jsonl", BOM + LINES),
    "CRLF and blank lines": ("train.jsonl", LINES.replace(b"\n", b"\r\n \r\n") + b"\r\n"),
    "files put together, each with its BOM": (
        "train.jsonl",
        BOM + LINES.replace(b"\n", b"\n" + BOM),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_file_gives_the_same_examples(tmp_path, form):
    name, content = FORMS[form]
    source = written(tmp_path, content, name)
    assert [source[i].turns for i in range(len(source))] == [[(f"{i}?", "it")] for i in range(3)]
    assert [source[i].images for i in range(3)] == [[tmp_path / f"{i}.png"] for i in range(3)]
    assert str(tmp_path / name) in source[0].name


def test_a_bad_element_of_an_array_is_named_by_its_number(tmp_path):
    content = json.dumps([*RECORDS, {"image": "a.png"}]).encode().replace(b'"it"', b'"\xff"', 1)
    source = written(tmp_path, content, "train.json")
    assert len(source) == 4 and source[1].turns == [("1?", "it")]
    for index in (0, 3):
        with pytest.raises(ValueError, match=rf"train\.json: record {index + 1}: not a record"):
            source[index]


@pytest.mark.parametrize("content", [b'[{"a": 1}', b'[{"a": 1} {}]', b"[{}] x", b"[" * 100_000])
def test_a_damaged_array_is_one_line_with_its_file(tmp_path, content):
    with pytest.raises(ValueError, match=r"train\.json is damaged: .") as caught:
        written(tmp_path, content, "train.json")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_records_inside_an_object_are_one_line_that_says_where(tmp_path, name, indent):
    content = json.dumps({"version": 1, "data": RECORDS}, indent=indent).encode()
    with pytest.raises(ValueError, match=rf"{name} is one object, with a list under 'data': save"):
        written(tmp_path, b"\xef\xbb\xbf" + content, name)
    alone = {"image": "a.png", "conversations": talk("What?", "A cat.")}
    assert len(written(tmp_path, json.dumps(alone).encode(), name)) == 1, "one record is no list"


def test_utf16_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"train\.jsonl is UTF-16"):
        written(tmp_path, LINES.decode().encode("utf-16"))


@pytest.mark.parametrize("named", ["a.png", ["a.png", "b.png"]])
def test_images_is_as_good_as_image(tmp_path, named):
    record = {"image_id": 7, "conversations": talk("What?", "A cat.")}
    ours, theirs = (written(tmp_path, [{key: named, **record}])[0] for key in ("images", "image"))
    assert ours == theirs and len(ours.images) == (1 if named == "a.png" else 2)


def test_a_record_may_say_that_it_has_no_picture(tmp_path):
    named = [(key, value) for key in ("image", "images", "img") for value in (None, "", [])]
    records = [{key: value, "conversations": talk("One?", "two")} for key, value in named]
    source = written(tmp_path, records)
    assert all(source[i].images == [] for i in range(9))


OTHER_NAMES = (
    "img Image IMAGES image_path imagePath image_file img_path image_url picture photo photos pic "
    "image1 image_0 video videos audio image_list image_base64 main_image pil_image screenshot "
    "file_name media"
).split()


@pytest.mark.parametrize("key", OTHER_NAMES)
def test_a_picture_under_another_name_is_refused_by_it(tmp_path, key):
    """The model would be trained on such a record without its picture."""
    source = written(tmp_path, [{key: "a.png", "conversations": talk("What?", "A cat.")}])
    with pytest.raises(ValueError, match=rf"train\.jsonl:1: .*{key}.*'image' or 'images'"):
        source[0]


def test_a_picture_deeper_in_a_record_is_refused(tmp_path):
    asked, said = talk("What is in a.png?", "A cat.png")
    deeper = [
        {"data": {"files": ["a.png"]}, "conversations": [asked, said]},
        {"conversations": [{**asked, "image": "a.png"}, said]},
        {"image_data": {"bytes": "aGVsbG8="}, "conversations": [asked, said]},
    ]
    plain = {"id": "7", "has_image": False, "conversations": [asked, said]}
    source = written(tmp_path, [*deeper, plain])
    for index in range(len(deeper)):
        with pytest.raises(ValueError, match=rf":{index + 1}: .*'image' or 'images'"):
            source[index]
    assert source[3].images == [], "what a turn says is no picture"


def test_what_says_two_things_is_refused(tmp_path):
    both = {"image": "a.png", "images": ["b.png"], "conversations": talk("a", "b")}
    twice = {"conversations": talk("a", "b"), "messages": [{"role": "user", "content": "c"}]}
    source = written(tmp_path, [both, twice])
    with pytest.raises(ValueError, match=r":1: .*'image' and under 'images'"):
        source[0]
    with pytest.raises(ValueError, match=r":2: .*'conversations' and 'messages'"):
        source[1]


def test_a_system_turn_stands_before_every_question(tmp_path):
    system = {"from": "system", "value": "Answer in French. "}
    record = {
        "image": "a.png",
        "conversations": [system, *talk("<image>\nRed?", "Oui", "Why?", "Car")],
    }
    turns = written(tmp_path, [record])[0].turns
    assert turns == [("Answer in French.\nRed?", "Oui"), ("Answer in French.\nWhy?", "Car")]


def test_an_image_mark_in_an_answer_is_text_or_refused_but_never_gone(tmp_path):
    html = talk("<image>\nWrite it as a page.", "<p> <image> </p>", "Again?", "<image>")
    records = [
        {"image": "a.png", "conversations": html},
        {"conversations": talk("A tag?", "<image>")},
    ]
    misplaced = [{"image": "a.png", "conversations": talk("Draw a cat.", "<image>")}]
    source = written(tmp_path, records + misplaced)
    assert source[0].turns == [("Write it as a page.", "<p> <image> </p>"), ("Again?", "<image>")]
    assert source[1].turns == [("A tag?", "<image>")]
    with pytest.raises(ValueError, match=r"train\.jsonl:3: <image> in an answer"):
        source[2]


def test_openais_messages_are_read(tmp_path):
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    chats = [
        [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}],
        [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        ],
    ]
    records = [{"messages": chat, "images": ["a.png"]} for chat in chats]
    other = [
        [{"type": "image_url", "image_url": {"url": "http://x/a.png"}}],
        [{"type": "image", "image": "a.png"}],
    ]
    asked = [{"role": "user", "content": content} for content in other]
    records += [{"messages": [question, chats[0][1]]} for question in asked]
    source = written(tmp_path, records)
    for index in (0, 1):
        assert source[index].turns == [("What?", "A cat.")]
        assert source[index].images == [tmp_path / "a.png"]
    for index in (2, 3):
        with pytest.raises(ValueError, match=rf":{index + 1}: .*name pictures under 'image'"):
            source[index]


@pytest.mark.parametrize("content", [b"", b"\n \r\n", BOM, b"[]", b" [ ] "])
def test_an_empty_file_is_named(tmp_path, content):
    source = written(tmp_path, content)
    said = r"--data jsonl:x: the data set is empty: no record in .*train\.jsonl"
    with pytest.raises(ValueError, match=said):
        split_off(source, 1, 0, "jsonl:x")


def test_home_is_where_the_shell_says_in_every_form_of_data(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    written(tmp_path, RECORDS[:1])
    options = f"--out {tmp_path}/out --workers 0 --vit-img-size 32 --mp-pixel-shuffle-factor 2"
    assert prepare.main(f"--data jsonl:~ {options}".split()) == 0
    for data in ("jsonl:~", "prepared:~/out", "~/out"):
        assert load_source(data, "train")[0].turns == [("0?", "it")], data
    assert at_home("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x"), "no traceback"
