"""What a step costs on 1 to 1,024 GPUs: a model of its communication, checked by counting bytes.

    python -m bench.scaling                      tables, traffic, result file
    python -m bench.scaling --steps 0            without counting traffic

This is a model, not a measurement: no run on more than one GPU stands behind these times. It adds
up the following parts.

- The step of one GPU: from a committed GPU result of bench.train_step if there is one, else what
  bench.compiled_step predicts for an H100, else the floor that bench.roofline computes. No step
  reaches that floor, and a slower step hides more communication, so the floor is the hard case. The
  roofline also says how a step divides over the parts of the model.
- DDP's buckets: the model's own gradients, in the order in which a backward on the meta device
  produces them, in buckets that close at 25 MiB, the first at 1 MiB. The tied table's gradient
  arrives when the language model is done, with the backward of the vision tower still to come.
  Within the language model, the projector and the vision tower, gradients arrive evenly. A bucket
  is reduced once it is full and the previous one is done; what continues after the backward is
  exposed.
- A collective in nodes of eight GPUs, with NVLink inside and one network card per GPU between
  nodes: reduce inside, exchange each GPU's eighth between the nodes, gather inside, in turn. Each
  phase costs bytes over bandwidth, and hops. The hops of a ring grow with the number of nodes,
  those of a tree with its logarithm; NCCL has trees for all-reduce alone and takes them where they
  are faster.
- FSDP2 (`shard`): one unit per block. A unit is gathered for the forward, and again for the
  backward, while the previous unit computes. Gradients are reduce-scattered, and a GPU updates only
  its own share.

"No overlap" is the case of a backward compiled into one graph: its gradients all appear at its end.
Dynamo's `optimize_ddp` splits that graph at the buckets. Left out are the SMs and memory bandwidth
that NCCL takes from the step, stragglers, the data path, NVLink SHARP (faster inside a node), and
networks that are shared or blocking (slower).

Weak scaling: the same number of samples on every GPU. Strong scaling: the same number in total, so
ever fewer per GPU, with the roofline's step for those. Efficiency is the time of one GPU over that
of n (strong: over n times that of n).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.harness.results import ROOT, write
from bench.harness.traffic import measure
from bench.harness.traffic import table as traffic_table
from bench.subjects.one_gpu import PARTS, Compute, compute_of, floor_of
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.config import VLMConfig
from nanovlm_fast.device import pick_device
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.presets import preset
from nanovlm_fast.ranges import Range
from nanovlm_fast.training.warmup import full_batch

GPUS = tuple(2**i for i in range(11))
ENOUGH = 0.9  # efficiency
NODE = 8  # GPUs
BUCKET = 25 * 2**20  # bytes: DDP's bucket_cap_mb
FIRST_BUCKET = 2**20  # DDP starts with a small one, so that communication begins early
TABLE = "decoder.token_embedding.weight"
# Seconds before a collective's first hop: NCCL's src/graph/tuning.cc, baseLat, ring, Simple.
LAUNCH = 8.4e-6


@dataclass(frozen=True)
class Link:
    """Bytes/s that a GPU sends while it receives as many, and seconds per hop."""

    name: str
    bandwidth: float
    hop: float


# NVLink 4: 450e9 on the line; 370e9 is left after the protocol, according to NVIDIA in
# github.com/NVIDIA/nccl-tests/issues/212. NDR: 400 Gb/s on the line; 46 to 48 GB/s per card can be
# expected, according to NVIDIA in github.com/NVIDIA/nccl-tests/issues/290. Hops: NCCL's own model,
# src/graph/tuning.cc, hwLat of the Simple protocol (ring: 3.4 and 14; tree between nodes: 14).
NVLINK = Link("NVLink 4", 370e9, 3.4e-6)
INFINIBAND = Link("InfiniBand NDR, a card a GPU", 47e9, 14e-6)


@dataclass(frozen=True)
class Mode:
    """How gradients travel: `element` bytes each; a `tree` between nodes where it is faster."""

    name: str
    shard: bool = False
    element: int = 4
    overlap: bool = True
    tree: bool = False


def modes() -> list[Mode]:
    """Every combination of sharding, gradient dtype, overlap and algorithm."""
    found = []
    for kind, element in (("float32", 4), ("bfloat16", 2)):
        for overlap in (True, False):
            rest = f"{kind}, {'overlapped' if overlap else 'no overlap'}"
            for tree in (True, False):
                name = f"DDP {rest}, ring{' or tree' * tree}"
                found.append(Mode(name, False, element, overlap, tree))
            found.append(Mode(f"FSDP2 {rest}", True, element, overlap))
    return sorted(found, key=lambda mode: (mode.shard, not mode.overlap, not mode.tree))


# ---- collectives


def sent_bytes(payload: float, gpus: int, passes: int) -> float:
    """Bytes that each GPU sends; a ring's all-gather or reduce-scatter is a pass, all-reduce 2."""
    return passes * (gpus - 1) / gpus * payload


