"""The chat page's server, asked over HTTP: answers, limits, and who may ask."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import socket
import struct
import urllib.request
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanovlm_fast import generate as generating
from nanovlm_fast.chat import __main__ as command
from nanovlm_fast.chat.answer import limits_of
from nanovlm_fast.chat.server import UPLOAD, Server
from nanovlm_fast.config import TrainConfig
from nanovlm_fast.runs import save_run_config
from nanovlm_fast.weights.folder import read_config
from tests.support import forks
from tests.support.chats import ask, asked, chat_folder, plain_folder, request, serving
from tests.support.pictures import encoded, photograph

PICTURE = encoded(photograph(90, 60), "PNG")
QUESTION = "what is it?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {"chat": chat_folder(place / "chat"), "v0.1": plain_folder(place / "plain")}


@pytest.fixture(scope="module")
def chat(folders) -> Iterator[Server]:
    with serving(folders["chat"]) as server:
        yield server


@pytest.fixture(scope="module")
def plain(folders) -> Iterator[Server]:
    with serving(folders["v0.1"]) as server:
        yield server


def error_of(answer: tuple[int, dict[str, str], bytes], status: int) -> str:
    """The one line of a refusal."""
    assert answer[0] == status, answer[2]
    error = json.loads(answer[2])["error"]
    assert error and "\n" not in error and "0x" not in error
    return error


# ---- answers


@pytest.mark.parametrize("kind", ["chat", "v0.1"])
def test_the_answer_is_what_generate_says(kind, folders, chat, plain, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(PICTURE)
    options = ["--checkpoint", str(folders[kind]), "--image", str(tmp_path / "a.png")]
    options += ["--prompt", QUESTION, "--max-new-tokens", "6", "--device", "cpu"]
    assert generating.main(options) == 0
    said = capsys.readouterr().out.removesuffix("\n")
    *growing, last = ask(chat if kind == "chat" else plain, [PICTURE], QUESTION)
    texts = [line["text"] for line in growing]
    assert said and "".join(last["pieces"]).strip() == said
    assert texts[-1].strip() == said.rstrip("\N{REPLACEMENT CHARACTER}")  # half a letter, perhaps
    assert len(texts) == len(last["pieces"]) == 6
    assert all(longer.startswith(text) for text, longer in pairwise(texts))


def test_the_attention_covers_the_picture(chat, plain):
    for server, shape in ((chat, (4, 6)), (plain, (2, 2))):
        (maps,) = ask(server, [PICTURE], QUESTION)[-1]["pictures"]
        layers = np.array(maps["by_layer"])
        tokens = np.array(maps["by_token"])
        assert layers.shape[1:] == tokens.shape[1:] == shape and len(tokens) == 6
        assert (layers >= 0).all() and 0.01 < layers.sum((1, 2)).max() <= 1.001
        np.testing.assert_allclose(layers.mean(0), tokens.mean(0), atol=1e-5)


def test_a_chat_model_reads_earlier_turns_and_several_pictures(chat):
    other = encoded(photograph(40, 90, place=50), "JPEG")
    alone = ask(chat, [PICTURE], QUESTION)[-1]
    both = ask(chat, [PICTURE, other], QUESTION)[-1]
    later = ask(chat, [PICTURE], QUESTION, [["two dogs", "a red cat"]])[-1]
    without = ask(chat, [], QUESTION)[-1]
    assert len(both["pictures"]) == 2 and not without["pictures"]
    assert len({str(one["pieces"]) for one in (alone, both, later, without)}) == 4
    assert chat.facts["converses"] and chat.facts["max_images"] == 8
    assert "9 pictures" in ask(chat, [PICTURE] * 9, QUESTION)[-1]["error"]


def test_a_model_of_v01_answers_single_questions(plain):
    assert not plain.facts["converses"] and plain.facts["max_images"] == 1
    assert "single questions" in ask(plain, [PICTURE], QUESTION, [["a", "b"]])[-1]["error"]
    assert "2 pictures" in ask(plain, [PICTURE, PICTURE], QUESTION)[-1]["error"]
    long = ask(plain, [PICTURE], "red cat " * 600)[-1]["error"]
    assert "512" in long and "\n" not in long
    assert ask(plain, [b"no picture"], QUESTION)[-1]["error"].startswith("no picture that can")


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        (dict(turns="chat", max_images=3), (3, True)),
        (dict(turns="independent"), (8, False)),
        (dict(turns="first"), (1, False)),  # is trained on the first picture alone
        (dict(turns="chat", max_images=10**6), (512, True)),
    ],
)
def test_a_checkpoint_is_asked_as_its_run_was_trained(folders, options, limits, tmp_path):
    step = tmp_path / "run" / "checkpoints" / "step-000001"
    shutil.copytree(folders["chat"], step)
    config, _ = read_config(step)
    save_run_config(tmp_path / "run", config, TrainConfig(**options))
    assert limits_of(step, config) == limits
    assert limits_of(folders["chat"], config) == (8, True), "not in a run"


# ---- pictures


def bomb() -> bytes:
    """A PNG of few bytes that says that it has 20,000 x 20,000 pixels."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_picture_is_shown_as_the_model_reads_it(plain):
    turned = Image.new("RGB", (20, 10), "red")
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    clear = Image.new("RGBA", (30, 30), (0, 0, 0, 0))
    large = photograph(3000, 1500)
    for picture, size in (
        (encoded(turned, "JPEG", exif=exif), (10, 20)),
        (encoded(clear, "WEBP"), (30, 30)),
        (encoded(large, "TIFF"), (1024, 512)),
    ):
        status, headers, shown = request(plain, "POST", "/picture", picture)
        assert status == 200 and headers["Content-Type"] == "image/png"
        image = Image.open(io.BytesIO(shown))
        assert image.size == size and image.mode == "RGB"
    white = Image.open(io.BytesIO(request(plain, "POST", "/picture", encoded(clear, "PNG"))[2]))
    assert white.getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "cannot identify"),
        (b"what is it?", "cannot identify"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
        (PICTURE[: len(PICTURE) // 2], "truncated"),
        (bomb(), "decompression bomb"),
    ],
    ids=["empty", "text", "EPS", "half", "bomb"],
)
def test_what_is_no_picture_gets_one_line(plain, content, why):
    error = error_of(request(plain, "POST", "/picture", content), 400)
    assert error.startswith("no picture that can be read (") and why in error


def test_uploads_are_limited_before_they_are_read(plain):
    for path, size in (("/picture", UPLOAD + 1), ("/ask", 2 * UPLOAD)):
        with socket.create_connection(("127.0.0.1", plain.server_port)) as client:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n"
            client.sendall(head.encode())
            client.settimeout(60)
            answer = client.makefile("rb").read()
        assert b" 413 " in answer and b"MiB are taken" in answer
    for length in ("", "-1", "many", "9" * 30):
        answer = request(plain, "POST", "/picture", b"", Content_Length=length)
        assert "how long" in error_of(answer, 411)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "no JSON object"),
        (b'{"pictures": "a", "turns": [], "question": "a"}', "pictures"),
        (b'{"pictures": ["?"], "turns": [], "question": "a"}', "base64"),
        (b'{"pictures": ["\xc3\xa4"], "turns": [], "question": "a"}', "base64"),
        (b'{"pictures": [], "turns": [["a"]], "question": "a"}', "turns"),
        (b'{"pictures": [], "turns": [["a", 1]], "question": "a"}', "turns"),
        (asked([], "  "), "ask a question"),
        (asked([], 3), "ask a question"),
        (asked([], "\ud800"), "UTF-8"),
    ],
)
def test_a_question_that_makes_no_sense_gets_one_line(plain, body, why):
    assert why in error_of(request(plain, "POST", "/ask", body), 400)


