"""From scratch to 95% of easy-VQA's test split: padded nanoVLM against ours, wall-clock.

    python -m bench.race                                      preset tiny
    python -m bench.race --preset nanovlm-222m --wall-s 540   nanoVLM's 222M model at 224 x 224, from random weights
    python -m bench.race --preset nanovlm-222m --only reference --wall-s 540     one side; the other's curve stays
    python -m bench.race -- --max-steps 800                   options after -- are train.py's, for both sides

Both sides start from the same weights and take the same packed batches from the same loader, in the same order, with
the same optimizer, schedule and clipping; so they learn alike, step by step, and differ in what a step costs. The
reference unpacks a batch on the device into nanoVLM v0.1's left-padded rows, an encoding of its picture for every
question, takes the head over every position and reads the loss at every step. It is spared v0.1's loader, its copies of
float images and its unfused optimizer, and under the data set's curriculum its rows are only those asked: the ratio is
a lower bound. Ours is what train.py runs, compiled where the preset is. Weights are float32, under bfloat16 autocast on
a GPU.

The recipe is what preset tiny learns easy-VQA with: Muon for the matrices, at a rate of 0.02, because AdamW does not
get there (`bench.optimizers`: 70 to 84% held out after 586 steps at the best of three rates, Muon 99%), and because
Muon's update has the same spectral norm whatever the width, so that the rate should carry from 64 to 768. The 222M
model takes nanoVLM's sizes, tiny's initialisation (see `embedding_std`) and centred pixels, a tokenizer made from the
data (the vocabulary keeps its 49,152 rows), and as many questions a step as fit the reference's memory. At that size
the recipe has not been run yet: rate (`-- --muon-scale 10`) and length (`-- --max-steps 2400`) are guesses.

The clock counts training only, data wait included, and no compiling, warming up or evaluating. Every --eval-every steps
some pictures of the test split are asked by greedy generation, always the same ones; a side has reached the target once
the whole test split confirms it, and stops. What did not get there within --budget-s or the schedule is "not reached".
The result file is written after every evaluation. A side that --wall-s or --budget-s cut off goes on where it was in
the next call (--again begins anew): exit code 75 says that --wall-s left something to do.
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

import numpy as np
import torch
from torch import Tensor, nn

from bench.figures import race_to_target
from bench.machine import WATCH
from bench.race_sides import Fast, Reference, Setting
from bench.results import ROOT, facts, place, read, write
from bench.timing import synchronize
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.config import TrainConfig, VLMConfig, parse_config
from nanovlm_fast.data.sources import Subset, load_source, make_tokenizer
from nanovlm_fast.data.stream import Feed, PackedStream, SampleLoader, advance, initial_states, loader, measure_budget
from nanovlm_fast.data.text import TextProcessor
from nanovlm_fast.device import autocast_to, pick_device, pick_dtype
from nanovlm_fast.evaluate import evaluate
from nanovlm_fast.model import VisionLanguageModel
from nanovlm_fast.optim import lr_factor, make_optimizers, set_lr
from nanovlm_fast.packing import PackedBatch
from nanovlm_fast.ranges import Range

SIDES = ("fast", "reference")  # in this order: what is quick is there first
STATES = ROOT.parent.parent / "runs" / "race"
UNFINISHED = 75  # exit code: EX_TEMPFAIL
SHORTEST = 20.0  # seconds of a call that a side is not begun in
# of the run, not of what is learnt
NOT_SETTINGS = {"out", "resume", "overwrite", "dry_run", "device", "wandb", "wandb_project", "log_every", "save_every"}
RECIPES: dict[str, tuple[str, ...]] = {
    "tiny": ("--max-steps", "500", "--eval-every", "25"),
    "nanovlm-222m": (
        *("--vision", "", "--language", "", "--eval", "", "--lm-tokenizer", "train", "--init", "scratch"),
        *("--image-mean", "0.875", "--image-std", "0.25", "--turns", "independent", "--max-seqlen", "0"),
        *("--tokens-per-batch", "14336", "--max-steps", "1200", "--eval-every", "50", "--workers", "4"),
        *("--optimizer", "muon", "--muon-scale", "20", "--beta2", "0.98", "--clip", "1.0"),
        *("--lr-projector", "1e-3", "--lr-vision", "1e-3", "--lr-language", "1e-3", "--warmup", "0.04"),
        *("--min-lr", "0.0"),
    ),
}
QUICK = ("--max-steps", "4", "--eval-every", "2", "--tokens-per-batch", "768", "--workers", "0")


class Race:
    """What both sides share, and the result file."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.born = args, time.perf_counter()
        self.config, self.train = configs(args)
        self.device = pick_device(args.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.dtype = pick_dtype(self.train.dtype, self.device)
        self.autocast = autocast_to(self.dtype, self.device)
        source, self.test = load_source(args.data, "train"), load_source(args.data, "test")
        asked = np.unique(np.linspace(0, len(self.test) - 1, args.test_images).astype(int))
        self.asked = Subset(self.test, asked)
        self.tokenizer = make_tokenizer(self.config, source)
        text = TextProcessor(self.tokenizer, self.config.prompt, self.config.image_tokens, self.train.turns)
        self.load = SampleLoader(source, self.config, self.train, text)
        self.budget = measure_budget(self.load, self.train)
        self.setting = Setting(self.config, self.train, self.budget, self.device, self.dtype, self.autocast)
        values = {**dataclasses.asdict(self.config), **dataclasses.asdict(self.train)}
        values = {name: value for name, value in values.items() if name not in NOT_SETTINGS}
        values |= {"target": args.target, "test_images": len(asked), "dtype": str(self.dtype)[6:]}
        self.settings = json.loads(json.dumps(values))  # as a file gives them back
        name = args.name or ("race" if args.preset == "tiny" else f"race_{args.preset}")
        self.name, self.file = name, place(name, self.device, args.out)
        self.sides: dict[str, dict] = {}
        self.ran = False
        if self.file.exists() and (before := read(self.file)).get("settings") == self.settings:
            self.sides = before["sides"]  # of another race nothing is kept

    def save(self) -> None:
        result = {
            "preset": self.args.preset, "data": self.args.data, "target": self.args.target, "small": self.args.quick,
            "train_options": [*train_options(self.args)], "settings": self.settings,
            "budget": dataclasses.asdict(self.budget),
            "sides": {side: self.sides[side] for side in SIDES if side in self.sides},
        }  # fmt: skip
        write(self.name, self.device, {**result, **verdict(self.sides)}, self.args.out)

    def start(self) -> dict[str, Tensor]:
        """The weights that both sides begin with, under the reference's names."""
        torch.manual_seed(self.train.seed)
        model = VisionLanguageModel(self.config)
        if (std := embedding_std(self.config)) is not None:
            nn.init.normal_(model.decoder.token_embedding.weight, std=std)
        return model.reference_state_dict()

    def run(self, side: str) -> None:
        """Train it to the target, or to the end of what it may take. Raises ValueError if its loss is not finite."""
        before, budget = self.sides.get(side, {}), self.args.budget_s
        done = before.get("ended") in ("reached", "schedule") or 0 < budget <= before.get("seconds", 0.0)
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
            torch._dynamo.reset()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def embedding_std(config: VLMConfig) -> float | None:
    """What a wide model's tied embedding begins with under `init=scratch`; None: what it has.

    While the branches are zero, a tied head gives a token's own row a logit of std x width: 6.4 in preset tiny, but 58
    at a width of 576, where the loss began at 58.8 (ln V is 10.8). This keeps tiny's.
    """
    wide = config.init == "scratch" and config.lm_tie_weights and config.lm_hidden_dim > 64
    return 6.4 / config.lm_hidden_dim if wide else None


class Runner:
    """One side: its model and optimizers, its place in the data, and its record in the result file."""

    def __init__(self, race: Race, side: str):
        began = time.perf_counter()
        self.race, self.name = race, side
        self.side = {"fast": Fast, "reference": Reference}[side](race.setting, race.start())
        self.optimizers = make_optimizers(self.side.model, race.train)
        self.states, self.step = initial_states(max(race.train.workers, 1)), 0
        commit = facts(race.device)["commit"]
        self.record: dict = {
            "commit": commit,
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
        self.held = next(self.feed)  # the workers have begun
        synchronize()
        self.record |= {**self.side.about, "ready_s": time.perf_counter() - began}

    def resume(self) -> None:
        """Go on from the state of a call that was cut off in the same race, if there is one."""
        if not self.state_file.exists():
            return
        state = torch.load(self.state_file, map_location=self.race.device, weights_only=True)
        if state["settings"] != self.race.settings or state["record"]["commit"] != self.record["commit"]:
            print(f"{self.name}: {self.state_file} is of another race or commit; beginning anew")
            return
        self.side.model.load_state_dict(state["model"])
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.states, self.step, self.record = state["states"], state["step"], state["record"]
        self.record["calls"] += 1
        print(f"{self.name}: goes on after step {self.step}, {self.record['seconds']:.0f} s")

    def keep(self) -> None:
        """Write the state that `resume` reads."""
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.state_file.with_suffix(".tmp")
        state = {"settings": self.race.settings, "record": self.record, "states": self.states, "step": self.step}
        state |= {"model": self.side.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
        torch.save(state, temporary)
        os.replace(temporary, self.state_file)

    def go(self) -> None:
        """The loop."""
        race, train, record = self.race, self.race.train, self.record
        started = time.perf_counter() - record["seconds"]
        while self.step < train.max_steps:
            batch, packed = self.held or next(self.feed)
            self.held, self.states = None, advance(self.states, batch)
            if not packed.n_labels:
                continue
            loss = self.optimizer_step(packed)
            record["questions"] += packed.n_documents
            record["seconds"] = time.perf_counter() - started
            over = "budget" if 0 < race.args.budget_s <= record["seconds"] else ""
            if 0 < race.args.wall_s <= time.perf_counter() - race.born:
                over = "wall"
            at_end = self.step == train.max_steps
            if self.step % train.eval_every == 0 or over or at_end:
                synchronize()
                record["seconds"] = time.perf_counter() - started
                record["ended"] = over or ("schedule" if at_end else "running")
                self.evaluate(loss.item())
                started = time.perf_counter() - record["seconds"]  # that was not training
                if record["reached"] or over:
                    break
        if record.get("ended") in ("budget", "wall"):
            self.keep()
        else:
            self.state_file.unlink(missing_ok=True)

    def optimizer_step(self, batch: PackedBatch) -> Tensor:
        train = self.race.train
        before, after = self.step / train.max_steps, (self.step + 1) / train.max_steps
        set_lr(self.optimizers, lr_factor(before, after, train.warmup, train.min_lr))
        loss = self.side.backward(batch)
        if train.clip:
            nn.utils.clip_grad_norm_(self.side.model.parameters(), train.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss

    def evaluate(self, loss: float) -> None:
        """A point of the curve, and the whole test split where the pictures asked are at the target."""
        race, record = self.race, self.record
        if not math.isfinite(loss):
            record["ended"] = f"the loss was {loss} at step {self.step}"
            race.sides[self.name] = record
            race.save()
            raise ValueError(f"{self.name}: {record['ended']}")
        model = self.side.to_evaluate()

        def accuracy(source: Subset) -> tuple[float, int]:
            with race.autocast():
                found = evaluate(model, race.tokenizer, source, race.train.turns)
            return found.accuracy, found.total

        right, total = accuracy(race.asked)
        point = {"step": self.step, "seconds": record["seconds"], "questions": record["questions"], "loss": loss}
        point |= {"accuracy": right, "asked": total}
        if right >= race.args.target:
            point["whole"], point["asked_whole"] = accuracy(race.test)
            if point["whole"] >= race.args.target:
                record["reached"], record["ended"] = point, "reached"
        record["points"].append(point)
        race.sides[self.name] = record
        race.save()
        whole = f", the whole split {point['whole']:.1%}" if "whole" in point else ""
        place_ = f"{self.name:10} step {self.step:>5,} {record['seconds']:>8,.1f} s"
        print(f"{place_}  loss {loss:.4f}  {right:.1%} of {total:,} questions{whole}", flush=True)


def verdict(sides: dict[str, dict]) -> dict[str, float]:
    """How many times as fast ours is: to the target if both got there, and a step of the same batches.

    `at_least` is a bound where only ours got there and the reference has trained for longer.
    """
    found: dict[str, float] = {}
    if not all(side in sides for side in SIDES):
        return found
    fast, reference = (sides[side] for side in SIDES)
    if fast["reached"] and reference["reached"]:
        found["speedup"] = reference["reached"]["seconds"] / fast["reached"]["seconds"]
    elif fast["reached"] and reference["seconds"] > fast["reached"]["seconds"]:
        found["at_least"] = reference["seconds"] / fast["reached"]["seconds"]
    times = [{point["step"]: point["seconds"] for point in side["points"]} for side in (fast, reference)]
    if common := times[0].keys() & times[1].keys():
        last = max(common)
        found |= {"same_steps": last, "same_steps_times": times[1][last] / times[0][last]}
    return found


NAMES = {"fast": "ours", "reference": "padded reference (nanoVLM v0.1)"}


def race_rows(result: dict) -> list[tuple[str, ...]]:
    """The table of bench/README.md."""
    rows = [(f"to {result['target']:.0%} of the test split", "seconds of training", "steps", "questions seen",
             "questions/s", "best of the pictures asked")]  # fmt: skip
    for name, side in result["sides"].items():
        end = side["reached"] or {"seconds": side["seconds"], "questions": side["questions"]}
        steps = f"{side['points'][-1]['step']:,}" if side["points"] else "-"
        best = max((point["accuracy"] for point in side["points"]), default=0.0)
        seconds = f"**{end['seconds']:,.1f}**" if side["reached"] else f"not reached in {end['seconds']:,.0f}"
        rate = f"{end['questions'] / max(end['seconds'], 1e-9):,.0f}"
        rows.append((NAMES[name], seconds, steps, f"{end['questions']:,}", rate, f"{best:.1%}"))
    for name in NAMES.keys() - result["sides"].keys():
        rows.append((NAMES[name], "not measured yet", *["-"] * 4))
    return rows


def outcome(result: dict) -> str:
    """In a few words, for a line of the README."""
    sides = result["sides"]

    def seconds(side: str) -> str:
        if side not in sides:
            return "not measured yet"
        reached = sides[side]["reached"]
        return f"{reached['seconds']:,.0f} s" if reached else f"not reached in {sides[side]['seconds']:,.0f} s"

    gain = f"**{result['speedup']:.1f}x**: " if "speedup" in result else ""
    gain = gain or (f"**over {result['at_least']:.1f}x**: " if "at_least" in result else "")
    return f"{gain}{seconds('fast')} against {seconds('reference')} of training"


def train_options(args: argparse.Namespace) -> tuple[str, ...]:
    """train.py's options for this race."""
    quick = QUICK if args.quick else ()
    return ("--preset", args.preset, "--data", args.data, *RECIPES.get(args.preset, ()), *quick, *args.train)


def configs(args: argparse.Namespace) -> tuple[VLMConfig, TrainConfig]:
    """Read as train.py reads them. Raises ValueError for what a race cannot be; exits on an option that is wrong."""
    config, train = parse_config([*train_options(args)])
    if args.data not in ("easy_vqa", "synthetic") or train.turns != "independent":
        raise ValueError("a race needs one picture a question: --data easy_vqa or synthetic, --turns independent")
    if train.max_steps < 1 or train.eval_every < 1 or train.accumulate != 1:
        raise ValueError("a race needs --max-steps and --eval-every of at least 1, and --accumulate 1")
    return config, train


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.race", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--data", default="", help="easy_vqa (default) or synthetic")
    parser.add_argument(
        "--only", default="", choices=("", *SIDES), help="one side; the other stays as it is in the file"
    )
    parser.add_argument("--target", type=Range(float, above=0, most=1), default=0.95, help="accuracy on the test split")
    parser.add_argument(
        "--budget-s", type=Range(float), default=0.0, help="seconds of training for each side; 0: no limit"
    )
    parser.add_argument("--wall-s", type=Range(float), default=0.0, help="seconds of this call in all; 0: no limit")
    parser.add_argument(
        "--test-images", type=Range(int, least=1), default=200, help="pictures of the test split asked on the way"
    )
    parser.add_argument("--quick", action="store_true", help="a handful of steps on synthetic pictures: a rehearsal")
    parser.add_argument("--again", action="store_true", help="begin anew, whatever is there")
    parser.add_argument("--name", default="", help="of the result file; default: race, with the preset unless tiny")
    parser.add_argument("--state", type=Path, help="folder of what was cut off (default: runs/race)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder of the result files (default: bench/results)")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    split = argv.index("--") if "--" in argv else len(argv)
    args = make_parser().parse_args(argv[:split])
    args.train = tuple(argv[split + 1 :])
    args.data = args.data or ("synthetic" if args.quick else "easy_vqa")
    args.test_images = min(args.test_images, 8) if args.quick else args.test_images
    return args


@reports_errors(ImportError)
def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    failed = False
    try:
        race = Race(args)
        for side in [args.only] if args.only else SIDES:
            try:
                race.run(side)
            except (ValueError, torch.OutOfMemoryError) as error:
                failed = True
                print(f"error: {side}: {str(error).splitlines()[0]}", file=sys.stderr)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the points that are written stay") from None
    if not race.file.exists():
        return 1 if failed else UNFINISHED
    if race.ran:
        race.save()  # once more: what the machine did meanwhile is known now
    result = read(race.file)
    for row in race_rows(result):
        print(f"{row[0]:34} {row[1]:>24} {row[2]:>7} {row[3]:>15} {row[4]:>12} {row[5]:>28}")
    with contextlib.suppress(ImportError):  # no matplotlib: bench.report draws it elsewhere
        race_to_target(race.file).write()
    print(f"written: {race.file}")
    print(outcome(result))
    if failed:
        return 1
    cut = any(side.get("ended") == "wall" for side in result["sides"].values())
    return UNFINISHED if args.wall_s and (cut or not (args.only or len(result["sides"]) == 2)) else 0


if __name__ == "__main__":
    sys.exit(main())
