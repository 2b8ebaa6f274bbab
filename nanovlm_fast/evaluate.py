"""Accuracy by generation: what the model says against what it should say, exactly or as the data set judges it.

python -m nanovlm_fast.evaluate --checkpoint RUN --data easy_vqa|mmstar [--blank-images] [--json]
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.data.images import load_image
from nanovlm_fast.data.sources.example import Example, Source
from nanovlm_fast.data.sources.registry import load_source
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.device import autocast_to, pick_device, pick_dtype
from nanovlm_fast.generate import generate, generator_of
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.documents import Document
from nanovlm_fast.ranges import SEED
from nanovlm_fast.weights.folder import load_pretrained

BLANK = 127  # every pixel of a blanked image


@dataclass
class Evaluation:
    """Counts of a split. What could not be asked is no part of the score, but named and counted."""

    correct: int = 0
    total: int = 0
    unreadable: list[str] = field(default_factory=list)  # why examples were left out
    too_long: list[str] = field(default_factory=list)  # questions without room for their answer
    by_kind: dict[str, list[int]] = field(
        default_factory=lambda: defaultdict(lambda: [0, 0])
    )  # [correct, total]

    @property
    def accuracy(self) -> float | None:
        """None where nothing could be asked: that is no score of 0%."""
        return self.correct / self.total if self.total else None

    @property
    def skipped(self) -> list[str]:
        return self.unreadable + self.too_long

    @property
    def left_out(self) -> str:
        """How many and why, and the first of them; '' without any."""
        counts = (("unreadable", self.unreadable), ("too long for the model", self.too_long))
        said = " and ".join(f"{len(reasons)} {why}" for why, reasons in counts if reasons)
        return f"{said}, the first: {self.skipped[0]}" if said else ""

    def say(self, questions: str) -> str:
        """'97.0% of 100 questions', where `questions` names them, and what was left out."""
        said = f"none of the {questions} could be asked"
        if self.total:
            said = f"{self.accuracy:.1%} of {self.total} {questions}"
        return f"{said}; left out: {self.left_out}" if self.skipped else said

    def as_dict(self) -> dict:
        kinds = {
            kind: {"accuracy": c / n, "questions": n}
            for kind, (c, n) in sorted(self.by_kind.items())
        }
        return {
            "accuracy": self.accuracy,
            "correct": self.correct,
            "questions": self.total,
            "by_kind": kinds,
            "skipped": self.skipped,
        }


class TooLong(ValueError):
    """A question whose answer the model has no positions for; the message names it."""


@dataclass
class Question:
    """What `generate` is asked, and what it should say."""

    prompt: Document
    limit: int  # tokens of the reply
    answer: str
    kind: str
    number: tuple[int, int]  # example and turn


def make_prompt(
    model: VisionLanguageModel,
    text: TextProcessor,
    example: Example,
    turn: int,
    mode: str,
    reply_tokens: int = 0,
) -> tuple[Document, int]:
    """The prompt of one question as `mode` asks it, and how many tokens its reply may take.

    Those are `reply_tokens`, or, if 0, what the right answer, a blank and the end of sequence
    take: a longer reply is wrong in any case. Raises TooLong where the model has no positions for
    both.
    """
    question, answer = example.turns[turn]
    before = example.turns[:turn] if mode == "chat" else []
    prompt = text.document([*before, (question, "")], len(example.images))
    limit = reply_tokens or len(text.encode(f" {answer}")) + 2
    if len(prompt) + limit > model.config.lm_max_position_embeddings:
        room = f"the model's {model.config.lm_max_position_embeddings} positions"
        what = f"a prompt of {len(prompt)} tokens and its answer of {limit} are over {room}"
        raise TooLong(f"{example.name}: {what}")
    return prompt, limit


def evaluate(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    source: Source,
    mode: str = "independent",
    blank_images: bool = False,
    examples_per_batch: int = 64,
    progress: bool = False,
    style: str = "greedy",
    seed: int = 0,
    alive: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Ask the source's questions and count the right replies: those that match the stripped answer, or as it judges.

    `style` 'greedy' takes the likeliest tokens up to the end of sequence; 'v0.1' is how nanoVLM v0.1 was scored, for
    comparison: sampled at temperature 1 (from `seed`) and not cut at the end of sequence.
    `mode` is the --turns that the model was trained with: 'independent' asks every question on its own, 'chat' after
    the turns before it with their right answers, 'first' only the first. With `blank_images` every pixel is one grey:
    what is left is what the questions give away. Unreadable examples and over-long prompts are left
    out of the score, counted and named. A reply depends on its question alone, not on its batch.
    `alive` is called before every batch.
    """
    from tqdm import tqdm

    result = Evaluation()
    text = TextProcessor(
        tokenizer, getattr(source, "prompt", model.config.prompt), model.config.image_tokens
    )
    sampled_from = seed if style == "v0.1" else None
    was_training = model.training
    model.eval()
    starts = range(0, len(source), examples_per_batch)
    try:
        for start in tqdm(starts, desc="evaluate", disable=not progress, leave=False):
            alive()
            indices = range(start, min(start + examples_per_batch, len(source)))
            evaluate_batch(model, text, source, indices, mode, blank_images, sampled_from, result)
    finally:
        model.train(was_training)
    return result


