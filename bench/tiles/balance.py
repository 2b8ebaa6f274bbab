"""How full packed batches of tiles are, and how much longer the slowest rank computes.

    python -m bench.tiles.balance

Nothing is trained: samples with the sizes of FineVision's (bench/subjects/workload.py says how they
are drawn) go through the packer of a run, one for each worker of each rank, with the budgets that
the run would measure. Places for tiles, tokens and labels are computed whether they are taken or
not, so they cost every rank the same. What differs between ranks is attention in the language
model, which follows the lengths of documents. The cost of a step is predicted from its FLOPs.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.harness.results import write
from bench.harness.tables import Rows, lined_up
from bench.subjects.workload import finevision_like
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.budget import LABEL_MULTIPLE, with_best_images
from nanovlm_fast.device import pick_device
from nanovlm_fast.model.flops import step_flops
from nanovlm_fast.packing.documents import Sample
from nanovlm_fast.packing.packer import Budget, Packer
from nanovlm_fast.presets import preset
from nanovlm_fast.ranges import SEED, Range

DRAWN = 4000  # samples, which the shards of all ranks draw from


def budget_of(model: VLMConfig, train: TrainConfig, samples: list[Sample]) -> Budget:
    """The budget that a run on a GPU would measure on these samples."""
    longest = train.max_seqlen or model.lm_max_position_embeddings
    fitting = [sample for sample in samples if sample.tokens <= longest]
    multiple = LABEL_MULTIPLE["cuda"]
    measured = Budget.measure(fitting, train.tokens_per_batch, longest, label_multiple=multiple)
    cost = step_flops(model, 1, 0, 0, 0) / step_flops(model, 0, 1, 0, 0)
    budget = with_best_images(measured, fitting, train.look_ahead, cost)
    return dataclasses.replace(budget, max_seqlen=longest)


class Shard:
    """One worker's packer, which draws samples from the pool without an end."""

    def __init__(self, budget: Budget, look_ahead: int, pool: list[Sample], seed: list[int]):
        self.packer = Packer(budget)
        self.look_ahead = look_ahead
        self.pool = pool
        self.rng = np.random.default_rng(seed)

    def next(self) -> list[Sample]:
        while len(self.packer.buffer) < self.look_ahead:
            self.packer.buffer.append(self.pool[self.rng.integers(len(self.pool))])
        return self.packer.next()


def counts_of(batch: list[Sample]) -> np.ndarray:
    """Tiles, tokens, labels and pairs of query and key of a batch, without its padding."""
    lengths = [len(document) for sample in batch for document in sample.documents]
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    sizes = np.array([sample.sizes for sample in batch]).sum(0)
    return np.array([sizes[2], sizes[0], sizes[3], pairs])


def padding_pairs(budget: Budget, tokens: int) -> int:
    """Pairs of the documents that padding is cut into."""
    whole, rest = divmod(budget.tokens - tokens, budget.max_seqlen)
    return whole * budget.max_seqlen * (budget.max_seqlen + 1) // 2 + rest * (rest + 1) // 2


def simulate(args: argparse.Namespace) -> dict[str, Any]:
    """The content of the result file."""
    model, train = preset(args.preset)
    if not model.max_img_size:
        raise ValueError(f"--preset {args.preset} does not cut images into tiles")
    samples = finevision_like(model, DRAWN, args.seed, blank=True)
    budget = budget_of(model, train, samples)
    pool = [sample for sample in samples if not budget.misfit(sample)]
    shards = [
        Shard(budget, train.look_ahead, pool, [args.seed, rank]) for rank in range(args.ranks)
    ]
    static = step_flops(model, budget.images, budget.tokens, budget.labels, 0)
    per_pair = step_flops(model, 0, 0, 0, 10**6) / 1e6
    filled = np.zeros(4)
    excess = []
    for _ in tqdm(range(args.steps), desc="steps", leave=False):
        costs = []
        for shard in shards:
            cost = 0.0
            for _ in range(train.accumulate):
                counts = counts_of(shard.next())
                filled += counts
                pairs = counts[3] + padding_pairs(budget, int(counts[1]))
                cost += static + per_pair * pairs
            costs.append(cost)
        excess.append(max(costs) / np.mean(costs) - 1)
    batches = args.steps * args.ranks * train.accumulate
    return {
        "preset": args.preset,
        "ranks": args.ranks,
        "steps": args.steps,
        "accumulate": train.accumulate,
        "look_ahead": train.look_ahead,
        "budget": dataclasses.asdict(budget),
        "left_out": 1 - len(pool) / len(samples),
        "filled": {
            name: filled[place] / batches / getattr(budget, name)
            for place, name in enumerate(("images", "tokens", "labels"))
        },
        "useful": useful(model, budget, filled / batches),
        "slowest_over_mean": {"mean": float(np.mean(excess)), "most": float(np.max(excess))},
    }


def useful(model: VLMConfig, budget: Budget, filled: np.ndarray) -> float:
    """The share of the predicted FLOPs of a batch that is not spent on padding."""
    tiles, tokens, labels, _ = (round(count) for count in filled)
    whole = step_flops(model, budget.images, budget.tokens, budget.labels, 0)
    return step_flops(model, tiles, tokens, labels, 0) / whole


def table(result: dict[str, Any]) -> str:
    budget = result["budget"]
    filled = result["filled"]
    slowest = result["slowest_over_mean"]
    rows: Rows = [(result["preset"], f"{result['steps']:,} steps of {result['ranks']} ranks")]
    rows += [
        (f"places for {name}", f"{budget[key]:,}, {1 - filled[key]:.1%} of them empty")
        for key, name in (("images", "tiles"), ("tokens", "tokens"), ("labels", "labels"))
    ]
    rows.append(("predicted FLOPs that are not padding", f"{result['useful']:.1%}"))
    over = f"{slowest['mean']:.2%} over the mean, {slowest['most']:.2%} at most"
    rows.append(("slowest rank of a step", over))
    rows.append(("samples over the budget", f"{result['left_out']:.2%}"))
    return lined_up(rows)


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.tiles.balance", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="nanovlm-460m", help="a preset with tiles")
    parser.add_argument("--ranks", type=Range(int, least=1, most=1024), default=8)
    parser.add_argument("--steps", type=Range(int, least=1), default=1000)
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    result = simulate(args)
    print(table(result))
    print(f"written: {write('balance', pick_device('cpu'), result, args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
