"""The same training, in several ways: does the fast model learn what the reference learns?

    python -m bench.loss_curves
    python -m bench.loss_curves --tokens 20480 --kernels all    on a GPU; fewer tokens on CPUs whose
                                                                bfloat16 is slow
    python -m bench.loss_curves --preset nanovlm-222m --layers 2 --tokens 256 --steps 70 \
        --variants 'packed float32,packed bfloat16,packed bfloat16 stream'

The padded reference and the packed model, each in float32 and under bfloat16 autocast, and the
packed model with `--stream bfloat16` and in float16 with a scaled loss, start from the same weights
and see the same questions in the same order. Each random seed draws other weights
and another order. The yardstick is what a change of seed does: a variant passes if at every step
its smoothed loss is closer to the float32 reference of the same seed than the reference's seeds are
to each other around that step. Exit code 1 if a packed variant does not pass.

A curve is kept as soon as it is done: a run that was interrupted goes on where it stopped, if the
tree has no changes and the settings are the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from bench.harness.results import facts, place, read, write_file
from bench.harness.tables import Rows, lined_up
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.data.budget import measure_budget
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.registry import load_source, texts
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.device import autocast_to, make_current, pick_device
from nanovlm_fast.model import reference
from nanovlm_fast.model.masters import masters_of
from nanovlm_fast.model.ops import choose_ops
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.model.scaling import make_scaler
from nanovlm_fast.packing.batch import pack, pad
from nanovlm_fast.packing.documents import Sample
from nanovlm_fast.packing.packer import Packer
from nanovlm_fast.presets import preset
from nanovlm_fast.ranges import Range
from nanovlm_fast.reporting.pictures import pyplot
from nanovlm_fast.training.optim import apply_gradients, lr_factor, set_lr

TRUTH = "reference float32"
STREAM = "packed bfloat16 stream"
HALF = "packed float16"
VARIANTS = (TRUTH, "reference bfloat16", "packed float32", "packed bfloat16", STREAM, HALF)
# Where the loss scale begins. Training begins with 65,536 and may skip its first steps, after which
# its curve would be compared with other steps.
SCALE = 4096.0
SPAN = 10  # steps: the time constant of the smoothing


class Data:
    """The training split as batches of samples, in an order that depends on the random seed."""

    def __init__(self, args: argparse.Namespace):
        self.model, train = preset(args.preset)
        if args.layers:
            blocks = dict(vit_n_blocks=args.layers, lm_n_blocks=args.layers)
            self.model = dataclasses.replace(self.model, **blocks)
        # Without augmentation: both models must see the same pixels.
        self.train = dataclasses.replace(
            train, data=args.data, tokens_per_batch=args.tokens, augment="none"
        )
        self.source = load_source(args.data, "train")
        tokenizer = Tokenizer.train(texts(self.source, self.model.prompt), self.model.lm_vocab_size)
        # No more than one question per document: the padded reference knows no conversations.
        turns = "first" if train.turns == "first" else "independent"
        self.text = TextProcessor(tokenizer, self.model.prompt, self.model.image_tokens, turns)
        self.budget = measure_budget(self.loader(0), self.train)

    def loader(self, seed: int) -> SampleLoader:
        train = dataclasses.replace(self.train, seed=seed)
        return SampleLoader(self.source, self.model, train, self.text)

    def batches(self, seed: int, steps: int) -> Iterator[list[Sample]]:
        """The first `steps` batches, packed as the training run's stream packs them."""
        load = self.loader(seed)
        packer = Packer(self.budget)
        position = 0
        for _ in range(steps):
            while len(packer.buffer) < self.train.look_ahead:
                packer.add(load(position))
                position += 1
            yield packer.next()


