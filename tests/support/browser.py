"""A headless Chromium, driven by its own protocol over two pipes: no driver, no package.

https://chromedevtools.github.io/devtools-protocol/ describes the commands. A message is JSON, and a
zero byte ends it.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --remote-debugging-pipe "
    "--disable-dev-shm-usage"
).split()
SECONDS = 120  # for a page on a busy machine


def chromium() -> str:
    """The browser's program; skips the test if there is none and NANOVLM_CHROMIUM is not set."""
    named = os.environ.get("NANOVLM_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium here: install one, or let NANOVLM_CHROMIUM name it")
    return found


class Browser:
    """One page of a browser of its own, with a new profile in `folder`."""

    def __init__(self, folder: Path, width: int = 1180, height: int = 800):
        ours, to_us = os.pipe()
        to_it, its = os.pipe()
        flags = [*FLAGS, f"--user-data-dir={folder}", f"--window-size={width},{height}"]
        # Chromium reads from descriptor 3 and writes to 4.
        moved = f'exec "$0" "$@" 3<&{to_it} 4>&{to_us}'
        self.process = subprocess.Popen(
            ["bash", "-c", moved, chromium(), *flags, "about:blank"],
            pass_fds=(to_it, to_us),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_it)
        os.close(to_us)
        self.reading = os.fdopen(ours, "rb", buffering=0)
        self.writing = os.fdopen(its, "wb", buffering=0)
        self.rest = b""
        self.number = 0
        self.session = ""
        self.events: list[dict[str, Any]] = []  # what the page reported: errors, requests
        targets = self.do("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = self.do("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.do(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.reading.close()
        self.writing.close()

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come before it are kept."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.writing.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            part = os.read(self.reading.fileno(), 2**20)
            assert part, f"Chromium ended with {self.process.wait()}"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        self.do("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page, awaited."""
        result = self.do(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Wait until a JavaScript expression is true in the page; return its value."""
        end = time.monotonic() + SECONDS
        while not (value := self.js(expression)):
            assert time.monotonic() < end, f"{expression} does not become true"
            time.sleep(0.05)
        return value

    def place(self, selector: str) -> tuple[float, float]:
        """The middle of an element, in pixels of the page."""
        x, y, width, height = self.js(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; })()"
        )
        return x + width / 2, y + height / 2

    def point(self, selector: str) -> None:
        x, y = self.place(selector)
        self.do("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        x, y = self.place(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.do("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def drop(self, selector: str, *files: Path) -> None:
        """Drag files from outside onto an element and let them go."""
        x, y = self.place(selector)
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.do("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def write(self, selector: str, text: str) -> None:
        """Put text into a field as typing does, and press Enter."""
        self.click(selector)
        self.do("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.do(
                "Input.dispatchKeyEvent",
                type=kind,
                key="Enter",
                code="Enter",
                text="\r" if kind == "keyDown" else "",
                windowsVirtualKeyCode=13,
            )

    def screenshot(self, file: Path) -> None:
        """Write what the page shows as a PNG."""
        picture = self.do("Page.captureScreenshot", format="png")["data"]
        file.write_bytes(base64.b64decode(picture))

    def errors(self) -> list[Any]:
        """What went wrong in the page so far: exceptions, and the errors in its log."""
        seen = [event for event in self.events if event.get("method") == "Log.entryAdded"]
        logged = [event["params"]["entry"] for event in seen]
        thrown = [e for e in self.events if e.get("method") == "Runtime.exceptionThrown"]
        return thrown + [entry for entry in logged if entry["level"] == "error"]

    def requests(self) -> list[str]:
        """The addresses that the page has asked for."""
        sent = [
            event for event in self.events if event.get("method") == "Network.requestWillBeSent"
        ]
        return [event["params"]["request"]["url"] for event in sent]
