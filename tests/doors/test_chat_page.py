"""The chat page in a real browser: drop a picture, ask, see the answer and the attention."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from nanovlm_fast.chat.server import UPLOAD, Server
from tests.support.browser import Browser, chromium
from tests.support.chats import chat_folder, plain_folder, serving
from tests.support.pictures import encoded, photograph

# How opaque the overlay is in the middle of each place of the map; what the maps say.
DRAWN = """(() => {
  const canvas = document.getElementById("overlay");
  const pen = canvas.getContext("2d");
  const map = mapOf(state.shown);
  const alphas = map.map((row, y) => row.map((_, x) => pen.getImageData(
    Math.floor((x + 0.5) * canvas.width / row.length),
    Math.floor((y + 0.5) * canvas.height / map.length), 1, 1).data[3]));
  const most = Math.max(...state.pictures.map((_, number) => mapOf(number)).flat(2));
  return [map, most, alphas, canvas.hidden, canvas.clientWidth, canvas.clientHeight,
    document.getElementById("shown").clientWidth, document.getElementById("shown").clientHeight];
})()"""
TEXT = "document.querySelector('{}').textContent"


@pytest.fixture
def browser(tmp_path) -> Iterator[Browser]:
    chromium()  # before a server is started for nothing
    with Browser(tmp_path / "profile") as browser:
        yield browser


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    files = [tmp_path / "one.png", tmp_path / "two.jpg"]
    files[0].write_bytes(encoded(photograph(90, 60), "PNG"))
    files[1].write_bytes(encoded(photograph(40, 90, place=50), "JPEG"))
    return files


def open_page(browser: Browser, server: Server) -> None:
    browser.open(server.url)
    browser.wait("document.body.dataset.ready === 'yes'")


def ask(browser: Browser, question: str) -> str:
    """Type a question; return the answer once it has ended."""
    before = browser.js("document.querySelectorAll('.said').length")
    browser.write("#question", question)
    browser.wait(f"document.querySelectorAll('.said').length > {before} && !state.busy")
    return browser.js("[...document.querySelectorAll('.said')].pop().textContent")


def check_overlay(browser: Browser, first: str = "0") -> list[list[float]]:
    """The overlay lies on the picture, and is the more opaque the more attention there is."""
    browser.js(first)
    values, most, alphas, hidden, *sizes = browser.js(DRAWN)
    assert not hidden and sizes[:2] == sizes[2:]
    shares = np.array(values) / most  # of all pictures
    expected = 255 * np.interp(3 * shares, range(4), (0, 0.45, 0.6, 0.68))
    np.testing.assert_allclose(alphas, expected, atol=2)
    return values


def test_drop_a_picture_ask_and_see(browser, pictures, tmp_path):
    with serving(chat_folder(tmp_path / "model")) as server:
        open_page(browser, server)
        assert "converse" not in browser.js(TEXT.format("#kind"))
        browser.drop("#drop", pictures[0])
        browser.wait("state.pictures.length === 1 && !state.busy")
        said = ask(browser, "what is it?")
        assert said.strip() and said == browser.js("state.turns[0][1]")
        mean = check_overlay(browser)
        browser.point(".said span")
        browser.wait("state.token === 0")
        assert check_overlay(browser) != mean, "that of one token"
        browser.point("#question")
        browser.wait("state.token === null")
        browser.js("document.querySelector('#layer').value = 1")
        assert check_overlay(browser, "draw()") != mean, "that of one layer"
        assert len(mean) == 4 and len(mean[0]) == 6

        ask(browser, "and what else?")
        assert browser.js("state.turns.length") == 2, "the model reads both"
        browser.drop("#drop", pictures[1])
        browser.wait("state.pictures.length === 2 && !state.busy")
        assert browser.js("state.turns.length") == 0, "another picture, another conversation"
        ask(browser, "what are they?")
        assert [len(one["by_layer"]) for one in browser.js("state.reply.pictures")] == [2, 2]
        for number in (0, 1):
            browser.click(f"#strip div:nth-child({number + 1}) img")
            browser.wait(f"state.shown === {number}")
            check_overlay(browser)
        assert not browser.errors()
        hosts = {urlsplit(url.removeprefix("blob:")).netloc for url in browser.requests()}
        assert hosts - {""} == {server.url.removeprefix("http://")}


def test_what_cannot_be_shown_or_asked_is_one_line(browser, pictures, tmp_path):
    bad = tmp_path / "<b>cat.png"
    bad.write_bytes(b"no picture")
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(UPLOAD + 1)
    with serving(plain_folder(tmp_path / "model")) as server:
        open_page(browser, server)
        error = TEXT.format("#error")
        browser.write("#question", "what is it?")
        browser.wait(f"{error} === 'show a picture first'")
        browser.drop("#drop", bad)
        browser.wait(f"{error}.startsWith('<b>cat.png: no picture that can be read (')")
        browser.drop("#drop", tmp_path)
        browser.wait(f"{error}.endsWith('it cannot be read; is it a folder?')")
        browser.drop("#drop", large)
        browser.wait(f"{error}.includes('at most 20 MiB')")
        assert browser.js("document.querySelector('#stage').hidden")
        browser.drop("#drop", pictures[0])
        browser.wait(f"state.pictures.length === 1 && !state.busy && {error} === ''")
        assert "single questions" in browser.js(TEXT.format("#kind"))
        browser.js("document.querySelector('#question').value = ''")
        assert "tokens, and the model has 512" in ask(browser, "red cat " * 600)
        assert ask(browser, "what is it?").strip()
        check_overlay(browser)
        paste = "new ClipboardEvent('paste', {clipboardData: new DataTransfer()})"
        browser.js(f"state.busy = true; document.dispatchEvent({paste}); state.busy = false")
        assert not browser.js(error), "text may be pasted while an answer comes"
    assert "does not answer" in ask(browser, "are you there?")
