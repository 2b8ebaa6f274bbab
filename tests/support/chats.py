"""Servers of the chat page for the tests, in a thread, and requests to them."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nanovlm_fast import VisionLanguageModel
from nanovlm_fast.chat.__main__ import start
from nanovlm_fast.chat.server import Server
from nanovlm_fast.config import VLMConfig
from tests.support.samples import SMALL
from tests.support.tiles import BASE, plain_tokenizer, write_generation

TILED = "460M-8k, not enlarged"  # converses, with tiles


def chat_folder(folder: Path) -> Path:
    """A checkpoint that converses and cuts pictures into tiles."""
    write_generation(folder, TILED)
    return folder / "model"


def plain_folder(folder: Path) -> Path:
    """A checkpoint as nanoVLM's of v0.1."""
    torch.manual_seed(0)
    model = VisionLanguageModel(VLMConfig(**{**SMALL, "lm_vocab_size": BASE}))
    for parameter in model.parameters():  # far from uniform answers
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, tokenizer=plain_tokenizer())
    return folder


@contextlib.contextmanager
def serving(checkpoint: Path, *options: str) -> Iterator[Server]:
    """The server that the command makes, on a free port."""
    common = ["--device", "cpu", "--port", "0", "--max-new-tokens", "6"]
    server, _ = start(["--checkpoint", str(checkpoint), *common, *options])
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def request(
    server: Server, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, body, names)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def asked(pictures: Sequence[bytes], question: Any, turns: Any = ()) -> bytes:
    """The body of a question."""
    files = [base64.b64encode(picture).decode() for picture in pictures]
    return json.dumps({"pictures": files, "turns": list(turns), "question": question}).encode()


def ask(
    server: Server, pictures: Sequence[bytes], question: str, turns: Any = ()
) -> list[dict[str, Any]]:
    """The lines of the answer to a question."""
    status, _, body = request(server, "POST", "/ask", asked(pictures, question, turns))
    assert status == 200, body
    return [json.loads(line) for line in body.splitlines()]
