"""From scratch to 95% of easy-VQA's test split: seconds of training, padded nanoVLM against ours.

    python -m bench.race                                      preset tiny
    python -m bench.race --preset nanovlm-222m --wall-s 540   the 222M model from random weights
    python -m bench.race --only reference --wall-s 540        one side; the other's curve is kept
    python -m bench.race -- --max-steps 800                   options after -- go to both trainings

Both sides start from the same weights and train on the same packed batches from the same loader, in
the same order, with the same optimizer, schedule and clipping. They therefore learn the same, step
by step, and differ in what a step costs. The reference unpacks a batch on the device into nanoVLM
v0.1's left-padded rows, with one encoding of the image per question, runs the head over every
position and reads the loss at every step. It is spared v0.1's loader, its copies of float images
and its unfused optimizer, and under the data set's curriculum its rows hold only the questions that
are asked: the ratio is a lower bound. Ours is what train.py runs, compiled where the preset is.
Weights are float32, under bfloat16 autocast on a GPU.

The recipe is the one with which preset tiny learns easy-VQA. It uses Muon for the matrices, at a
rate of 0.02, for two reasons. AdamW does not reach the target (`bench.optimizers`: 70 to 84% held
out after 586 steps at the best of three rates; Muon 99%). And Muon's update has the same spectral
norm at any width, so the rate should carry over from width 64 to 768. The 222M model takes
nanoVLM's sizes, tiny's initialisation (see `embedding_std`) and centred pixels, a tokenizer trained
on the data (the vocabulary keeps its 49,152 rows), and as many questions per step as fit the
reference's memory. At that size the recipe has not been run yet: its rate (`-- --muon-scale 10`)
and length (`-- --max-steps 2400`) are guesses.

The clock counts training only: waiting for data is included; compilation, warm-up and evaluation
are not. Every --eval-every steps a fixed subset of the test images is evaluated by greedy
generation. A side has reached the target, and stops, once the whole test split confirms it. A side
that does not reach it within --budget-s or the schedule is "not reached". The result file is
written after every evaluation. A side that --wall-s or --budget-s interrupted continues in the next
call (--again starts over); exit code 75 says that --wall-s left something to do.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.harness.machine import WATCH
from bench.harness.options import split_options
from bench.harness.results import ROOT, facts, place, read, write
from bench.harness.tables import lined_up
from bench.harness.timing import synchronize
from bench.pages.figures import race_to_target
from bench.pages.race import SIDES, outcome, race_rows, speedups
from bench.subjects.race_sides import Fast, Reference, Setting
from nanovlm_fast.cli import parse_config
from nanovlm_fast.command import Parser, ran_out_of_memory, reports_errors
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.budget import measure_budget
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.example import Source, Subset
from nanovlm_fast.data.sources.registry import load_source, make_tokenizer
from nanovlm_fast.data.stream import PackedStream, StreamBatch, advance, initial_states
from nanovlm_fast.data.text import TextProcessor
from nanovlm_fast.data.workers import loader
from nanovlm_fast.device import autocast_to, make_current, pick_device, pick_dtype
from nanovlm_fast.evaluate import evaluate
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import PackedBatch
from nanovlm_fast.ranges import Range
from nanovlm_fast.training.feed import Feed
from nanovlm_fast.training.optim import apply_gradients, lr_factor, make_optimizers, set_lr

MAKERS: dict[str, type[Fast] | type[Reference]] = {"fast": Fast, "reference": Reference}
STATES = ROOT.parent.parent / "runs" / "race"
UNFINISHED = 75  # exit code: EX_TEMPFAIL
SHORTEST = 20.0  # seconds: a side is not started with less time than this left
# Options that do not change what is learned: with other values it is still the same race.
NOT_SETTINGS = {"out", "resume", "overwrite", "dry_run", "device", "wandb", "wandb_project"}
NOT_SETTINGS |= {"log_every", "save_every"}
# fmt: off
RECIPES: dict[str, tuple[str, ...]] = {
    "tiny": ("--max-steps", "500", "--eval-every", "25"),
    "nanovlm-222m": (
        "--vision", "", "--language", "", "--eval", "", "--lm-tokenizer", "train",
        "--init", "scratch", "--image-mean", "0.875", "--image-std", "0.25",
        "--turns", "independent", "--max-seqlen", "0", "--tokens-per-batch", "14336",
        "--max-steps", "1200", "--eval-every", "50", "--workers", "4",
        "--optimizer", "muon", "--muon-scale", "20", "--beta2", "0.98", "--clip", "1.0",
        "--lr-projector", "1e-3", "--lr-vision", "1e-3", "--lr-language", "1e-3",
        "--warmup", "0.04", "--min-lr", "0.0",
    ),
}
# fmt: on
QUICK = ("--max-steps", "4", "--eval-every", "2", "--tokens-per-batch", "768", "--workers", "0")


class Race:
    """What both sides share, and the result file."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.born = time.perf_counter()
        self.config, self.train = configs(args)
        self.device = make_current(pick_device(args.device))
        if self.train.dtype == "float16":
            raise ValueError("--dtype float16: neither side of the race scales its loss")
        self.dtype = pick_dtype(self.train.dtype, self.device)
        if self.dtype == torch.float16:
            self.dtype = torch.float32  # of a GPU without bfloat16
        self.autocast = autocast_to(self.dtype, self.device)
        source = load_source(args.data, "train")
        self.test = load_source(args.data, "test")
        # Spread over the split, and fixed: every point of both curves is about the same images.
        asked = np.unique(np.linspace(0, len(self.test) - 1, args.test_images).astype(int))
        self.asked = Subset(self.test, asked)
        self.tokenizer = make_tokenizer(self.config, source)
        text = TextProcessor(
            self.tokenizer, self.config.prompt, self.config.image_tokens, self.train.turns
        )
        self.load = SampleLoader(source, self.config, self.train, text)
        self.budget = measure_budget(self.load, self.train)
        self.setting = Setting(
            self.config, self.train, self.budget, self.device, self.dtype, self.autocast
        )
        values = {**dataclasses.asdict(self.config), **dataclasses.asdict(self.train)}
        values = {name: value for name, value in values.items() if name not in NOT_SETTINGS}
        values |= {"target": args.target, "test_images": len(asked), "dtype": str(self.dtype)[6:]}
        # Through JSON, so that they compare equal to settings that were read from a file.
        self.settings = json.loads(json.dumps(values))
        self.name = args.name or ("race" if args.preset == "tiny" else f"race_{args.preset}")
        self.file = place(self.name, self.device, args.out)
        self.sides: dict[str, dict] = {}
        self.ran = False
        # Sides of two races must not be compared, so results with other settings are dropped.
        if self.file.exists() and (before := read(self.file)).get("settings") == self.settings:
            self.sides = before["sides"]

    def save(self) -> None:
        result = {
            "preset": self.args.preset,
            "data": self.args.data,
            "target": self.args.target,
            "small": self.args.quick,
            "train_options": [*train_options(self.args)],
            "settings": self.settings,
            "budget": dataclasses.asdict(self.budget),
            "sides": {side: self.sides[side] for side in SIDES if side in self.sides},
        }
        write(self.name, self.device, {**result, **speedups(self.sides)}, self.args.out)

    def start(self) -> dict[str, Tensor]:
        """The weights that both sides start with, under the reference's names."""
        torch.manual_seed(self.train.seed)
        model = VisionLanguageModel(self.config)
        if (std := embedding_std(self.config)) is not None:
            nn.init.normal_(model.decoder.token_embedding.weight, std=std)
        return model.reference_state_dict()

    def run(self, side: str) -> None:
        """Train a side to the target or its end; raise ValueError if its loss is not finite."""
        before = self.sides.get(side, {})
        spent = 0 < self.args.budget_s <= before.get("seconds", 0.0)
        done = before.get("ended") in ("reached", "schedule") or spent
        if done and not self.args.again:
            print(f"{side}: done before")
            return
        if 0 < self.args.wall_s < time.perf_counter() - self.born + SHORTEST:
            print(f"{side}: no time left")
            return
        try:
            self.ran = True
            runner = Runner(self, side)
            with WATCH:
                runner.go()
        finally:
            # The next side must find neither the compiled graphs nor the memory of this one.
            torch._dynamo.reset()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def embedding_std(config: VLMConfig) -> float | None:
    """Standard deviation of a wide model's tied embedding under `init=scratch`; None: unchanged.

    At initialisation the branches are zero, and a tied head gives a token's own row a logit of
    std x width. That is 6.4 in preset tiny but 58 at a width of 576, where the loss started at 58.8
    (ln V is 10.8). This keeps tiny's 6.4.
    """
    wide = config.init == "scratch" and config.lm_tie_weights and config.lm_hidden_dim > 64
    return 6.4 / config.lm_hidden_dim if wide else None