def read_questions(
    model: VisionLanguageModel,
    text: TextProcessor,
    source: Source,
    indices: Iterable[int],
    mode: str,
    result: Evaluation,
) -> tuple[list[np.ndarray], list[Question]]:
    """The examples' images, and their questions, which index all of them.

    What is left out is noted in `result`.
    """
    images: list[np.ndarray] = []
    questions: list[Question] = []
    reply_tokens = getattr(source, "reply_tokens", 0)
    for index in indices:
        try:
            example = source[index].first() if mode == "first" else source[index]
            decoded = [load_image(image, model.config.vit_img_size) for image in example.images]
        except ValueError as error:
            result.unreadable.append(str(error))
            continue
        for turn, (_, answer) in enumerate(example.turns):
            try:
                prompt, limit = make_prompt(model, text, example, turn, mode, reply_tokens)
            except TooLong as error:
                result.too_long.append(str(error))
                continue
            except ValueError as error:  # the tokenizer's
                result.unreadable.append(f"{example.name}: {error}")
                continue
            prompt.image_rows[prompt.image_rows >= 0] += len(images) * text.image_tokens
            kind = example.kind or ("yes/no" if answer.lower() in ("yes", "no") else "open")
            questions.append(Question(prompt, limit, answer.strip(), kind, (index, turn)))
        images += decoded
    return images, questions


def evaluate_batch(
    model: VisionLanguageModel,
    text: TextProcessor,
    source: Source,
    indices: Iterable[int],
    mode: str,
    blank_images: bool,
    seed: int | None,
    result: Evaluation,
) -> None:
    """Add the examples at `indices` to `result`: images encoded once, all questions in one batch.

    With a `seed` replies are sampled, each from random numbers of its own, and not cut at the end
    of sequence.
    """
    size, tokenizer = model.config.vit_img_size, text.tokenizer
    device = next(model.parameters()).device
    images, questions = read_questions(model, text, source, indices, mode, result)
    pixels = torch.from_numpy(
        np.stack(images) if images else np.zeros((0, 3, size, size), np.uint8)
    )
    if blank_images:
        pixels = torch.full_like(pixels, BLANK)
    eos_id, sampling = tokenizer.eos_id, {}
    if seed is not None:
        eos_id = -1
        own = [generator_of(device, seed, *question.number) for question in questions]
        sampling = {"temperature": 1.0, "generator": own}
    prompts = [question.prompt for question in questions]
    limits = [question.limit for question in questions]
    replies = generate(model, pixels.to(device), prompts, eos_id, limits, **sampling)
    right = getattr(source, "right", str.__eq__)
    for question, reply in zip(questions, replies, strict=True):
        said = (
            tokenizer.base.decode(reply, skip_special_tokens=True)
            if sampling
            else tokenizer.decode(reply)
        )
        correct = bool(right(said.strip(), question.answer))
        result.by_kind[question.kind][0] += correct
        result.by_kind[question.kind][1] += 1
        result.correct += correct
        result.total += 1


def answer_samples(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    source: Source,
    count: int = 18,
    mode: str = "independent",
) -> list[tuple[np.ndarray, str, str, str]]:
    """(image (3, H, W) uint8, question, right answer, the model's), spread over the source.

    Without those that `evaluate` leaves out and names, and those that show no image.
    """
    config, device = model.config, next(model.parameters()).device
    text = TextProcessor(tokenizer, getattr(source, "prompt", config.prompt), config.image_tokens)
    samples = []
    for i, index in enumerate(np.unique(np.linspace(0, len(source) - 1, count).astype(int))):
        try:
            example = source[int(index)].first() if mode == "first" else source[int(index)]
            images = [load_image(image, config.vit_img_size) for image in example.images]
            if not images or not example.turns:
                continue
            turn = i % len(example.turns)
            prompt, limit = make_prompt(model, text, example, turn, mode)
        except ValueError:
            continue
        room = config.lm_max_position_embeddings - len(prompt)
        pixels = torch.from_numpy(np.stack(images)).to(device)
        limit = min(max(limit, 20), room)  # a wrong answer is worth reading too
        (reply,) = generate(model, pixels, [prompt], tokenizer.eos_id, limit)
        samples.append((images[0], *example.turns[turn], tokenizer.decode(reply).strip()))
    return samples


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m nanovlm_fast.evaluate", description="Score a model on a data set."
    )
    parser.add_argument(
        "--checkpoint",
        help="run (its newest checkpoint), RUN/best, or model folder; default: the latest run",
    )
    parser.add_argument("--data", default="easy_vqa", help="data set, named as for train.py")
    parser.add_argument("--split", default="test")
    parser.add_argument(
        "--turns",
        default="independent",
        choices=("independent", "chat", "first"),
        help="as trained",
    )
    parser.add_argument(
        "--blank-images", action="store_true", help="hide the images: the question-only level"
    )
    parser.add_argument(
        "--style",
        default="greedy",
        choices=("greedy", "v0.1"),
        help="v0.1: as nanoVLM published it",
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of style v0.1")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--lm-tokenizer", default="", help="hub name or folder; default: its own")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    device = pick_device(args.device)
    model, tokenizer = load_pretrained(args.checkpoint, device, args.lm_tokenizer)
    source = load_source(args.data, args.split)
    with autocast_to(pick_dtype("auto", device), device)():
        options = dict(progress=not args.json, style=args.style, seed=args.seed)
        result = evaluate(model, tokenizer, source, args.turns, args.blank_images, **options)
    if not result.total:
        raise ValueError(result.say(f"questions of {args.data} {args.split}"))
    if args.json:
        print(json.dumps({**result.as_dict(), "style": args.style}))
        return 0
    sight = "blind" if args.blank_images else "sees"
    print(f"{sight}: {result.say(f'questions ({args.data} {args.split}, {args.style})')}")
    width = max(map(len, result.by_kind), default=0)
    for kind, (correct, total) in sorted(result.by_kind.items()):
        print(f"  {kind:{width}} {correct / total:.1%} of {total}")
    for line in result.skipped:
        print(f"  skipped {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
