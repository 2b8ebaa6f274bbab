"""The page's server, for the machine that it runs on only.

| request | body | answer |
| --- | --- | --- |
| GET / and the page's files | | the page |
| GET /model | | JSON: what the page must know of the model |
| POST /picture | a picture's file | a PNG as the model reads it |
| POST /ask | JSON: `pictures` (base64), `turns` (pairs), `question` | lines of JSON, as they come |

A line of /ask is {"text": all of the reply so far}; the last one has `pieces` and `pictures` (see
`Reply`), or an `error`. Other errors are {"error": one line} with a status of 400 or more. Nothing
is kept between requests.

Any web page that the user has open could send requests to this address. So only requests that name
this machine are answered (a foreign name that leads here is refused), and POST only from this page.
"""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from weakref import WeakSet

import numpy as np

from nanovlm_fast.chat.answer import Answerer, Reply, preview
from nanovlm_fast.command import one_line, ran_out_of_memory
from nanovlm_fast.data.images import BadImage
from nanovlm_fast.data.text import Turn

HOST = "127.0.0.1"
UPLOAD = 20 * 2**20  # bytes of a picture's file
PICTURES = 100 * 2**20  # bytes of all pictures of a conversation, in base64
TEXT = 2**20  # bytes of all that is said in a conversation
NAMES = ("127.0.0.1", "localhost")
PAGE = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
# The page loads its own files and nothing else, whatever a model says.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Refused(Exception):
    """A request that is not answered: the status, and one line that says why."""

    def __init__(self, status: HTTPStatus, why: str):
        super().__init__(why)
        self.status = status


@dataclass
class Question:
    """What /ask takes."""

    pictures: list[bytes]
    turns: list[Turn]
    question: str


