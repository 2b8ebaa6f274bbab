"""A checkpoint under lmms-eval, EvolvingLMMs-Lab's evaluation harness, which finds it by its entry point.

    pip install lmms-eval && python -m lmms_eval --model nanovlm_fast --model_args checkpoint=RUN --tasks mme

Only lmms-eval imports this module. One process on one device. The tests hold it against a stand-in: lmms-eval brings
too many packages to be installed for them. With 0.7.3's registry, base class and requests it answers; no task was run.
"""

from __future__ import annotations

import sys
from itertools import groupby
from typing import Any

import numpy as np
import torch
from lmms_eval.api.model import lmms

from nanovlm_fast.data.images import load_image
from nanovlm_fast.data.text import TextProcessor
from nanovlm_fast.device import autocast_to, pick_device, pick_dtype
from nanovlm_fast.generate import generate, generator_of
from nanovlm_fast.packing.documents import Document
from nanovlm_fast.weights.folder import load_pretrained


def manifest() -> Any:
    """What the entry point gives to lmms-eval: `--model nanovlm_fast` is the class below."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("nanovlm_fast", simple_class_path="nanovlm_fast.lmms_eval.NanoVLMFast")


class NanoVLMFast(lmms):
    """`checkpoint` is a run, a folder or a hub name (default: the latest run). Raises what `load_pretrained` raises."""

    def __init__(
        self,
        checkpoint: str | None = None,
        device: str = "auto",
        batch_size: int | str = 16,
        lm_tokenizer: str = "",
        **more: Any,
    ):
        super().__init__()
        if more := {
            name: value
            for name, value in more.items()
            if value is not None and name != "max_batch_size"
        }:
            known = "checkpoint, device, batch_size, lm_tokenizer"
            raise ValueError(f"--model_args {', '.join(more)}: there are {known}")
        self.device = pick_device(device)
        self.batch_size = int(batch_size)
        self.model, self.tokenizer = load_pretrained(checkpoint, self.device, lm_tokenizer)
        self.model.eval()
        config = self.model.config
        self.text = TextProcessor(self.tokenizer, config.prompt, config.image_tokens)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Replies, cut at the end of sequence and before the first of a request's `until`; greedy unless it samples.

        A prompt that leaves no position for a reply is named and gets an empty one: the harness
        cannot leave a request out. Raises ValueError for a visual that is no image.
        """
        replies: list[str] = []
        numbered = enumerate(request.args for request in requests)
        for settings, same in groupby(numbered, key=lambda item: item[1][1]):
            group = list(same)
            for start in range(0, len(group), self.batch_size):
                replies += self.answer(group[start : start + self.batch_size], settings)
        return replies

    def answer(self, batch: list[tuple[int, tuple]], settings: dict[str, Any]) -> list[str]:
        """One batch of requests with the same `settings`.

        Each is (number, (context, settings, doc_to_visual, doc_id, task, split)).
        """
        config = self.model.config
        images: list[np.ndarray] = []
        prompts: list[Document] = []
        limits: list[int] = []
        for _, (context, _, doc_to_visual, doc_id, task, split) in batch:
            visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
            prompt = self.text.document(
                [(context.replace("<image>", "").strip(), "")], len(visuals)
            )
            room = config.lm_max_position_embeddings - len(prompt)
            if room < 1:
                what = f"a prompt of {len(prompt)} tokens is too long for the model"
                print(f"warning: no reply to {task} {doc_id}: {what}", file=sys.stderr)
            prompt.image_rows[prompt.image_rows >= 0] += len(images) * config.image_tokens
            prompts.append(prompt)
            limits.append(min(settings.get("max_new_tokens") or 64, max(room, 0)))
            images += [load_image(visual, config.vit_img_size) for visual in visuals]
        size = config.vit_img_size
        pixels = torch.from_numpy(
            np.stack(images) if images else np.zeros((0, 3, size, size), np.uint8)
        )
        sampling = {}
        if settings.get("do_sample", bool(settings.get("temperature"))):
            sampling = dict(
                temperature=settings.get("temperature") or 1.0, top_p=settings.get("top_p") or 1.0
            )
            sampling["generator"] = [generator_of(self.device, number) for number, _ in batch]
        with autocast_to(pick_dtype("auto", self.device), self.device)():
            pixels, eos_id = pixels.to(self.device), self.tokenizer.eos_id
            ids = generate(self.model, pixels, prompts, eos_id, limits, **sampling)
        return [
            cut(self.tokenizer.decode(reply), settings.get("until") or []).strip() for reply in ids
        ]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "nanovlm_fast answers by generation: tasks of output_type generate_until"
        )

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError(
            "nanovlm_fast answers one question at a time: tasks of output_type generate_until"
        )


def cut(reply: str, until: str | list[str]) -> str:
    """The reply before the first of `until`; leading white space, which a reply begins with, stops nothing."""
    reply = reply.lstrip()
    for stop in [until] if isinstance(until, str) else until:
        reply = reply.split(stop)[0] if stop else reply
    return reply