def collective_seconds(payload: float, gpus: int, passes: int, tree: bool = False) -> float:
    """Seconds of one collective: the launch, then `passes` times the node's and the nodes' phase.

    The phase inside the node is a ring; that between nodes is a ring or a tree. `gpus` is any
    number up to a node, then whole nodes.
    """
    if gpus == 1 or not payload:
        return 0.0
    inside = min(gpus, NODE)
    nodes = math.ceil(gpus / NODE)

    def one(link: Link, hops: int, sent: float) -> float:
        return hops * link.hop + sent / link.bandwidth

    between = one(INFINIBAND, nodes - 1, sent_bytes(payload / inside, nodes, 1))
    if tree:  # the inner nodes of a tree pass the whole payload on
        between = min(between, one(INFINIBAND, math.ceil(math.log2(nodes)), payload / inside))
    if nodes == 1:
        between = 0.0
    within = one(NVLINK, inside - 1, sent_bytes(payload, inside, 1))
    return LAUNCH + passes * (within + between)


# ---- gradients


def gradients(config: VLMConfig) -> list[tuple[str, int]]:
    """(name, elements) in the order in which the backward produces them.

    The backward runs on the meta device, so nothing is computed or allocated.
    """
    length = config.image_tokens + 8
    budget = Budget(tokens=length, documents=1, images=1, labels=4, max_seqlen=length)
    order: list[tuple[str, int]] = []

    def record(name: str, parameter: torch.Tensor) -> None:
        order.append((name, parameter.numel()))

    with torch.device("meta"):
        model = VisionLanguageModel(config)
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(functools.partial(record, name))
        model(full_batch(budget, config).to("meta")).backward()
    return order


def ready_times(order: list[tuple[str, int]], backward: dict[str, float]) -> list[float]:
    """When each gradient is complete, in seconds since the backward began.

    The parts follow one another, and gradients arrive evenly within each. The tied table takes no
    time of its own: its gradient is complete with the language model's.
    """
    size = dict.fromkeys(backward, 0)
    for name, elements in order:
        size[PARTS[name.split(".")[0]]] += elements * (name != TABLE)
    clock = 0.0
    times = []
    for name, elements in order:
        part = PARTS[name.split(".")[0]]
        clock += backward[part] * elements * (name != TABLE) / size[part]
        times.append(clock)
    return times


def buckets(sizes: list[int], cap: int = BUCKET, first: int = FIRST_BUCKET) -> list[list[int]]:
    """DDP's buckets, as indices of gradients of the given bytes.

    The gradient that fills a bucket closes it, however large it is. These are the buckets from the
    second step on. If bucket_cap_mb is set, the first bucket is no smaller (`first` = `cap`).
    """
    found: list[list[int]] = []
    current: list[int] = []
    filled = 0
    for i, size in enumerate(sizes):
        current.append(i)
        filled += size
        if filled >= (cap if found else first):
            found.append(current)
            current = []
            filled = 0
    return [*found, current] if current else found


# ---- the step of many


def ddp_seconds(compute: Compute, order: list[tuple[str, int]], gpus: int, mode: Mode) -> float:
    """A DDP step: compute, and the part of the communication that the backward does not hide.

    Buckets are cut by float32 sizes; in bfloat16 the same buckets travel as half the bytes.
    """
    times = ready_times(order, compute.backward)
    end = sum(compute.backward.values())
    done = 0.0
    for bucket in buckets([4 * elements for _, elements in order]):
        payload = mode.element * sum(order[i][1] for i in bucket)
        ready = times[bucket[-1]] if mode.overlap else end
        done = max(done, ready) + collective_seconds(payload, gpus, 2, mode.tree)
    # One GPU sends nothing; its buckets are complete when the backward is.
    exposed = max(done - end, 0.0) if gpus > 1 else 0.0
    return compute.seconds + exposed