class Training:
    """One variant: its model, its optimizer (AdamW with the preset's rates) and its dtype."""

    def __init__(
        self, variant: str, start: VisionLanguageModel, data: Data, args: argparse.Namespace
    ):
        self.name = variant
        self.config = data.model
        self.train = data.train
        self.budget = data.budget
        self.device = make_current(torch.device(args.device))
        which, dtype, *_ = variant.split()
        stream = dtype if variant == STREAM else "float32"
        self.packed = which == "packed"
        self.model: nn.Module
        if self.packed:
            ops = choose_ops(args.kernels, self.device, stream=stream)
            packed = VisionLanguageModel(self.config, ops).to(self.device)
            packed.load_reference_state_dict(start.reference_state_dict())
            if stream == "bfloat16":
                packed.keep_masters()
            self.model = packed
        else:
            self.model = reference.VisionLanguageModel(self.config)
            self.model.load_state_dict(start.reference_state_dict())
        self.model.to(self.device)
        self.autocast = autocast_to(getattr(torch, dtype), self.device)
        self.scaler = make_scaler(getattr(torch, dtype), self.device)
        if self.scaler:
            self.scaler.update(SCALE)
        rates = {
            "MP": self.train.lr_projector,
            "vision_encoder": self.train.lr_vision,
            "decoder": self.train.lr_language,
        }
        masters = masters_of(self.model)
        groups = []
        for name, rate in rates.items():
            weights = masters.of_all(getattr(self.model, name).parameters())
            groups.append(dict(params=weights, lr=rate, peak_lr=rate))
        betas = (0.9, self.train.beta2)
        decay = self.train.weight_decay
        self.optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=decay, fused=True)

    def loss(self, samples: list[Sample]) -> torch.Tensor:
        """Mean over the labelled tokens."""
        config = self.config
        if self.packed:
            batch = pack(samples, self.budget, config.image_tokens, config.vit_img_size)
            batch = batch.trimmed().to(self.device)  # no padding: neither side computes any here
            return self.model(batch) / batch.n_labels
        # Rows as long as nanoVLM's, or as the longest document if that is longer.
        longest = max(int((d.image_rows < 0).sum()) for s in samples for d in s.documents)
        rows = pad(samples, max(config.lm_max_length, longest))
        pixels = reference.normalise(rows.images.to(self.device), config)
        ids = rows.input_ids.to(self.device)
        mask = rows.attention_mask.to(self.device)
        targets = rows.targets.to(self.device)
        return self.model(ids, pixels, mask, targets)[1]

    def step(self, samples: list[Sample], step: int, steps: int) -> float:
        """Optimizer step number `step` of `steps`, from 0; return the loss before it.

        Raises ValueError if the loss is not finite.
        """
        lr = lr_factor(step / steps, (step + 1) / steps, self.train.warmup, self.train.min_lr)
        set_lr([self.optimizer], lr)
        with self.autocast():
            loss = self.loss(samples)
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        # The update that train.py takes: a loss curve must show what training does.
        apply_gradients(self.model, [self.optimizer], self.train.clip, scaler=self.scaler)
        # Comparisons with NaN are False, so a diverged curve would pass as close to the reference.
        if not math.isfinite(loss.item()):
            raise ValueError(
                f"{self.name}: the loss is {loss.item()} in step {step + 1} of {steps}"
            )
        return loss.item()


class Kept:
    """Finished curves in a file beside the result, so that an interrupted run loses at most one."""

    def __init__(self, file: Path, about: dict[str, Any], settings: dict[str, Any]):
        """`about` is of `facts`. Curves of a file with others, or with other settings, are left."""
        self.file = file
        self.about = about
        self.settings = settings
        self.losses: dict[str, list[float]] = {}
        if file.exists() and about["clean"]:
            before = read(file)
            traced = ("commit", "clean", "torch", "threads")
            same = all(before.get(name) == about[name] for name in traced)
            if same and before.get("settings") == settings:
                self.losses = before["losses"]

    def add(self, name: str, losses: list[float]) -> None:
        self.losses[name] = losses
        write_file(self.file, {**self.about, "settings": self.settings, "losses": self.losses})


def train_all(args: argparse.Namespace, data: Data, kept: Kept) -> dict[str, np.ndarray]:
    """Losses of every variant, (seeds, steps), those of `kept` as they are."""
    curves = {variant: np.zeros((args.seeds, args.steps)) for variant in args.variants}
    total = args.seeds * len(curves) * args.steps
    with tqdm(total=total, unit="step", dynamic_ncols=True) as bar:
        for seed in range(args.seeds):
            for variant, rows in curves.items():
                name = f"{variant}, seed {seed}"
                if name not in kept.losses:
                    kept.add(name, train_one(variant, seed, data, args, bar))
                rows[seed] = kept.losses[name]
                bar.n = (seed * len(curves) + list(curves).index(variant) + 1) * args.steps
    return curves


