"""A checkpoint as a model of lmms-eval, EvolvingLMMs-Lab's evaluation harness.

    pip install lmms-eval
    python -m lmms_eval --model nanovlm_fast --model_args checkpoint=RUN --tasks mme

lmms-eval finds this module by an entry point (pyproject.toml), and nothing else imports it. It runs
in one process on one device.

The tests use a stand-in for lmms-eval, which needs too many packages to be installed for them. By
hand it was tried with the registry, base class and requests of version 0.7.3; no task has been run.
"""

from __future__ import annotations

import sys
from itertools import groupby
from typing import Any

import numpy as np
import torch
from lmms_eval.api.model import lmms

from nanovlm_fast.data.chat import make_text
from nanovlm_fast.data.samples import load_tiles
from nanovlm_fast.device import autocast_to, pick_device, pick_dtype
from nanovlm_fast.generate import generate, generator_of
from nanovlm_fast.packing.documents import Document
from nanovlm_fast.weights.pretrained import load_pretrained


def manifest() -> Any:
    """Return what the entry point registers: `--model nanovlm_fast` is the class below."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("nanovlm_fast", simple_class_path="nanovlm_fast.lmms_eval.NanoVLMFast")


class NanoVLMFast(lmms):
    """The model that lmms-eval asks. Its arguments come from --model_args.

    `checkpoint` is a run, a folder or a hub name (default: the latest run). Raises what
    `load_pretrained` raises.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        device: str = "auto",
        batch_size: int | str = 16,
        lm_tokenizer: str = "",
        **more: Any,
    ):
        super().__init__()
        # max_batch_size, and options that are None, come from lmms-eval and not from --model_args.
        unknown = [
            name for name, value in more.items() if value is not None and name != "max_batch_size"
        ]
        if unknown:
            known = "checkpoint, device, batch_size, lm_tokenizer"
            raise ValueError(f"--model_args {', '.join(unknown)}: there are {known}")
        self.device = pick_device(device)
        self.batch_size = int(batch_size)
        self.model, self.tokenizer = load_pretrained(checkpoint, self.device, lm_tokenizer)
        self.model.eval()
        config = self.model.config
        self.text = make_text(self.tokenizer, config, "independent")

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return the reply to each request.

        Replies are cut at the end of sequence and before the first of the request's `until`. They
        are greedy unless the request samples. A prompt that leaves no position for a reply gets an
        empty one and a warning, as the harness cannot leave a request out. Raises ValueError for a
        visual that is not an image.
        """
        replies: list[str] = []
        numbered = enumerate(request.args for request in requests)
        # Neighbours with the same settings share a batch. The order of replies must be that of the
        # requests, so requests are not sorted.
        for settings, same in groupby(numbered, key=lambda item: item[1][1]):
            group = list(same)
            for start in range(0, len(group), self.batch_size):
                replies += self.answer(group[start : start + self.batch_size], settings)
        return replies

    def answer(self, batch: list[tuple[int, tuple]], settings: dict[str, Any]) -> list[str]:
        """Return the replies to one batch of requests with the same `settings`.

        Each request is (number, (context, settings, doc_to_visual, doc_id, task, split)).
        """
        config = self.model.config
        images: list[np.ndarray] = []
        shown = 0  # images, or tiles of them
        prompts: list[Document] = []
        limits: list[int] = []
        for _, (context, _, doc_to_visual, doc_id, task, split) in batch:
            visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
            # Image tokens come first here, wherever the task's text marks them.
            question = context.replace("<image>", "").strip()
            tiles, grids = load_tiles(visuals, config)
            prompt = self.text.document([(question, "")], grids)
            room = config.lm_max_position_embeddings - len(prompt)
            if room < 1:
                what = f"a prompt of {len(prompt)} tokens is too long for the model"
                print(f"warning: no reply to {task} {doc_id}: {what}", file=sys.stderr)
            prompt.image_rows[prompt.image_rows >= 0] += shown * config.image_tokens
            prompts.append(prompt)
            limits.append(min(settings.get("max_new_tokens") or 64, max(room, 0)))
            images.append(tiles)
            shown += len(tiles)
        pixels = torch.from_numpy(np.concatenate(images)).to(self.device)
        sampling: dict[str, Any] = {}
        # Some tasks set only a temperature, and others only `do_sample`.
        if settings.get("do_sample", bool(settings.get("temperature"))):
            sampling["temperature"] = settings.get("temperature") or 1.0
            sampling["top_p"] = settings.get("top_p") or 1.0
            sampling["generator"] = [generator_of(self.device, number) for number, _ in batch]
        with autocast_to(pick_dtype("auto", self.device), self.device)():
            eos_id = self.tokenizer.eos_id
            ids = generate(self.model, pixels, prompts, eos_id, limits, **sampling)
        until = settings.get("until") or []
        return [cut(self.tokenizer.decode(reply), until).strip() for reply in ids]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not supported: such tasks compare given answers by their likelihood."""
        raise NotImplementedError(
            "nanovlm_fast answers by generation: tasks of output_type generate_until"
        )

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not supported: such tasks ask questions that depend on earlier replies."""
        raise NotImplementedError(
            "nanovlm_fast answers one question at a time: tasks of output_type generate_until"
        )


def cut(reply: str, until: str | list[str]) -> str:
    """Return the reply up to the first of `until`."""
    # A reply begins with a blank, which must not stop it where `until` has white space.
    reply = reply.lstrip()
    for stop in [until] if isinstance(until, str) else until:
        reply = reply.split(stop)[0] if stop else reply
    return reply