def units(
    order: list[tuple[str, int]], compute: Compute
) -> tuple[int, list[tuple[int, float, float]]]:
    """Elements of FSDP's root, and (elements, forward, backward seconds) of each block.

    The blocks are in the order of the forward and share the time of their part evenly. The
    projector's time, a few percent, is added to the vision blocks before it.
    """
    root = 0
    blocks: dict[str, dict[str, int]] = {"vision_encoder": {}, "decoder": {}}
    for name, elements in reversed(order):
        part, *rest = name.split(".")
        if rest[0] == "blocks":
            blocks[part][rest[1]] = blocks[part].get(rest[1], 0) + elements
        else:
            root += elements
    seconds = {"vision_encoder": ("vision", "projector"), "decoder": ("language",)}
    found = []
    for part, sizes in blocks.items():
        forward = sum(compute.forward[p] for p in seconds[part]) / len(sizes)
        backward = sum(compute.backward[p] for p in seconds[part]) / len(sizes)
        found += [(elements, forward, backward) for elements in sizes.values()]
    return root, found


def fsdp_seconds(compute: Compute, order: list[tuple[str, int]], gpus: int, mode: Mode) -> float:
    """An FSDP step: gathers and reductions take turns on the links.

    With overlap, a unit is gathered while the previous one computes.
    """
    if gpus == 1:
        return compute.seconds
    root, blocks = units(order, compute)
    # (elements to gather, seconds to compute, elements to reduce): forward, then backward. The root
    # is gathered first in both, and its gradients are complete last.
    jobs = [(root, 0.0, 0), *((size, forward, 0) for size, forward, _ in blocks)]
    jobs += [(root, 0.0, 0)]
    jobs += [(size, backward, size) for size, _, backward in reversed(blocks)]
    jobs += [(0, 0.0, root)]
    links = 0.0  # when the links are free
    clock = 0.0  # when the GPU is free
    start = 0.0  # when the previous unit began to compute
    waiting = 0.0  # seconds of the previous unit's reduction, which lets the next gather go first
    for gathered, seconds, reduced in jobs:
        gather = collective_seconds(mode.element * gathered, gpus, 1)
        scatter = collective_seconds(mode.element * reduced, gpus, 1)
        links = max(links, start if mode.overlap else clock) + gather
        start = max(clock, links)
        if waiting:
            links = max(links, clock) + waiting
            start = start if mode.overlap else links
        clock = start + seconds
        waiting = scatter
    return max(links, clock) + waiting + compute.update / gpus


def step_seconds(compute: Compute, order: list[tuple[str, int]], gpus: int, mode: Mode) -> float:
    step = fsdp_seconds if mode.shard else ddp_seconds
    return step(compute, order, gpus, mode)


def weak(compute: Compute, order: list[tuple[str, int]], mode: Mode) -> dict[str, dict[str, float]]:
    """Weak scaling, by GPUs.

    Seconds, the seconds that communication adds, efficiency, and the bytes a GPU sends per step.
    """
    payload = mode.element * sum(elements for _, elements in order)
    rows = {}
    for gpus in GPUS:
        seconds = step_seconds(compute, order, gpus, mode)
        own = compute.seconds - compute.update * (1 - 1 / gpus) * mode.shard
        rows[str(gpus)] = {
            "seconds": seconds,
            "exposed": seconds - own,
            "efficiency": compute.seconds / seconds,
            "sent": sent_bytes(payload, gpus, 3 if mode.shard else 2),
        }
    return rows


