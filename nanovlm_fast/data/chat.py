"""Conversations in ChatML, with the tokens that say where an image's tiles stand.

What nanoVLM's models have read since v0.2. One document of two images and one turn; the tokens in
angle brackets are special, everything else is text:

    <|im_start|>user
    <image: 0><|global_image|><|image|>...<row_1_col_1><|image|>...<image: 1>...What?<|im_end|>
    <|im_start|>assistant
    A cat.<|im_end|>

An assistant's words, its <|im_end|> and the line break after it carry loss. Whatever a user or a
data set writes is text, so a question cannot end its turn or claim to show an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nanovlm_fast.config import CHATML, VLMConfig
from nanovlm_fast.data.images import printable
from nanovlm_fast.data.text import Images, TextProcessor, Tokenizer, Turn
from nanovlm_fast.packing.documents import IGNORE, Document

START = "<|im_start|>"
END = "<|im_end|>"
IMAGE = "image_token"  # names in `vlm_extra_tokens`
GLOBAL = "global_image_token"
# Text, or the ids of special tokens
Piece = str | list[int]


def make_text(tokenizer: Tokenizer, model: VLMConfig, mode: str, prompt: str = "") -> TextProcessor:
    """What makes documents for a model: conversations if it has a template, else its prompt.

    `prompt`, of a benchmark, is put around every question: in place of the model's own, or as what
    the user of a conversation says. Raises ValueError for a template other than ChatML's, and if
    the tokenizer lacks a token.
    """
    if not model.lm_chat_template:
        return TextProcessor(tokenizer, prompt or model.prompt, model.image_tokens, mode)
    if _plain(model.lm_chat_template) != _plain(CHATML):
        raise ValueError(
            f"lm_chat_template: only nanoVLM's ChatML without a system prompt is known, {CHATML!r}"
        )
    said = prompt or "{question}"
    return ChatProcessor(tokenizer, model.vlm_extra_tokens, model.image_tokens, mode, said)


def _plain(template: str) -> str:
    """A template without white space and quotes, which may be written in several ways."""
    return "".join(template.replace("\\n", "").replace('"', "'").split())


class ChatProcessor(TextProcessor):
    """Makes documents of conversations, as `TextProcessor` does for the recipe of v0.1.

    `extra_tokens` are the model's `vlm_extra_tokens`: the token of an image, of an image as a
    whole, and of the places of tiles (r1c1, ...), by name. The tokenizer must have all of them.
    With '' as the last answer `document` makes a prompt, to which a model replies. Among the
    `documents` of an example it is an answer like any other, of which the end is learned.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        extra_tokens: Mapping[str, str],
        image_tokens: int,
        mode: str = "chat",
        prompt: str = "{question}",
    ):
        super().__init__(tokenizer, prompt, image_tokens, mode)
        self.extra_tokens = dict(extra_tokens)
        known = tokenizer.base.token_to_id
        needed = [START, END, *self.extra_tokens.values()]
        if twice := [token for token in needed if needed.count(token) > 1]:
            raise ValueError(f"vlm_extra_tokens: {printable(repr(twice[0]))} stands for two things")
        if missing := [token for token in needed if known(token) is None]:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise ValueError(
                f"the tokenizer has no token {missing[0]}{more}, which conversations of this model "
                "are written with: --lm-tokenizer names the one that it was trained with"
            )
        # So that no text can spell one, whatever the tokenizer's file says of it
        self.start, self.end, *ids = tokenizer.reserve(needed)
        self.ids = dict(zip(self.extra_tokens, ids, strict=True))
        # A base model's tokenizer names another, which no conversation has: replies would not end
        tokenizer.end_with(END)
        self.header = len(self._encode_all([[self.start], "assistant\n"]))

    def image_string(self, grids: Sequence[tuple[int, int]]) -> list[Piece]:
        """The tokens and texts that stand for the images, to be put before the first question.

        Raises ValueError for a grid that has no tokens.
        """
        if not grids:
            return []
        if IMAGE not in self.ids:
            raise ValueError(f"vlm_extra_tokens has no {IMAGE}: no place to show an image")
        pieces: list[Piece] = []
        tile = [self.ids[IMAGE]] * self.image_tokens
        for number, (rows, columns) in enumerate(grids):
            if len(grids) > 1:
                pieces.append(f"<image: {number}>")
            if GLOBAL in self.ids:
                pieces.append([self.ids[GLOBAL], *tile])
                if (rows, columns) == (1, 1):
                    continue
            for place in [(r + 1, c + 1) for r in range(rows) for c in range(columns)]:
                pieces.append([*self._place(place, (rows, columns)), *tile])
        return pieces

    def _place(self, place: tuple[int, int], grid: tuple[int, int]) -> list[int]:
        """The token of a tile's place; none for the one tile of a model that does not cut."""
        name = f"r{place[0]}c{place[1]}"
        if name in self.ids:
            return [self.ids[name]]
        if grid == (1, 1):
            return []
        rows, columns = grid
        raise ValueError(f"an image of {rows} x {columns} tiles: vlm_extra_tokens has no {name}")

    def words(self, text: str) -> str:
        """A user's or a data set's text, without what spells an image."""
        image = self.extra_tokens.get(IMAGE)
        return text.replace(image, "") if image else text

    def _encode_all(self, pieces: Sequence[Piece]) -> list[int]:
        """Ids of the pieces. Neighbouring texts are encoded as one, as their string would be."""
        ids: list[int] = []
        said = ""
        for piece in pieces:
            if isinstance(piece, str):
                said += piece
                continue
            ids += [*self.encode(said), *piece]
            said = ""
        return ids + self.encode(said)

    def length(self, answer: str) -> int:
        return len(self._encode_all([[self.start], f"assistant\n{answer}"])) - self.header

    def document(self, turns: Sequence[Turn], n_images: Images, whole: bool = False) -> Document:
        """One document with all turns, `n_images` the images' grids (or how many of one tile).

        With `whole` the last answer ends even if it is empty.
        """
        grids = [(1, 1)] * n_images if isinstance(n_images, int) else n_images
        images = self.image_string(grids)
        ids: list[int] = []
        targets: list[int] = []
        for number, (question, answer) in enumerate(turns):
            shown = [] if number else images
            text = self.words(self.prompt.format(question=question))
            asked: list[Piece] = [[self.start], "user\n", *shown, text]
            ask = self._encode_all([*asked, [self.end], "\n"])
            said: list[Piece] = [[self.start], f"assistant\n{self.words(answer)}"]
            reply = self._encode_all(said)
            if answer or whole or number + 1 < len(turns):
                reply += self._encode_all([[self.end], "\n"])
            ids += ask + reply
            targets += [IGNORE] * (len(ask) + self.header) + reply[self.header :]
        input_ids = np.array(ids, np.int64)
        rows = np.full(len(ids), -1, np.int32)
        if images:
            (places,) = np.nonzero(input_ids == self.ids[IMAGE])
            rows[places] = np.arange(len(places))
        # Shifted here, so that neither the packer nor the model has to know about neighbours
        labels = np.array([*targets[1:], IGNORE], np.int64)
        asked_all = "\n".join(question for question, _ in turns)
        return Document(input_ids, rows, labels, asked_all)
