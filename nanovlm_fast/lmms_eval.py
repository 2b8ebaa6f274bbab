"""A checkpoint as a model of lmms-eval, EvolvingLMMs-Lab's evaluation harness.

    pip install lmms-eval
    python -m lmms_eval --model nanovlm_fast --model_args checkpoint=RUN --tasks mme
    python -m lmms_eval --model nanovlm_fast --model_args prompts=nanovlm --tasks ai2d

lmms-eval finds this module by an entry point (pyproject.toml), and nothing else imports it. It runs
in one process on one device.

The tests use a stand-in for lmms-eval, which needs too many packages to be installed for them. By
hand it was tried with the registry, base class and requests of version 0.7.3; no task has been run.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from lmms_eval.api.model import lmms

from nanovlm_fast.data.chat import make_text
from nanovlm_fast.data.images import Grid
from nanovlm_fast.data.samples import load_tiles
from nanovlm_fast.device import autocast_to, make_current, pick_device, pick_dtype
from nanovlm_fast.generate import generate, generator_of
from nanovlm_fast.packing.documents import IGNORE, Document
from nanovlm_fast.weights.pretrained import load_pretrained


@dataclass(frozen=True)
class TaskPrompt:
    """How the questions of a task are put to a model: what is changed in them and what is added."""

    before: str = ""
    replaced: tuple[tuple[str, str], ...] = ()  # in order, in `before` too
    after: str = ""
    reply: str = ""  # what the reply begins with

    def question(self, context: str) -> str:
        """Return the task's question as the user of the conversation asks it."""
        context = self.before + context
        for old, new in self.replaced:
            context = context.replace(old, new)
        return context + self.after


LETTER = TaskPrompt(
    replaced=(
        ("\nOptions:", "\nChoices:"),
        ("\nA. ", "\nChoices:\nA. "),
        ("Please select the correct answer from the options above.", "Answer with the letter."),
        (
            "Answer with the option's letter from the given choices directly",
            "Answer with the letter directly",
        ),
    ),
    reply="Answer:",
)
MMMU = TaskPrompt(
    replaced=(
        ("Question:", ""),
        (
            "Answer with the option's letter from the given choices directly.",
            "Answer with the letter directly.",
        ),
        ("\nA. ", "\nChoices:\nA. "),
    ),
    reply="Answer:",
)
DOCUMENT = TaskPrompt(
    before="Give a short and terse answer to the following question. Do not paraphrase or reformat "
    "the text you see in the image. Do not include any full stops. Just give the answer without "
    "additional explanation. Question: "
)
CHART = TaskPrompt(
    before="For the question below, follow the following instructions:\n"
    "-The answer should contain as few words as possible.\n"
    "-Don't paraphrase or reformat the text you see in the image.\n"
    "-Answer a binary question with Yes or No.\n"
    "-When asked to give a numerical value, provide a number like 2 instead of Two.\n"
    "-If the final answer has two or more items, provide it in the list format like [1, 2].\n"
    "-When asked to give a ratio, give out the decimal value like 0.25 instead of 1:4.\n"
    "-When asked to give a percentage, give out the whole value like 17 instead of decimal like "
    "0.17%.\n"
    "-Don't include any units in the answer.\n"
    "-Do not include any full stops at the end of the answer.\n"
    "-Try to include the full label from the graph when asked about an entity.\n"
    "Question: "
)
SCENE_TEXT = TaskPrompt(
    before="Answer the following question about the image using as few words as possible. Follow "
    "these additional instructions:\n"
    "-Always answer a binary question with Yes or No.\n"
    "-When asked what time it is, reply with the time seen in the image.\n"
    "-Do not put any full stops at the end of the answer.\n"
    "-Do not put quotation marks around the answer.\n"
    "-An answer with one or two words is favorable.\n"
    "-Do not apply common sense knowledge. The answer can be found in the image.\n"
    "Question: "
)
BRIEF = TaskPrompt(after="\nGive a very brief answer.")
# The wording and the names of tasks are nanoVLM's, so that scores can be compared with its own. It
# spells one task "chartvqa", which lmms-eval calls chartqa: that one is asked as it comes there too
NANOVLM_PROMPTS = {
    **dict.fromkeys(("ai2d", "mmstar", "seedbench", "scienceqa"), LETTER),
    **dict.fromkeys(("docvqa_val", "docvqa_test"), DOCUMENT),
    "chartvqa": CHART,
    **dict.fromkeys(("textvqa_val", "textvqa_test"), SCENE_TEXT),
    **dict.fromkeys(("mmmu_val", "mmmu_test"), MMMU),
    **dict.fromkeys(("infovqa_val", "mme", "ocrbench"), BRIEF),
}
PROMPTS: dict[str, dict[str, TaskPrompt]] = {"task": {}, "nanovlm": NANOVLM_PROMPTS}


def manifest() -> Any:
    """Return what the entry point registers: `--model nanovlm_fast` is the class below."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("nanovlm_fast", simple_class_path="nanovlm_fast.lmms_eval.NanoVLMFast")


class NanoVLMFast(lmms):
    """The model that lmms-eval asks. Its arguments come from --model_args.

    `checkpoint` is a run, a folder or a hub name (default: the latest run). With `prompts` =
    "nanovlm", questions are put as nanoVLM's own evaluation does for some tasks; with "task" they
    are asked as lmms-eval gives them. Raises what `load_pretrained` raises, and ValueError for
    other prompts, and for nanoVLM's with a model that has no conversations.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        device: str = "auto",
        batch_size: int | str = 16,
        lm_tokenizer: str = "",
        prompts: str = "task",
        **more: Any,
    ):
        super().__init__()
        # max_batch_size, and options that are None, come from lmms-eval and not from --model_args.
        unknown = [
            name for name, value in more.items() if value is not None and name != "max_batch_size"
        ]
        if unknown:
            known = "checkpoint, device, batch_size, lm_tokenizer, prompts"
            raise ValueError(f"--model_args {', '.join(unknown)}: there are {known}")
        if prompts not in PROMPTS:
            raise ValueError(f"--model_args prompts={prompts}: there are {', '.join(PROMPTS)}")
        self.device = make_current(pick_device(device))
        self.batch_size = int(batch_size)
        self.model, self.tokenizer = load_pretrained(checkpoint, self.device, lm_tokenizer)
        self.model.eval()
        config = self.model.config
        self.prompts = PROMPTS[prompts]
        if self.prompts and not config.lm_chat_template:
            raise ValueError(
                f"--model_args prompts={prompts}: for models of conversations (lm_chat_template), "
                f"this one is asked {config.prompt!r}"
            )
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
            prompt = self.prompt(task, question, grids)
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

    def prompt(self, task: str, question: str, grids: Sequence[Grid]) -> Document:
        """Return the document that asks a question of a task about images of these grids."""
        how = self.prompts.get(task, TaskPrompt())
        prompt = self.text.document([(how.question(question), "")], grids)
        begun = np.array(self.text.encode(how.reply), np.int64)
        return dataclasses.replace(
            prompt,
            input_ids=np.concatenate([prompt.input_ids, begun]),
            image_rows=np.append(prompt.image_rows, np.full(len(begun), -1, np.int32)),
            labels=np.append(prompt.labels, np.full(len(begun), IGNORE, np.int64)),
        )

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