def train_one(
    variant: str, seed: int, data: Data, args: argparse.Namespace, bar: tqdm
) -> list[float]:
    """The losses of one curve, a value per step."""
    torch.manual_seed(seed)
    start = VisionLanguageModel(data.model)  # the weights that all variants start from
    training = Training(variant, start, data, args)
    losses = []
    for step, samples in enumerate(data.batches(seed, args.steps)):
        losses.append(training.step(samples, step, args.steps))
        bar.update()
        bar.set_postfix_str(f"{variant}, seed {seed}: loss {losses[-1]:.4f}")
    return losses


def smooth(curves: np.ndarray) -> np.ndarray:
    """Exponential moving mean along the last axis, over SPAN steps or as many as there are."""
    out = np.empty_like(curves)
    keep = 1 - 1 / SPAN
    total = np.zeros(curves.shape[:-1])
    weight = 0.0  # normalises the mean while fewer than SPAN steps are in it
    for step in range(curves.shape[-1]):
        total = keep * total + curves[..., step]
        weight = keep * weight + 1
        out[..., step] = total / weight
    return out


def seed_spread(truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far the seeds lie apart, from smoothed losses (seeds, steps).

    Returns two (steps,) arrays: the distance at each step, and the largest one within SPAN steps.
    """
    here = truth.max(0) - truth.min(0)
    windows = (here[max(0, step - SPAN) : step + SPAN + 1] for step in range(len(here)))
    return here, np.array([window.max() for window in windows])


def judge(curves: dict[str, np.ndarray]) -> dict:
    """Compare every variant and seed with the float32 reference.

    `passed` is about the packed variants alone. `share` is the largest difference of the smoothed
    curves over all steps, relative to the spread of the reference's seeds. The spread is the
    largest within SPAN steps: where a few curves happen to cross, they are close by chance.
    `share_of_same_step` uses the spread of the same step, crossings included.
    """
    truth = smooth(curves[TRUTH])
    here, spread = seed_spread(truth)
    rows: list[dict[str, Any]] = []
    for variant in (name for name in curves if name != TRUTH):
        for seed, difference in enumerate(np.abs(smooth(curves[variant]) - truth)):
            shares = difference / np.maximum(spread, 1e-12)
            worst = int(shares.argmax())
            rows.append(
                {
                    "variant": variant,
                    "seed": seed,
                    "share": round(float(shares[worst]), 5),
                    "at_step": worst + 1,
                    "difference": round(float(difference[worst]), 7),
                    "spread": round(float(spread[worst]), 7),
                    "largest_difference": round(float(difference.max()), 7),
                    "share_of_same_step": round(
                        float((difference / np.maximum(here, 1e-12)).max()), 5
                    ),
                    "passed": bool(shares[worst] <= 1),
                }
            )
    return {
        "passed": all(row["passed"] for row in rows if row["variant"].startswith("packed")),
        "rows": rows,
    }


def draw(file: Path, curves: dict[str, np.ndarray]) -> None:
    """Left: smoothed curves of all variants and seeds. Right: differences against the spread."""
    plt = pyplot()
    # (colour, line width): the truth is wide and pale, so that curves on top of it stay visible.
    lines = (
        ("#afb8c1", 4.5),
        ("#bc4c00", 1.6),
        ("#1a7f37", 1.6),
        ("#1f6feb", 1.0),
        ("#8250df", 1.0),
        ("#bf3989", 1.0),
    )
    styles = {name: line for name, line in zip(VARIANTS, lines, strict=True) if name in curves}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), constrained_layout=True)
    truth = smooth(curves[TRUTH])
    steps = np.arange(1, truth.shape[1] + 1)
    for variant, (colour, width) in styles.items():
        for seed, curve in enumerate(smooth(curves[variant])):
            label = variant if seed == 0 else None
            left.plot(steps, curve, color=colour, lw=width, label=label)
            if variant != TRUTH:
                right.plot(steps, np.abs(curve - truth[seed]), color=colour, lw=1.0, label=label)
    here, spread = seed_spread(truth)
    right.fill_between(
        steps, spread, 10, color="#eaeef2", label="further than seeds are apart", zorder=0
    )
    right.plot(
        steps, here, color="#57606a", lw=1.5, ls=":", label="spread of the seeds at the step"
    )
    left.set(title=f"training loss, {len(truth)} seeds", xlabel="step", yscale="log")
    right.set(title="difference from the reference in float32", xlabel="step", yscale="log")
    right.set_ylim(1e-8, 10)
    for axis in (left, right):
        axis.margins(x=0.01)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles: dict[
        str, Any
    ] = {}  # by label: both axes show the same variants, the legend lists each once
    for axis in (left, right):
        handles |= {
            label: line for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False
    )
    figure.savefig(file, dpi=110)
    plt.close(figure)


def table(judged: dict) -> str:
    rows: Rows = [("variant", "seed", "difference", "spread", "share", "at step")]
    for row in judged["rows"]:
        distances = (f"{row['difference']:.2e}", f"{row['spread']:.2e}", f"{row['share']:.1%}")
        rows.append((row["variant"], str(row["seed"]), *distances, str(row["at_step"])))
    return lined_up(rows)


def chosen(names: str) -> tuple[str, ...]:
    """The variants of a comma-separated list in the order of `VARIANTS`, the truth among them.

    Raises ValueError for a name that is none.
    """
    wanted = {TRUTH, *(name.strip() for name in names.split(","))}
    if unknown := sorted(wanted - {*VARIANTS}):
        raise ValueError(f"--variants {', '.join(unknown)}: there are {', '.join(VARIANTS)}")
    if wanted == {TRUTH}:
        raise ValueError(f"--variants {TRUTH}: name another one, which is compared with it")
    return tuple(name for name in VARIANTS if name in wanted)


def result_name(args: argparse.Namespace) -> str:
    """The name of the result file, without its ending."""
    if args.name:
        return args.name
    name = "loss_curves" if args.preset == "tiny" else f"loss_curves_{args.preset}"
    return f"{name}_{args.layers}layer{'s' * (args.layers > 1)}" if args.layers else name


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.loss_curves", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument(
        "--layers", type=Range(int), default=0, help="of each tower, at full width; 0: the preset's"
    )
    parser.add_argument("--data", default="easy_vqa")
    parser.add_argument(
        "--variants",
        default=",".join(VARIANTS),
        help=f"comma-separated, compared with {TRUTH} (default: all)",
    )
    parser.add_argument("--steps", type=Range(int, least=1), default=200)
    parser.add_argument(
        "--seeds",
        type=Range(int, least=2),
        default=3,
        help="at least 2: their spread is the yardstick",
    )
    parser.add_argument(
        "--tokens",
        type=Range(int, least=1),
        default=1024,
        help="tokens per packed batch; more on a GPU",
    )
    parser.add_argument(
        "--kernels", default="none", help="Triton kernels of the packed model, as in train.py"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--name", default="", help="of the result file; default: loss_curves, and what of it is cut"
    )
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    args.variants = chosen(args.variants)
    args.device = str(pick_device(args.device))
    device = torch.device(args.device)
    choose_ops(args.kernels, device)  # refuses unknown names now, not after the reference's curve
    # Once, at the start: what runs is the tree of this moment, whatever is committed meanwhile.
    about = facts(device)
    file = place(result_name(args), device, args.out)
    data = Data(args)
    settings = {
        "preset": args.preset,
        "layers": args.layers,
        "data": args.data,
        "steps": args.steps,
        "seeds": args.seeds,
        "kernels": args.kernels,
        "tokens_per_batch": args.tokens,
        "images_per_batch": data.budget.images,
        "smoothing": SPAN,
    }
    kept = Kept(file.with_suffix(".part"), about, settings)
    curves = train_all(args, data, kept)
    judged = judge(curves)
    rounded = {variant: np.round(rows, 5).tolist() for variant, rows in curves.items()}
    result = {"suite": file.stem, **about, **settings, **judged, "curves": rounded}
    write_file(file, result)
    draw(file.with_suffix(".png"), curves)
    kept.file.unlink()  # last: without a picture, the same command has only that left to do
    print(table(judged))
    print(f"written: {file}")
    if not judged["passed"]:
        why = "a packed variant is further from the reference than seeds are apart"
        print(f"error: {why}", file=sys.stderr)
    return int(not judged["passed"])


if __name__ == "__main__":
    sys.exit(main())