def read_question(body: bytes) -> Question:
    """Read the JSON of /ask. Raises ValueError saying what of it is wrong."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("the request is no JSON") from error
    if not isinstance(values, dict):
        raise ValueError("the request is no JSON object")
    pictures: Any = values.get("pictures")
    turns: Any = values.get("turns")
    question: Any = values.get("question")
    if not (isinstance(pictures, list) and all(isinstance(one, str) for one in pictures)):
        raise ValueError("pictures must be a list of files in base64")
    pairs = isinstance(turns, list) and all(isinstance(t, list) and len(t) == 2 for t in turns)
    if not pairs or not all(isinstance(text, str) for turn in turns for text in turn):
        raise ValueError("turns must be a list of pairs: question and answer")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("ask a question")
    try:
        "".join([question, *(text for turn in turns for text in turn)]).encode()
        decoded = [base64.b64decode(one, validate=True) for one in pictures]
    except UnicodeEncodeError as error:
        raise ValueError("the question is no UTF-8") from error
    except ValueError as error:
        raise ValueError("a picture is no base64") from error
    return Question(decoded, [(asked, said) for asked, said in turns], question.strip())


class Server(ThreadingHTTPServer):
    """Serves one model. `lock` is held while it reads a picture or answers: one at a time."""

    daemon_threads = True

    def __init__(self, answerer: Answerer, facts: dict[str, Any], port: int):
        self.answerer = answerer
        self.facts = facts
        self.lock = threading.Lock()
        self.working: WeakSet[threading.Thread] = WeakSet()
        self.ending = False
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            reason = f"--port {port}: {error.strerror}"
            raise OSError(f"{reason}; another number, or 0 for any that is free") from error

    def server_close(self) -> None:
        """End what is answered too: a process that exits while a thread uses torch aborts."""
        self.ending = True
        super().server_close()
        for thread in list(self.working):
            thread.join()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the lock in this block. Raises ConnectionAbortedError once the server closes."""
        self.working.add(threading.current_thread())
        with self.lock:
            self.check_open()
            yield

    def check_open(self) -> None:
        if self.ending:
            raise ConnectionAbortedError

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """One request. HTTP/1.0, in which the end of an answer is the end of the connection."""

    server: Server
    timeout = 60  # seconds that a client may keep a thread waiting

    def do_GET(self) -> None:
        self.respond(self.get)

    def do_POST(self) -> None:
        self.respond(self.post)

    def respond(self, method: Any) -> None:
        """Call `method`, and answer with one line if it refuses."""
        with contextlib.suppress(ConnectionError, TimeoutError):  # the page was closed
            try:
                self.check_sender()
                method()
            except Refused as error:
                self.send(json.dumps({"error": str(error)}).encode(), status=error.status)
        self.close_connection = True

    def check_sender(self) -> None:
        """Raise Refused for what does not come from this page, or not to this machine's name."""
        host = self.headers.get("Host", "")
        if host.partition(":")[0].lower() not in NAMES:
            raise Refused(HTTPStatus.FORBIDDEN, f"this server is {' or '.join(NAMES)}")
        origin = self.headers.get("Origin")
        if self.command == "POST" and origin not in (None, f"http://{host}"):
            raise Refused(HTTPStatus.FORBIDDEN, "only the page itself may ask")

    def get(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/model":
            self.send(json.dumps(self.server.facts).encode())
            return
        if path not in PAGE:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")
        name, kind = PAGE[path]
        self.send(files("nanovlm_fast.chat").joinpath(name).read_bytes(), kind)

    def post(self) -> None:
        answerer = self.server.answerer
        if self.path == "/picture":
            picture = self.body(UPLOAD)
            try:
                with self.server.turn():
                    shown = preview(picture)
            except BadImage as error:
                raise Refused(HTTPStatus.BAD_REQUEST, no_picture(error)) from error
            self.send(shown, "image/png")
        elif self.path == "/ask":
            each = UPLOAD * 4 // 3 + 4  # in base64
            body = self.body(TEXT + min(answerer.max_images * each, PICTURES))
            try:
                asked = read_question(body)
            except ValueError as error:
                raise Refused(HTTPStatus.BAD_REQUEST, one_line(error)) from error
            self.stream(asked)
        else:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")

    def body(self, most: int) -> bytes:
        """Return the request's body. Raises Refused if it is larger than `most` bytes."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal() and len(length) < 20):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the request does not say how long it is")
        if int(length) > most:
            much = f"{int(length) / 2**20:,.1f} MiB"
            limit = f"at most {most / 2**20:,.0f} MiB are taken"
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{much}: {limit}")
        return self.rfile.read(int(length))

    def stream(self, asked: Question) -> None:
        """Send the reply as it grows, and at its end what it looked at."""

        def on_text(text: str) -> None:
            self.server.check_open()
            self.line(text=text)

        self.begin(HTTPStatus.OK, "application/x-ndjson")
        try:
            with self.server.turn():
                reply = self.server.answerer.answer(
                    asked.pictures, asked.turns, asked.question, on_text
                )
            self.line(pieces=reply.pieces, pictures=maps_of(reply))
        except BadImage as error:
            self.line(error=no_picture(error))
        except ValueError as error:
            self.line(error=one_line(error))
        except (MemoryError, RuntimeError) as error:
            if not ran_out_of_memory(error):
                self.line(error=f"{type(error).__name__}: more in the terminal")
                raise
            self.line(error=f"out of memory: {one_line(error)}")

    def line(self, **values: Any) -> None:
        self.wfile.write(json.dumps(values).encode() + b"\n")
        self.wfile.flush()

    def send(
        self, content: bytes, kind: str = "application/json", status: HTTPStatus = HTTPStatus.OK
    ) -> None:
        self.begin(status, kind)
        self.wfile.write(content)

    def begin(self, status: HTTPStatus, kind: str) -> None:
        """Send status and headers."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: the terminal is for errors."""


def no_picture(error: BadImage) -> str:
    """What the page says of a file that cannot be decoded; it knows the file's name."""
    return f"no picture that can be read ({one_line(error).removeprefix('image bytes: ')})"


def maps_of(reply: Reply) -> list[dict[str, Any]]:
    """The maps as lists, rounded to a millionth."""

    def listed(maps: np.ndarray) -> list[Any]:
        return np.round(maps.astype(np.float64), 6).tolist()

    both = zip(reply.by_layer, reply.by_token, strict=True)
    return [{"by_layer": listed(layer), "by_token": listed(token)} for layer, token in both]