class Runner:
    """One side: its model, optimizers, position in the data and record in the result file."""

    def __init__(self, race: Race, side: str):
        began = time.perf_counter()
        self.race = race
        self.name = side
        self.side = MAKERS[side](race.setting, race.start())
        model: Any = self.side.model  # the reference's has what `make_optimizers` needs as well
        self.optimizers = make_optimizers(model, race.train)
        self.states = initial_states(max(race.train.workers, 1))
        self.step = 0
        self.record: dict = {
            "commit": facts(race.device)["commit"],
            "calls": 1,
            "seconds": 0.0,
            "questions": 0,
            "points": [],
            "reached": None,
        }
        self.state_file = (race.args.state or STATES) / f"{race.name}_{side}.pt"
        if not race.args.again:
            self.resume()
        self.stream = PackedStream(race.load, race.budget, self.states)
        batches = iter(loader(self.stream, pin_memory=race.device.type == "cuda"))
        self.feed = Feed(batches, race.device, trim=self.side.trim)
        self.side.warm_up()
        # One batch ahead, so that the start of the workers is not on the clock.
        self.held: tuple[StreamBatch, PackedBatch] | None = next(self.feed)
        synchronize()
        self.record |= {**self.side.about, "ready_s": time.perf_counter() - began}

    def resume(self) -> None:
        """Continue from the state of an interrupted call of the same race, if there is one."""
        if not self.state_file.exists():
            return
        state = torch.load(self.state_file, map_location=self.race.device, weights_only=True)
        same_commit = state["record"]["commit"] == self.record["commit"]
        if state["settings"] != self.race.settings or not same_commit:
            print(f"{self.name}: {self.state_file} is of another race or commit; starting over")
            return
        self.side.model.load_state_dict(state["model"])
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.states = state["states"]
        self.step = state["step"]
        self.record = state["record"]
        self.record["calls"] += 1
        print(f"{self.name}: continues after step {self.step}, {self.record['seconds']:.0f} s")

    def keep(self) -> None:
        """Write the state that `resume` reads."""
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.state_file.with_suffix(".tmp")
        state = {
            "settings": self.race.settings,
            "record": self.record,
            "states": self.states,
            "step": self.step,
            "model": self.side.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        # Written beside the file and renamed: a kill must not destroy the state that is there.
        torch.save(state, temporary)
        os.replace(temporary, self.state_file)

    def go(self) -> None:
        """The training loop."""
        race = self.race
        train = race.train
        record = self.record
        # The clock starts in the past by what earlier calls have trained.
        started = time.perf_counter() - record["seconds"]
        while self.step < train.max_steps:
            batch, packed = self.held or next(self.feed)
            self.held = None
            self.states = advance(self.states, batch)
            if not packed.n_labels:  # a step without a label would only divide by zero
                continue
            loss = self.optimizer_step(packed)
            record["questions"] += packed.n_documents
            record["seconds"] = time.perf_counter() - started
            over = "budget" if 0 < race.args.budget_s <= record["seconds"] else ""
            if 0 < race.args.wall_s <= time.perf_counter() - race.born:
                over = "wall"
            at_end = self.step == train.max_steps
            if self.step % train.eval_every == 0 or over or at_end:
                synchronize()  # the clock must not stop before the queued kernels have run
                record["seconds"] = time.perf_counter() - started
                record["ended"] = over or ("schedule" if at_end else "running")
                self.evaluate(loss.item())
                started = time.perf_counter() - record["seconds"]  # evaluation is not training
                if record["reached"] or over:
                    break
        if record.get("ended") in ("budget", "wall"):
            self.keep()
        else:
            self.state_file.unlink(missing_ok=True)

    def optimizer_step(self, batch: PackedBatch) -> Tensor:
        train = self.race.train
        before = self.step / train.max_steps
        after = (self.step + 1) / train.max_steps
        set_lr(self.optimizers, lr_factor(before, after, train.warmup, train.min_lr))
        loss = self.side.backward(batch)
        # The update that train.py takes, on both sides: only forward and backward are compared.
        apply_gradients(self.side.model, self.optimizers, train.clip)
        self.step += 1
        return loss

    def evaluate(self, loss: float) -> None:
        """Add a point to the curve; check the whole test split if the subset is at the target."""
        race = self.race
        record = self.record
        if not math.isfinite(loss):
            record["ended"] = f"the loss was {loss} at step {self.step}"
            race.sides[self.name] = record
            race.save()
            raise ValueError(f"{self.name}: {record['ended']}")
        model = self.side.to_evaluate()

        def accuracy(source: Source) -> tuple[float, int]:
            with race.autocast():
                found = evaluate(model, race.tokenizer, source, mode=race.train.turns)
            return found.accuracy or 0.0, found.total  # None: no question could be asked

        right, total = accuracy(race.asked)
        point = {
            "step": self.step,
            "seconds": record["seconds"],
            "questions": record["questions"],
            "loss": loss,
            "accuracy": right,
            "asked": total,
        }
        if right >= race.args.target:
            point["whole"], point["asked_whole"] = accuracy(race.test)
            if point["whole"] >= race.args.target:
                record["reached"] = point
                record["ended"] = "reached"
        record["points"].append(point)
        race.sides[self.name] = record
        race.save()
        whole = f", the whole split {point['whole']:.1%}" if "whole" in point else ""
        where = f"{self.name:10} step {self.step:>5,} {record['seconds']:>8,.1f} s"
        print(f"{where}  loss {loss:.4f}  {right:.1%} of {total:,} questions{whole}", flush=True)


def train_options(args: argparse.Namespace) -> tuple[str, ...]:
    """train.py's options for this race."""
    quick = QUICK if args.quick else ()
    recipe = RECIPES.get(args.preset, ())
    return ("--preset", args.preset, "--data", args.data, *recipe, *quick, *args.train)


def configs(args: argparse.Namespace) -> tuple[VLMConfig, TrainConfig]:
    """The configuration, read as train.py reads it; exits on a wrong option.

    Raises ValueError for a configuration that both sides cannot train.
    """
    config, train = parse_config([*train_options(args)])
    if args.data not in ("easy_vqa", "synthetic") or train.turns != "independent":
        raise ValueError(
            "a race needs one image per question: --data easy_vqa or synthetic, --turns independent"
        )
    if train.max_steps < 1 or train.eval_every < 1 or train.accumulate != 1:
        raise ValueError(
            "a race needs --max-steps and --eval-every of at least 1, and --accumulate 1"
        )
    return config, train


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.race", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--data", default="", help="easy_vqa (default) or synthetic")
    parser.add_argument("--only", default="", choices=("", *SIDES), help="run only this side")
    share = Range(float, above=0, most=1)
    parser.add_argument("--target", type=share, default=0.95, help="accuracy on the test split")
    limit: dict[str, Any] = dict(type=Range(float), default=0.0)
    parser.add_argument("--budget-s", **limit, help="seconds of training per side; 0: no limit")
    parser.add_argument("--wall-s", **limit, help="seconds for this call; 0: no limit")
    images = Range(int, least=1)
    parser.add_argument("--test-images", type=images, default=200, help="per evaluation")
    parser.add_argument("--quick", action="store_true", help="a few steps on synthetic images")
    parser.add_argument("--again", action="store_true", help="start over, whatever there is")
    parser.add_argument("--name", default="", help="of the result file; default: race[_PRESET]")
    parser.add_argument("--state", type=Path, help="folder of interrupted runs (runs/race)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    own, handed_on = split_options(argv)
    args = make_parser().parse_args(own)
    args.train = tuple(handed_on)
    args.data = args.data or ("synthetic" if args.quick else "easy_vqa")
    args.test_images = min(args.test_images, 8) if args.quick else args.test_images
    return args


@reports_errors(ImportError)
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    failed = False
    try:
        race = Race(args)
        for side in [args.only] if args.only else SIDES:
            try:
                race.run(side)
            except (ValueError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not ran_out_of_memory(error):
                    raise
                failed = True
                print(f"error: {side}: {str(error).splitlines()[0]}", file=sys.stderr)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the points that are written stay") from None
    if not race.file.exists():
        return 1 if failed else UNFINISHED
    if race.ran:
        race.save()  # again, because the machine's readings are complete only now
    result = read(race.file)
    print(lined_up(race_rows(result)))
    with contextlib.suppress(ImportError):  # no matplotlib: bench.report draws it elsewhere
        race_to_target(race.file).write()
    print(f"written: {race.file}")
    print(outcome(result))
    if failed:
        return 1
    cut = any(side.get("ended") == "wall" for side in result["sides"].values())
    missing = not args.only and len(result["sides"]) < len(SIDES)
    return UNFINISHED if args.wall_s and (cut or missing) else 0


if __name__ == "__main__":
    sys.exit(main())
