"""Accuracy by generation: what the model says against what it should say, exactly or as the data set judges it.

python -m nanovlm_fast.evaluate --checkpoint RUN --data easy_vqa|mmstar [--blank-images] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nanovlm_fast.checkpoint import load_pretrained
from nanovlm_fast.data.images import load_image
from nanovlm_fast.data.sources import Source, load_source
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.device import autocast_to, pick_device, pick_dtype
from nanovlm_fast.generate import generate
from nanovlm_fast.model import VisionLanguageModel

BLANK = 127  # every pixel of a blanked image


@dataclass
class Evaluation:
    """Counts of a split."""

    correct: int = 0
    total: int = 0
    skipped: list[str] = field(default_factory=list)  # why examples or questions were left out
    by_kind: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))  # [correct, total]

    @property
    def accuracy(self) -> float:
        return self.correct / max(self.total, 1)

    def as_dict(self) -> dict:
        kinds = {kind: {"accuracy": c / n, "questions": n} for kind, (c, n) in sorted(self.by_kind.items())}
        return {
            "accuracy": self.accuracy,
            "correct": self.correct,
            "questions": self.total,
            "by_kind": kinds,
            "skipped": self.skipped,
        }


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
    what is left is what the questions give away. Unreadable examples and over-long prompts are left out and named.
    `alive` is called before every batch.
    """
    from tqdm import tqdm

    result = Evaluation()
    text = TextProcessor(tokenizer, getattr(source, "prompt", model.config.prompt), model.config.image_tokens)
    sampling = {}
    if style == "v0.1":
        generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
        sampling = {"temperature": 1.0, "generator": generator}
    was_training = model.training
    model.eval()
    starts = range(0, len(source), examples_per_batch)
    for start in tqdm(starts, desc="evaluate", disable=not progress, leave=False):
        alive()
        indices = range(start, min(start + examples_per_batch, len(source)))
        evaluate_batch(model, text, source, indices, mode, blank_images, sampling, result)
    model.train(was_training)
    return result


def evaluate_batch(
    model: VisionLanguageModel,
    text: TextProcessor,
    source: Source,
    indices: Iterable[int],
    mode: str,
    blank_images: bool,
    sampling: dict[str, Any],
    result: Evaluation,
) -> None:
    """Add the examples at `indices` to `result`: their images encoded once, all their questions in one batch.

    With `sampling`, options of `generate`, replies are not cut at the end of sequence.
    """
    size, tokenizer = model.config.vit_img_size, text.tokenizer
    images, prompts, asked = [], [], []
    reply_tokens, new_tokens = getattr(source, "reply_tokens", 0), 1
    for index in indices:
        try:
            example = source[index].first() if mode == "first" else source[index]
            decoded = [load_image(image, size) for image in example.images]
        except ValueError as error:
            result.skipped.append(str(error))
            continue
        for i, (question, answer) in enumerate(example.turns):
            before = example.turns[:i] if mode == "chat" else []
            prompt = text.document([*before, (question, "")], len(decoded))
            needed = reply_tokens or len(text.encode(f" {answer}")) + 2  # a longer reply is wrong in any case
            if len(prompt) + needed > model.config.lm_max_position_embeddings:
                result.skipped.append(f"{example.name}: a prompt of {len(prompt)} tokens is too long for the model")
                continue
            new_tokens = max(new_tokens, needed)
            prompt.image_rows[prompt.image_rows >= 0] += len(images) * text.image_tokens
            prompts.append(prompt)
            asked.append((answer.strip(), example.kind or ("yes/no" if answer.lower() in ("yes", "no") else "open")))
        images += decoded
    pixels = torch.from_numpy(np.stack(images) if images else np.zeros((0, 3, size, size), np.uint8))
    if blank_images:
        pixels = torch.full_like(pixels, BLANK)
    longest = max((len(prompt) for prompt in prompts), default=0)
    new_tokens = min(new_tokens, model.config.lm_max_position_embeddings - longest)
    pixels = pixels.to(next(model.parameters()).device)
    eos_id = -1 if sampling else tokenizer.eos_id
    replies = generate(model, pixels, prompts, eos_id, new_tokens, **sampling)
    right = getattr(source, "right", str.__eq__)
    for (answer, kind), reply in zip(asked, replies, strict=True):
        said = tokenizer.base.decode(reply, skip_special_tokens=True) if sampling else tokenizer.decode(reply)
        correct = bool(right(said.strip(), answer))
        result.by_kind[kind][0] += correct
        result.by_kind[kind][1] += 1
        result.correct += correct
        result.total += 1


def answer_samples(
    model: VisionLanguageModel, tokenizer: Tokenizer, source: Source, count: int = 18
) -> list[tuple[np.ndarray, str, str, str]]:
    """(image (3, H, W) uint8, question, right answer, the model's) for readable examples spread over the source."""
    config, device = model.config, next(model.parameters()).device
    text = TextProcessor(tokenizer, config.prompt, config.image_tokens)
    samples = []
    for i, index in enumerate(np.unique(np.linspace(0, len(source) - 1, count).astype(int))):
        try:
            example = source[int(index)]
            images = [load_image(image, config.vit_img_size) for image in example.images]
        except ValueError:
            continue  # evaluate names it
        if images:
            question, answer = example.turns[i % len(example.turns)]
            prompt = text.document([(question, "")], len(images))
            pixels = torch.from_numpy(np.stack(images)).to(device)
            (reply,) = generate(model, pixels, [prompt], tokenizer.eos_id)
            samples.append((images[0], question, answer, tokenizer.decode(reply).strip()))
    return samples


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nanovlm_fast.evaluate", description="Score a model on a data set.")
    parser.add_argument(
        "--checkpoint", help="run (its newest checkpoint), RUN/best, or model folder; default: the latest run"
    )
    parser.add_argument("--data", default="easy_vqa", help="data set, named as for train.py")
    parser.add_argument("--split", default="test")
    parser.add_argument("--turns", default="independent", choices=("independent", "chat", "first"), help="as trained")
    parser.add_argument("--blank-images", action="store_true", help="hide the images: the question-only level")
    parser.add_argument("--style", default="greedy", choices=("greedy", "v0.1"), help="v0.1: as nanoVLM published it")
    parser.add_argument("--seed", type=int, default=0, help="of style v0.1")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    try:
        device = pick_device(args.device)
        model, tokenizer = load_pretrained(args.checkpoint, device)
        source = load_source(args.data, args.split)
        with autocast_to(pick_dtype("auto", device), device)():
            options = dict(progress=not args.json, style=args.style, seed=args.seed)
            result = evaluate(model, tokenizer, source, args.turns, args.blank_images, **options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps({**result.as_dict(), "style": args.style}))
        return 0
    sight = "blind" if args.blank_images else "sees"
    print(f"{sight}: {result.accuracy:.1%} of {result.total} questions ({args.data} {args.split}, {args.style})")
    width = max(map(len, result.by_kind), default=0)
    for kind, (correct, total) in sorted(result.by_kind.items()):
        print(f"  {kind:{width}} {correct / total:.1%} of {total}")
    for line in result.skipped:
        print(f"  skipped {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