def shares(config: VLMConfig, compute: Compute) -> dict[int, Compute]:
    """By GPUs: one GPU's step with its share of the samples. It shrinks as its floor does."""
    factor = compute.seconds / floor_of(config, compute.samples).seconds
    evenly = [gpus for gpus in GPUS if compute.samples % gpus == 0]
    return {gpus: floor_of(config, compute.samples // gpus).scaled(factor) for gpus in evenly}


def strong(
    parts: dict[int, Compute], order: list[tuple[str, int]], mode: Mode
) -> dict[str, dict[str, float]]:
    """Strong scaling, by GPUs; `links_free` is the efficiency if communication were free."""
    rows = {}
    for gpus, local in parts.items():
        seconds = step_seconds(local, order, gpus, mode)
        ideal = parts[1].seconds / gpus
        rows[str(gpus)] = {
            "samples": local.samples,
            "seconds": seconds,
            "efficiency": ideal / seconds,
            "links_free": ideal / local.seconds,
        }
    return rows


def falls_below(rows: dict[str, dict[str, float]]) -> int | None:
    """The smallest modelled number of GPUs whose efficiency is below ENOUGH, if there is one."""
    return next((int(gpus) for gpus, row in rows.items() if row["efficiency"] < ENOUGH), None)


def modelled(preset_name: str, samples: int, results: Path = ROOT) -> dict:
    """The content of the result file, without the traffic."""
    config, _ = preset(preset_name)
    compute = compute_of(config, preset_name, samples, results)
    order = gradients(config)
    found = {}
    for mode in modes():
        rows = weak(compute, order, mode)
        found[mode.name] = {**dataclasses.asdict(mode), "weak": rows, "below": falls_below(rows)}
    parts = shares(config, compute)
    usual = [mode for mode in modes() if mode.tree and mode.element == 4]
    fixed = {mode.name: strong(parts, order, mode) for mode in usual}
    bytes_ = [4 * elements for _, elements in order]
    sizes = [sum(bytes_[i] for i in bucket) for bucket in buckets(bytes_)]
    links = {"node": NODE, "launch": LAUNCH, "inside": vars(NVLINK), "between": vars(INFINIBAND)}
    return {
        "preset": preset_name,
        "timed": False,  # a model, not a measurement
        "compute": {**dataclasses.asdict(compute), "seconds": compute.seconds},
        "links": links,
        "parameters": sum(elements for _, elements in order),
        "bucket_bytes": sizes,
        "enough": ENOUGH,
        "modes": found,
        "strong": fixed,
    }


# ---- the command


def reach(below: int | None) -> str:
    return f"from {below:,} GPUs" if below else f"never up to {GPUS[-1]:,}"


def table(result: dict) -> Iterator[str]:
    """Lines of text: three tables of all modes by GPUs, then strong scaling."""
    compute = result["compute"]
    step = f"{compute['seconds'] * 1e3:.1f} ms per step"
    yield f"{result['preset']}, {compute['samples']} samples per GPU: {step}"
    yield f"  {compute['source']}"
    forms = {
        "seconds": ("ms per step", 1e3, ".1f"),
        "exposed": ("ms of them for communication", 1e3, ".2f"),
        "efficiency": ("% efficiency", 100, ".1f"),
    }
    for column, (title, unit, form) in forms.items():
        yield f"\n{title:40}" + "".join(f"{gpus:>8,}" for gpus in GPUS)
        for name, mode in result["modes"].items():
            rows = mode["weak"].values()
            yield f"{name:40}" + "".join(f"{unit * row[column]:>8{form}}" for row in rows)
    yield f"\n{'efficiency':40}{f'under {ENOUGH:.0%}':>20}{'MB sent per GPU, 8 GPUs':>26}"
    for name, mode in result["modes"].items():
        sent = mode["weak"][str(NODE)]["sent"] / 1e6
        yield f"{name:40}{reach(mode['below']):>20}{sent:>26,.0f}"
    head = ("GPUs", "samples", "ms", "efficiency", "links free")
    yield f"\n{'strong scaling':40}" + "".join(f"{part:>11}" for part in head)
    for name, rows in result["strong"].items():
        for gpus, row in rows.items():
            efficiency = f"{row['efficiency']:>11.1%}{row['links_free']:>11.1%}"
            times = f"{row['samples']:>11}{row['seconds'] * 1e3:>11.1f}"
            yield f"{name:40}{gpus:>11}{times}{efficiency}"


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="nanovlm-222m")
    positive = Range(int, least=1)
    parser.add_argument("--samples", type=positive, default=256, help="per GPU, if not measured")
    parser.add_argument(
        "--steps", type=Range(int), default=5, help="steps to count bytes of; 0: none"
    )
    parser.add_argument("--device", default="auto", help="whose folder gets the result")
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


@reports_errors(RuntimeError)
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    device = pick_device(args.device)
    result = modelled(args.preset, args.samples)
    result["traffic"] = measure(args.steps) if args.steps else None
    file = write("scaling", device, result, args.out)
    print("\n".join(table(result)))
    if result["traffic"]:
        print(f"\n{traffic_table(result['traffic'])}")
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
