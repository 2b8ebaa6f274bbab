"""The model behind the page: it reads pictures, answers, and says where it looked."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nanovlm_fast.chat.attention import attention_to_images, on_pictures, with_reply
from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data.chat import make_text
from nanovlm_fast.data.images import rgb
from nanovlm_fast.data.samples import load_tiles
from nanovlm_fast.data.text import Tokenizer, Turn
from nanovlm_fast.generate import generate
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.runs import holds_run, load_run_config

MOST_IMAGES = 8  # of a model whose run does not say how many it was trained with
PREVIEW = 1024  # pixels along the longer side of the copy that the page shows


@dataclass
class Reply:
    """A reply, and the attention that chose it.

    Attributes:
        pieces: the text of each of its n tokens; a letter of several tokens is in the last one.
        by_layer: for each picture (layers, h, w), averaged over the tokens.
        by_token: for each picture (n, h, w), averaged over the layers. An empty reply has one map:
            where the model looked when it chose to say nothing.
    """

    pieces: list[str]
    by_layer: list[np.ndarray]
    by_token: list[np.ndarray]


class Answerer:
    """A model with all that is needed to ask it.

    `max_images` and `converses` are what `limits_of` says: most pictures, and whether it reads
    earlier turns.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: Tokenizer,
        device: torch.device,
        max_new_tokens: int,
        limits: tuple[int, bool],
    ):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.device = device
        self.max_new_tokens = max_new_tokens
        self.max_images, self.converses = limits
        self.text = make_text(tokenizer, model.config, "chat")

    def answer(
        self,
        pictures: Sequence[bytes],
        turns: Sequence[Turn],
        question: str,
        on_text: Callable[[str], None],
    ) -> Reply:
        """Reply to a question about pictures, after earlier turns.

        `on_text` gets the text of the reply, all of it until then, after each token. What it raises
        ends the generation. Raises ValueError for what the model cannot be asked, BadImage among
        it.
        """
        config = self.model.config
        if len(pictures) > self.max_images:
            raise ValueError(f"{len(pictures)} pictures: this model takes {self.max_images}")
        if turns and not self.converses:
            raise ValueError("this model answers single questions and reads no earlier ones")
        tiles, grids = load_tiles(pictures, config)
        prompt = self.text.document([*turns, (question, "")], grids)
        room = config.lm_max_position_embeddings - len(prompt)
        if room < 1:
            raise ValueError(
                f"this takes {len(prompt)} tokens, and the model has "
                f"{config.lm_max_position_embeddings}: ask less at once, or begin anew"
            )
        images = torch.from_numpy(tiles).to(self.device)
        said: list[int] = []

        def on_token(_: int, token: int) -> None:
            said.append(token)
            on_text(self.decode(said).lstrip())

        limit = min(self.max_new_tokens, room)
        generate(self.model, images, [prompt], self.tokenizer.eos_id, limit, on_token=on_token)
        weights = attention_to_images(self.model, images, *with_reply(prompt, said)).cpu().numpy()
        return Reply(
            self.pieces(said),
            on_pictures(weights.mean(1), grids, config),
            on_pictures(weights.mean(0), grids, config),
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a reply that may still end in the middle of a letter."""
        return self.tokenizer.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds. Together they are the whole text."""
        begun = [self.decode(ids[:end]) for end in range(len(ids))]
        texts = [*begun, self.tokenizer.decode(ids)]
        return [texts[i + 1][len(texts[i]) :] for i in range(len(ids))]


def preview(picture: bytes) -> bytes:
    """A picture as the model reads it, upright and on white, as a PNG of at most PREVIEW pixels.

    Raises BadImage if it cannot be decoded.
    """
    image = rgb(picture)
    image.thumbnail((PREVIEW, PREVIEW), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def limits_of(folder: Path, config: VLMConfig) -> tuple[int, bool]:
    """How many pictures a checkpoint takes at once, and whether it reads earlier turns.

    As its run was trained (--max-images, --turns), if it lies in one. Without a conversation
    template there is no place for more than one of either.
    """
    if not config.lm_chat_template:
        return 1, False
    run = folder.resolve().parent.parent
    options = load_run_config(run) if holds_run(run) else {}
    fit = max(1, config.lm_max_position_embeddings // config.image_tokens)
    turns = options.get("turns", "chat")
    most = 1 if turns == "first" else options.get("max_images") or MOST_IMAGES
    return min(most, fit), turns == "chat"
