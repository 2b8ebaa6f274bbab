"""Exact-match accuracy, decoded by generation: what the model says against what it should say.

python -m nanovlm_fast.evaluate --checkpoint RUN --data easy_vqa [--blank-images] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from nanovlm_fast.checkpoint import load_pretrained
from nanovlm_fast.data.images import load_image
from nanovlm_fast.data.sources import Source, load_source
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.device import pick_device
from nanovlm_fast.generate import generate
from nanovlm_fast.model import VisionLanguageModel

BLANK = 127  # every pixel of a blanked image


@dataclass
class Evaluation:
    """Counts of a split; `wrong` keeps no examples, `answers` the first few for a look."""

    correct: int = 0
    total: int = 0
    skipped: list[str] = field(default_factory=list)  # unreadable examples
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
    blank_images: bool = False,
    examples_per_batch: int = 64,
    max_new_tokens: int = 12,
    progress: bool = False,
) -> Evaluation:
    """Ask every question of the source on its own, greedily, and count exact matches of the stripped answer.

    With `blank_images` every pixel is one grey: what is left is what the questions give away.
    """
    result = Evaluation()
    device = next(model.parameters()).device
    text = TextProcessor(tokenizer, model.config.prompt, model.config.image_tokens)
    was_training = model.training
    model.eval()
    for start in tqdm(range(0, len(source), examples_per_batch), desc="evaluate", disable=not progress, leave=False):
        images, prompts, turns = [], [], []
        for index in range(start, min(start + examples_per_batch, len(source))):
            try:
                example = source[index]
                decoded = [load_image(image, model.config.vit_img_size) for image in example.images]
            except ValueError as error:
                result.skipped.append(str(error))
                continue
            for question, answer in example.turns:
                prompt = text.document([(question, "")], len(decoded))
                prompt.image_rows[prompt.image_rows >= 0] += len(images) * model.config.image_tokens
                prompts.append(prompt)
                turns.append((question, answer))
            images += decoded
        size = model.config.vit_img_size
        stacked = torch.from_numpy(np.stack(images) if images else np.zeros((0, 3, size, size), np.uint8))
        if blank_images:
            stacked = torch.full_like(stacked, BLANK)
        replies = generate(model, stacked.to(device), prompts, tokenizer.eos_id, max_new_tokens)
        for (_, answer), reply in zip(turns, replies, strict=True):
            right = tokenizer.decode(reply).strip() == answer.strip()
            kind = "yes/no" if answer.strip().lower() in ("yes", "no") else "open"
            for count, more in ((0, right), (1, 1)):
                result.by_kind[kind][count] += more
            result.correct += right
            result.total += 1
    model.train(was_training)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nanovlm_fast.evaluate", description="Score a model on a data set.")
    parser.add_argument("--checkpoint", help="run or checkpoint folder (default: the latest run)")
    parser.add_argument("--data", default="easy_vqa", help="data set, named as for train.py")
    parser.add_argument("--split", default="test")
    parser.add_argument("--blank-images", action="store_true", help="hide the images: the question-only level")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    try:
        model, tokenizer = load_pretrained(args.checkpoint, pick_device(args.device))
        source = load_source(args.data, args.split)
        result = evaluate(model, tokenizer, source, args.blank_images, progress=not args.json)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(result.as_dict()))
        return 0
    sight = "blind" if args.blank_images else "sees"
    print(f"{sight}: {result.accuracy:.1%} of {result.total} questions ({args.data} {args.split}, by generation)")
    for kind, (correct, total) in sorted(result.by_kind.items()):
        print(f"  {kind:8} {correct / total:.1%} of {total}")
    for line in result.skipped:
        print(f"  skipped {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