# ---- who may ask


def test_it_listens_to_this_machine_alone(plain):
    assert plain.server_address[0] == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):  # one bound to 0.0.0.0 would answer
        socket.create_connection(("127.0.0.2", plain.server_port), timeout=20)


def test_other_pages_cannot_ask(plain):
    here = f"127.0.0.1:{plain.server_port}"
    for host in ("example.org", "example.org:80", "", "127.0.0.1.example.org", "["):
        for method, path in (("GET", "/model"), ("GET", "/"), ("POST", "/picture")):
            error_of(request(plain, method, path, b"", Host=host), 403)
    for origin in ("http://example.org", "null", f"https://{here}", "http://127.0.0.1:1"):
        error_of(request(plain, "POST", "/picture", PICTURE, Host=here, Origin=origin), 403)
    for name in (here, f"localhost:{plain.server_port}"):
        own = request(plain, "POST", "/picture", PICTURE, Host=name, Origin=f"http://{name}")
        assert own[0] == 200


def test_the_page_loads_nothing_from_elsewhere(plain):
    for path in ("/", "/page.css", "/page.js"):
        status, headers, body = request(plain, "GET", path)
        assert status == 200 and len(body) > 1000
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert not re.search(rb"(https?:)?//\w+\.\w", body.replace(b"// ", b""))
    for path in ("/server.py", "/../server.py", "/..%2fserver.py", "//etc/passwd", "/ask"):
        error_of(request(plain, "GET", path), 404)
    error_of(request(plain, "POST", "/model", b""), 404)


# ---- the command


def test_a_port_in_use_is_one_line(folders, plain, capsys):
    options = ["--checkpoint", str(folders["v0.1"]), "--port", str(plain.server_port)]
    assert command.main(options) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--port" in error and "in use" in error


def test_ctrl_c_ends_an_answer_too(folders, tmp_path):
    log = tmp_path / "log"
    with log.open("wb") as out:
        arguments = ["-m", "nanovlm_fast.chat", "--checkpoint", str(folders["v0.1"])]
        options = ["--port", "0", "--device", "cpu", "--max-new-tokens", "400"]
        process = forks.start([*arguments, *options], out, out)
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None, log.read_text()
        with urllib.request.urlopen(f"{found.group()}/model", timeout=60) as answer:
            assert json.load(answer)["checkpoint"] == str(folders["v0.1"])
        body = asked([PICTURE], QUESTION)
        with urllib.request.urlopen(f"{found.group()}/ask", body, timeout=60) as answer:
            assert "text" in json.loads(answer.readline())
            process.send_signal(signal.SIGINT)
            assert b"pieces" not in answer.read()
        assert process.wait() == 130 and log.read_text().endswith("error: interrupted\n")
    finally:
        # Not SIGINT: a second one, while the interpreter ends, would decide the exit code
        process.kill()
