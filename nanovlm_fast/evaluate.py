"""Accuracy by generation: the model's replies, compared with the right answers.

    python -m nanovlm_fast.evaluate --checkpoint RUN --data easy_vqa [--blank-images] [--json]

A reply is right if it equals the answer, or by the data set's own rule, as for MMStar. Beside a
score of multiple-choice questions stands chance: what naming one of their letters blindly gives.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nanovlm_fast.command import Parser, add_model_options, reports_errors
from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data.chat import make_text
from nanovlm_fast.data.images import Grid, tiles_of
from nanovlm_fast.data.samples import TooLong, check_count, tiles_shown
from nanovlm_fast.data.sources.example import Example, Scoring, Source
from nanovlm_fast.data.sources.registry import load_source
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.device import autocast_to, leave_busy_cores, make_current, pick_device, pick_dtype
from nanovlm_fast.generate import generate, generator_of
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.documents import Document
from nanovlm_fast.ranges import SEED
from nanovlm_fast.weights.pretrained import load_pretrained

BLANK = 127  # every pixel of a blanked image: mid-grey
# Of an option: "A:", "A.", "A)" or "(A)". A letter inside a word or an acronym is none
LABEL = re.compile(r"(?<![\w.])([A-Z])[.:)]")
# An answer that names an option: "B", "(B)", "B." or, as in The Cauldron, "Answer: B"
CHOICE = re.compile(r"(?:answer:\s*)?\(?([a-z])\)?\.?", re.IGNORECASE)


def options_of(question: str, answer: str) -> int:
    """Return how many options a multiple-choice question has, 0 for another question.

    They are labelled A, B, C, ... in the question, and the answer is one of these letters.
    """
    chosen = CHOICE.fullmatch(answer.strip())
    if not chosen:
        return 0
    count = 0
    for label in LABEL.findall(question):
        count += label == chr(ord("A") + count)
    place = ord(chosen[1].upper()) - ord("A")
    return count if count > 1 and place < count else 0


@dataclass
class Evaluation:
    """The counts of one evaluation.

    Questions that could not be asked are not part of the score. They are counted and named.
    """

    correct: int = 0
    total: int = 0
    unreadable: list[str] = field(default_factory=list)  # why examples were left out
    too_long: list[str] = field(default_factory=list)  # questions without room for their answer
    # kind of question -> [correct, total]
    by_kind: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    # kind of question -> for each that is multiple choice, 1 / the number of its options
    chances: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def count(self, question: Question, correct: bool) -> None:
        """Add a question that was asked."""
        self.correct += correct
        self.total += 1
        self.by_kind[question.kind][0] += correct
        self.by_kind[question.kind][1] += 1
        if question.options:
            self.chances[question.kind].append(1 / question.options)

    def chance(self, kind: str | None = None) -> dict[str, Any]:
        """Return chance on the multiple-choice questions, of a kind or of all, and their number.

        The dict is empty if there are none.
        """
        kinds = list(self.chances) if kind is None else [kind]
        found = [chance for name in kinds for chance in self.chances.get(name, [])]
        return {"chance": statistics.fmean(found), "with_options": len(found)} if found else {}

    @property
    def accuracy(self) -> float | None:
        """The share of right replies, or None if nothing could be asked: that is not 0%."""
        return self.correct / self.total if self.total else None

    @property
    def skipped(self) -> list[str]:
        """Why each example or question was left out."""
        return self.unreadable + self.too_long

    @property
    def left_out(self) -> str:
        """How many were left out and why, and the first of them; empty if none was."""
        counts = (("unreadable", self.unreadable), ("too long for the model", self.too_long))
        said = " and ".join(f"{len(reasons)} {why}" for why, reasons in counts if reasons)
        return f"{said}, the first: {self.skipped[0]}" if said else ""

    def say(self, questions: str) -> str:
        """Return the score in words, as in "97.0% of 100 questions", and what was left out.

        `questions` says which questions they are.
        """
        said = f"none of the {questions} could be asked"
        if self.total:
            said = f"{self.accuracy:.1%} of {self.total} {questions}"
            said += say_chance(self.chance(), self.total)
        return f"{said}; left out: {self.left_out}" if self.skipped else said

    def as_dict(self) -> dict[str, Any]:
        """Return the object that --json prints and result.json holds."""
        kinds = {
            kind: {"accuracy": correct / total, "questions": total, **self.chance(kind)}
            for kind, (correct, total) in sorted(self.by_kind.items())
        }
        return {
            "accuracy": self.accuracy,
            "correct": self.correct,
            "questions": self.total,
            "by_kind": kinds,
            "skipped": self.skipped,
            **self.chance(),
        }


def say_chance(found: Mapping[str, Any], total: int, before: str = ", ") -> str:
    """Return chance in words, as part of a line that gives the score of `total` questions.

    `found` is what `Evaluation.chance` gives, or holds it; without chance the text is empty.
    """
    if "chance" not in found:
        return ""
    count = found["with_options"]
    some = "" if count == total else f" on the {count} with options"
    return f"{before}chance {found['chance']:.1%}{some}"


@dataclass
class Question:
    """A prompt and the right answer to it."""

    prompt: Document
    limit: int  # tokens of the reply
    answer: str
    kind: str
    number: tuple[int, int]  # example and turn
    options: int = 0  # of a multiple-choice question


def make_prompt(
    model: VisionLanguageModel,
    text: TextProcessor,
    example: Example,
    grids: Sequence[Grid],
    turn: int,
    mode: str,
    reply_tokens: int = 0,
) -> tuple[Document, int]:
    """Return the prompt of one question, and the most tokens that its reply may take.

    That limit is `reply_tokens`. If it is 0, it is what the right answer takes, plus a blank and
    the end of sequence: a longer reply is wrong in any case. Raises TooLong if the model does not
    have positions for both.
    """
    question, answer = example.turns[turn]
    before = example.turns[:turn] if mode == "chat" else []
    prompt = text.document([*before, (question, "")], grids)
    limit = reply_tokens or text.length(answer) + 2
    if len(prompt) + limit > model.config.lm_max_position_embeddings:
        room = f"the model's {model.config.lm_max_position_embeddings} positions"
        what = f"a prompt of {len(prompt)} tokens and its answer of {limit} are over {room}"
        raise TooLong(f"{example.name}: {what}")
    return prompt, limit


@dataclass
class Examiner:
    """Asks a model the questions of a source, and counts the right replies in `result`.

    The fields are those of `evaluate`. With a `seed` replies are sampled, each with random numbers
    of its own, and not cut at the end of sequence.
    """

    model: VisionLanguageModel
    tokenizer: Tokenizer
    source: Source
    mode: str
    blank_images: bool
    seed: int | None
    result: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        self.scoring = self.source.scoring or Scoring(prompt="")
        config = self.model.config
        self.text = make_text(self.tokenizer, config, "independent", self.scoring.prompt)

    def ask(self, indices: Iterable[int]) -> None:
        """Ask what the examples at `indices` ask, as one batch; their images are encoded once."""
        size = self.model.config.vit_img_size
        device = next(self.model.parameters()).device
        images, questions = self.read_questions(indices)
        tiles = np.concatenate(images) if images else np.zeros((0, 3, size, size), np.uint8)
        pixels = torch.from_numpy(tiles)
        if self.blank_images:
            pixels = torch.full_like(pixels, BLANK)
        eos_id = self.tokenizer.eos_id
        sampling: dict[str, Any] = {}
        if self.seed is not None:
            eos_id = -1  # no token has this id, so no reply ends early
            own = [generator_of(device, self.seed, *question.number) for question in questions]
            sampling = {"temperature": 1.0, "generator": own}
        prompts = [question.prompt for question in questions]
        limits = [question.limit for question in questions]
        replies = generate(self.model, pixels.to(device), prompts, eos_id, limits, **sampling)
        for question, reply in zip(questions, replies, strict=True):
            if sampling:
                # v0.1 drops special tokens here and keeps what follows the end of sequence.
                said = self.tokenizer.base.decode(reply, skip_special_tokens=True)
            else:
                said = self.tokenizer.decode(reply)
            correct = bool(self.scoring.right(said.strip(), question.answer))
            self.result.count(question, correct)

    def read_questions(self, indices: Iterable[int]) -> tuple[list[np.ndarray], list[Question]]:
        """Return the examples' tiles, and their questions, whose `image_rows` index all tiles.

        Examples and questions that cannot be asked are added to `result`.
        """
        images: list[np.ndarray] = []
        before = 0  # tiles
        questions: list[Question] = []
        for index in indices:
            try:
                example = self.source[index]
                if self.mode == "first":
                    example = example.first()
                check_count(example, self.model.config)
                tiles, grids = tiles_shown(example, self.model.config)
            except TooLong as error:
                self.result.too_long.append(str(error))
                continue
            except ValueError as error:
                self.result.unreadable.append(str(error))
                continue
            for turn in range(len(example.turns)):
                question = self.read_question(example, grids, turn, index)
                if question is not None:
                    # A document counts the image tokens of its own example; the batch has those
                    # of all.
                    rows = question.prompt.image_rows
                    rows[rows >= 0] += before * self.text.image_tokens
                    questions.append(question)
            images.append(tiles)
            before += len(tiles)
        return images, questions

    def read_question(
        self, example: Example, grids: Sequence[Grid], turn: int, index: int
    ) -> Question | None:
        """Return one question, or None if it cannot be asked, which is added to `result`."""
        asked, answer = example.turns[turn]
        tokens = self.scoring.reply_tokens
        try:
            prompt, limit = make_prompt(
                self.model, self.text, example, grids, turn, self.mode, tokens
            )
        except TooLong as error:
            self.result.too_long.append(str(error))
            return None
        except ValueError as error:  # text that the tokenizer cannot encode
            self.result.unreadable.append(f"{example.name}: {error}")
            return None
        kind = example.kind or ("yes/no" if answer.lower() in ("yes", "no") else "open")
        options = options_of(asked, answer)
        return Question(prompt, limit, answer.strip(), kind, (index, turn), options)


def evaluate(  # noqa: PLR0913  # the options of the command, by keyword
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    source: Source,
    *,
    mode: str = "independent",
    blank_images: bool = False,
    examples_per_batch: int = 0,
    progress: bool = False,
    style: str = "greedy",
    seed: int = 0,
    alive: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Ask the questions of `source` and count the right replies.

    A reply depends only on its question, not on its batch. Unreadable examples and prompts that are
    too long are left out of the score, counted and named.

    Args:
        mode: the --turns that the model was trained with. "independent" asks each question on its
            own, "chat" after the turns before it with their right answers, "first" only the first.
        blank_images: make every pixel the same grey. What remains is what the questions give away.
        style: "greedy" takes the likeliest tokens up to the end of sequence. "v0.1" is how nanoVLM
            v0.1 was scored, for comparison: sampled at temperature 1 and not cut at the end of
            sequence.
        seed: random seed of style "v0.1".
        examples_per_batch: 0 stands for 64, and for fewer if their images are cut into tiles.
        alive: called before every batch; the watchdog of a run resets its timer there.
    """
    from tqdm import tqdm

    sampled_from = seed if style == "v0.1" else None
    examiner = Examiner(model, tokenizer, source, mode, blank_images, sampled_from)
    was_training = model.training  # restored below, also after an error: a run trains on
    model.eval()
    # As many tiles as there would be images
    examples_per_batch = examples_per_batch or max(1, 64 // model.config.tiles_per_side**2)
    starts = range(0, len(source), examples_per_batch)
    try:
        for start in tqdm(starts, desc="evaluate", disable=not progress, leave=False):
            alive()
            examiner.ask(range(start, min(start + examples_per_batch, len(source))))
    finally:
        model.train(was_training)
    return examiner.result


def answer_samples(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    source: Source,
    count: int = 18,
    mode: str = "independent",
) -> list[tuple[np.ndarray, str, str, str]]:
    """Return `count` samples spread over the source, to be drawn in samples.png.

    Each is (image (3, H, W) uint8, question, right answer, the model's answer). Examples that
    `evaluate` leaves out, and those without an image, are skipped.
    """
    config = model.config
    device = next(model.parameters()).device
    text = make_text(tokenizer, config, mode, source.scoring.prompt if source.scoring else "")
    samples = []
    indices = np.unique(np.linspace(0, len(source) - 1, count).astype(int))
    for i, index in enumerate(indices):
        try:
            example = source[int(index)].first() if mode == "first" else source[int(index)]
            check_count(example, config)
            tiles, grids = tiles_shown(example, config)
            if not grids or not example.turns:
                continue
            turn = i % len(example.turns)
            prompt, limit = make_prompt(model, text, example, grids, turn, mode)
        except ValueError:
            continue
        room = config.lm_max_position_embeddings - len(prompt)
        pixels = torch.from_numpy(tiles).to(device)
        # More than the right answer takes: a wrong answer should be readable too.
        limit = min(max(limit, 20), room)
        (reply,) = generate(model, pixels, [prompt], tokenizer.eos_id, limit)
        samples.append(
            (shown(tiles, grids[0], config), *example.turns[turn], tokenizer.decode(reply).strip())
        )
    return samples


def shown(tiles: np.ndarray, grid: Grid, config: VLMConfig) -> np.ndarray:
    """(3, H, W) uint8: the first of the images, put together again from its tiles."""
    rows, columns = grid
    count = rows * columns
    if count == 1:
        return tiles[0]
    first = tiles_of(grid, config) - count  # after the tile that shows the whole, if there is one
    side = tiles.shape[-1]
    cut = tiles[first : first + count].reshape(rows, columns, 3, side, side)
    return cut.transpose(2, 0, 3, 1, 4).reshape(3, rows * side, columns * side)


def make_parser() -> Parser:
    """Return the parser of `python -m nanovlm_fast.evaluate`."""
    parser = Parser(
        prog="python -m nanovlm_fast.evaluate", description="Score a model on a data set."
    )
    add_model_options(parser)
    parser.add_argument("--data", default="easy_vqa", help="data set, named as for train.py")
    parser.add_argument("--split", default="test", help="train or test")
    parser.add_argument(
        "--turns",
        default="independent",
        choices=("independent", "chat", "first"),
        help="how the model was trained",
    )
    parser.add_argument(
        "--blank-images",
        action="store_true",
        help="replace images by grey: the score of the questions alone",
    )
    parser.add_argument(
        "--style",
        default="greedy",
        choices=("greedy", "v0.1"),
        help="v0.1: sampled and not cut at the end of sequence, as nanoVLM v0.1 was scored",
    )
    parser.add_argument("--seed", type=SEED, default=0, help="random seed of --style v0.1")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    """Print the score, as text or with --json as one object."""
    args = make_parser().parse_args(argv)
    device = make_current(pick_device(args.device))
    leave_busy_cores(device)
    model, tokenizer = load_pretrained(args.checkpoint, device, args.lm_tokenizer)
    source = load_source(args.data, args.split)
    with autocast_to(pick_dtype("auto", device), device)():
        result = evaluate(
            model,
            tokenizer,
            source,
            mode=args.turns,
            blank_images=args.blank_images,
            progress=not args.json,
            style=args.style,
            seed=args.seed,
        )
    # An error and not a score: a program that reads the output would take 0% for a result.
    if not result.total:
        raise ValueError(result.say(f"questions of {args.data} {args.split}"))
    if args.json:
        print(json.dumps({**result.as_dict(), "style": args.style}))
        return 0
    sight = "blind" if args.blank_images else "sees"
    print(f"{sight}: {result.say(f'questions ({args.data} {args.split}, {args.style})')}")
    width = max(map(len, result.by_kind), default=0)
    for kind, (correct, total) in sorted(result.by_kind.items()):
        chance = say_chance(result.chance(kind), total)
        print(f"  {kind:{width}} {correct / total:.1%} of {total}{chance}")
    for line in result.skipped:
        print(f"  skipped {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
