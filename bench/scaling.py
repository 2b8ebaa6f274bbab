"""What a step costs on 1 to 1,024 GPUs: a model of its communication, and the bytes it sends, counted on two processes.

    python -m bench.scaling                      table, verdict, traffic, result file
    python -m bench.scaling --steps 0            without counting traffic

A model, not a measurement: no run of more than one GPU stands behind these times. It adds up

- the step of one GPU: of a committed GPU result of bench.train_step where there is one, else the floor that
  bench.roofline finds for an H100, which no step reaches (a slower step hides more, so this is the hard case). The
  roofline also says how the step divides into forward, backward and update;
- DDP's buckets: of the model's own gradients in the order in which a backward on the meta device makes them, closed at
  25 MiB, the first at 1 MiB. The tied table's gradient comes when the language model is through, with the vision
  tower's backward still to go. Within the language model, the projector and the vision tower gradients come evenly. A
  bucket is reduced once it is full and the one before is through; what lasts longer than the backward is exposed;
- a collective in nodes of eight GPUs, NVLink inside and a network card a GPU between: reduce inside, each GPU its
  eighth between the nodes, gather inside, one after the other. Bytes over bandwidth, and hops: a ring's grow with the
  nodes, a tree's, which NCCL has for all-reduce alone and takes where it is faster, with their logarithm;
- FSDP2 (`shard`): a unit a block, gathered for the forward and again for the backward while the unit before computes,
  gradients reduce-scattered, the update on a GPU's share alone.

"No overlap" is what a backward compiled to one graph gets: its gradients appear together at its end. Dynamo's
`optimize_ddp` splits that graph at the buckets. Left out: SMs and memory bandwidth that NCCL takes from the step,
stragglers, the data path, NVLink SHARP (faster inside a node), a network that is shared or blocks (slower).

Weak scaling: the same samples on every GPU. Strong scaling: the same samples in all, so ever fewer on a GPU, and the
roofline's step for those. Efficiency is one GPU's time over that of n (strong: over n times it).
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.results import ROOT, load, write
from bench.roofline import H100, Counts, operators
from bench.traffic import measure
from bench.traffic import table as traffic_table
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.config import VLMConfig, preset
from nanovlm_fast.device import pick_device
from nanovlm_fast.model import VisionLanguageModel
from nanovlm_fast.packing import Budget
from nanovlm_fast.ranges import Range
from nanovlm_fast.warmup import full_batch

GPUS = tuple(2**i for i in range(11))
ENOUGH = 0.9  # efficiency
NODE = 8  # GPUs
TEXT, LABELS = 32, 12  # tokens of a sample, as bench.roofline takes them
BUCKET, FIRST_BUCKET = 25 * 2**20, 2**20  # bytes; DDP's bucket_cap_mb and its first bucket
TABLE = "decoder.token_embedding.weight"
PARTS = {"decoder": "language", "MP": "projector", "vision_encoder": "vision"}  # module -> the roofline's part
LAUNCH = 8.4e-6  # seconds of a collective before its first hop: NCCL's model, src/graph/tuning.cc, baseLat, ring Simple


@dataclass(frozen=True)
class Link:
    """Bytes/s that a GPU sends while it receives as many, and the seconds of a hop."""

    name: str
    bandwidth: float
    hop: float


# NVLink 4: 450e9 on the line; what is left of it after the protocol: NVIDIA in github.com/NVIDIA/nccl-tests/issues/212
# NDR: 400 Gb/s on the line; 46 to 48 GB/s a card is what to expect: NVIDIA in github.com/NVIDIA/nccl-tests/issues/290
# hops: NCCL's own model, src/graph/tuning.cc, hwLat of the Simple protocol (ring: 3.4 and 14; tree between nodes: 14)
NVLINK = Link("NVLink 4", 370e9, 3.4e-6)
INFINIBAND = Link("InfiniBand NDR, a card a GPU", 47e9, 14e-6)


@dataclass(frozen=True)
class Mode:
    """How gradients travel: `element` bytes each; a `tree` between the nodes is all-reduce's where it is faster."""

    name: str
    shard: bool = False
    element: int = 4
    overlap: bool = True
    tree: bool = False


def modes() -> list[Mode]:
    found = []
    for kind, element in (("float32", 4), ("bfloat16", 2)):
        for overlap in (True, False):
            rest = f"{kind}, {'overlapped' if overlap else 'no overlap'}"
            found += [Mode(f"DDP {rest}, ring{' or tree' * t}", False, element, overlap, t) for t in (True, False)]
            found.append(Mode(f"FSDP2 {rest}", True, element, overlap))
    return sorted(found, key=lambda mode: (mode.shard, not mode.overlap, not mode.tree))


# ---- collectives


def sent_bytes(payload: float, gpus: int, passes: int) -> float:
    """Bytes that each GPU sends: a ring's all-gather or reduce-scatter is a pass, all-reduce is two."""
    return passes * (gpus - 1) / gpus * payload


def collective_seconds(payload: float, gpus: int, passes: int, tree: bool = False) -> float:
    """Seconds of one: launch, then in each pass the node's ring and the nodes' ring or tree, one after the other.

    Up to a node any number of GPUs, then whole nodes.
    """
    if gpus == 1 or not payload:
        return 0.0
    inside, nodes = min(gpus, NODE), math.ceil(gpus / NODE)

    def one(link: Link, hops: int, sent: float) -> float:
        return hops * link.hop + sent / link.bandwidth

    between = one(INFINIBAND, nodes - 1, sent_bytes(payload / inside, nodes, 1))
    if tree:  # its inner nodes pass all of it on
        between = min(between, one(INFINIBAND, math.ceil(math.log2(nodes)), payload / inside))
    return LAUNCH + passes * (one(NVLINK, inside - 1, sent_bytes(payload, inside, 1)) + (between if nodes > 1 else 0.0))


# ---- the step of one GPU


@dataclass(frozen=True)
class Compute:
    """Seconds of one GPU's step, by part of the model: {part: seconds}; and where they come from."""

    forward: dict[str, float]
    backward: dict[str, float]
    update: float
    samples: int
    source: str
    measured: bool

    @property
    def seconds(self) -> float:
        return sum(self.forward.values()) + sum(self.backward.values()) + self.update

    def scaled(self, factor: float) -> Compute:
        forward, backward = ({part: factor * s for part, s in d.items()} for d in (self.forward, self.backward))
        return dataclasses.replace(self, forward=forward, backward=backward, update=factor * self.update)


def floor_of(config: VLMConfig, samples: int) -> Compute:
    """The roofline's step on an H100."""
    found = operators(config, Counts.of_samples(config, samples, TEXT, LABELS), H100.element)

    def seconds(direction: str) -> dict[str, float]:
        parts = dict.fromkeys(PARTS.values(), 0.0)
        for operator in found:
            if operator.direction == direction:
                parts[operator.part] += operator.floor(H100)
        return parts

    update = sum(o.floor(H100) for o in found if o.direction == "update")
    source = f"estimate, not measured: the floor of bench.roofline, {H100.name}"
    return Compute(seconds("forward"), seconds("backward"), update, samples, source, False)


def measured_step(preset_name: str, results: Path = ROOT) -> tuple[float, int, str] | None:
    """(seconds, samples, source) of ours in the newest GPU result of bench.train_step for the whole model, if any."""
    found = []
    for file in results.glob("*/train_step*.json"):
        step = load(file)
        ours = step["variants"].get("ours", {})
        if "driver" in step and step["preset"] == preset_name and not step.get("layers") and "median" in ours:
            source = f"bench.train_step on {step['device']}, {step['commit'][:7]}"
            found.append((step["date"], ours["median"], step["work"]["images"], source))
    return max(found)[1:] if found else None


def compute_of(config: VLMConfig, preset_name: str, samples: int, results: Path = ROOT) -> Compute:
    """The measured step, divided as the roofline divides it; without one the roofline's for `samples` samples."""
    step = measured_step(preset_name, results)
    if step is None:
        return floor_of(config, samples)
    seconds, images, source = step
    floor = floor_of(config, images)
    return dataclasses.replace(floor.scaled(seconds / floor.seconds), source=source, measured=True)


# ---- gradients


def gradients(config: VLMConfig) -> list[tuple[str, int]]:
    """(name, elements) in the order in which the backward makes them; nothing is computed."""
    length = config.image_tokens + 8
    with torch.device("meta"):
        model, order = VisionLanguageModel(config), []
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: order.append((name, p.numel())))
        batch = full_batch(Budget(tokens=length, documents=1, images=1, labels=4, max_seqlen=length), config)
        model(batch.to("meta")).backward()
    return order


def ready_times(order: list[tuple[str, int]], backward: dict[str, float]) -> list[float]:
    """When each gradient is there, in seconds of the backward; parts one after the other, evenly within each."""
    size = dict.fromkeys(backward, 0)
    for name, elements in order:
        size[PARTS[name.split(".")[0]]] += elements * (name != TABLE)
    clock, times = 0.0, []
    for name, elements in order:
        part = PARTS[name.split(".")[0]]
        clock += backward[part] * elements * (name != TABLE) / size[part]
        times.append(clock)
    return times


def buckets(sizes: list[int], cap: int = BUCKET, first: int = FIRST_BUCKET) -> list[list[int]]:
    """DDP's: indices of gradients of so many bytes. One is closed by the gradient that fills it, however large.

    They are those of its second step on; with a bucket_cap_mb of one's own the first is no smaller (`first` = `cap`).
    """
    found, current, filled = [], [], 0
    for i, size in enumerate(sizes):
        current.append(i)
        filled += size
        if filled >= (cap if found else first):
            found.append(current)
            current, filled = [], 0
    return [*found, current] if current else found


# ---- the step of many


def ddp_seconds(compute: Compute, order: list[tuple[str, int]], gpus: int, mode: Mode) -> float:
    """Buckets of float32 gradients; in bfloat16 they travel as half the bytes."""
    times, end = ready_times(order, compute.backward), sum(compute.backward.values())
    done = 0.0
    for bucket in buckets([4 * elements for _, elements in order]):
        payload = mode.element * sum(order[i][1] for i in bucket)
        ready = times[bucket[-1]] if mode.overlap else end
        done = max(done, ready) + collective_seconds(payload, gpus, 2, mode.tree)
    exposed = max(done - end, 0.0) if gpus > 1 else 0.0
    return compute.seconds + exposed


def units(order: list[tuple[str, int]], compute: Compute) -> tuple[int, list[tuple[int, float, float]]]:
    """Elements of FSDP's root, and (elements, forward, backward seconds) of its blocks in the order of the forward.

    A part's time is its blocks', evenly; the projector's, some percent, is left to the vision blocks before it.
    """
    root, blocks = 0, {"vision_encoder": {}, "decoder": {}}
    for name, elements in reversed(order):
        part, *rest = name.split(".")
        if rest[0] == "blocks":
            blocks[part][rest[1]] = blocks[part].get(rest[1], 0) + elements
        else:
            root += elements
    seconds = {"vision_encoder": ("vision", "projector"), "decoder": ("language",)}
    found = []
    for part, sizes in blocks.items():
        times = [sum(d[p] for p in seconds[part]) / len(sizes) for d in (compute.forward, compute.backward)]
        found += [(elements, *times) for elements in sizes.values()]
    return root, found


def fsdp_seconds(compute: Compute, order: list[tuple[str, int]], gpus: int, mode: Mode) -> float:
    """Gathers and reductions take turns on the links; a gather goes while the unit before computes."""
    if gpus == 1:
        return compute.seconds
    root, blocks = units(order, compute)
    jobs = [(root, 0.0, 0), *((size, forward, 0) for size, forward, _ in blocks)]
    jobs += [(root, 0.0, 0), *((size, backward, size) for size, _, backward in reversed(blocks)), (0, 0.0, root)]
    links = clock = start = 0.0  # when the links and the GPU are free; when the last unit began to compute
    waiting = 0.0  # of the reduction of the unit before, which the next gather goes in front of
    for gathered, seconds, reduced in jobs:
        gather, scatter = (collective_seconds(mode.element * size, gpus, 1) for size in (gathered, reduced))
        links = max(links, start if mode.overlap else clock) + gather
        start = max(clock, links)
        if waiting:
            links = max(links, clock) + waiting
            start = start if mode.overlap else links
        clock, waiting = start + seconds, scatter
    return max(links, clock) + waiting + compute.update / gpus


def step_seconds(compute: Compute, order: list[tuple[str, int]], gpus: int, mode: Mode) -> float:
    return (fsdp_seconds if mode.shard else ddp_seconds)(compute, order, gpus, mode)


def weak(compute: Compute, order: list[tuple[str, int]], mode: Mode) -> dict[str, dict[str, float]]:
    """By GPUs: seconds, seconds that communication adds, efficiency, bytes that a GPU sends in a step."""
    payload, rows = mode.element * sum(elements for _, elements in order), {}
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
    """By GPUs: the step of one that has its share of the samples. It shrinks as its floor does."""
    factor = compute.seconds / floor_of(config, compute.samples).seconds
    evenly = [gpus for gpus in GPUS if compute.samples % gpus == 0]
    return {gpus: floor_of(config, compute.samples // gpus).scaled(factor) for gpus in evenly}


def strong(parts: dict[int, Compute], order: list[tuple[str, int]], mode: Mode) -> dict[str, dict[str, float]]:
    """By GPUs: samples on each, seconds, efficiency, and what it were if communication took no time (`links_free`)."""
    rows = {}
    for gpus, local in parts.items():
        seconds, ideal = step_seconds(local, order, gpus, mode), parts[1].seconds / gpus
        efficiency, free = ideal / seconds, ideal / local.seconds
        rows[str(gpus)] = dict(samples=local.samples, seconds=seconds, efficiency=efficiency, links_free=free)
    return rows


def falls_below(rows: dict[str, dict[str, float]]) -> int | None:
    """The first number of GPUs, of those looked at, whose efficiency is not enough."""
    return next((int(gpus) for gpus, row in rows.items() if row["efficiency"] < ENOUGH), None)


def modelled(preset_name: str, samples: int, results: Path = ROOT) -> dict:
    """What the result file holds, but for the traffic."""
    config, _ = preset(preset_name)
    compute, order = compute_of(config, preset_name, samples, results), gradients(config)
    found = {mode.name: {**dataclasses.asdict(mode), "weak": weak(compute, order, mode)} for mode in modes()}
    for mode in modes():
        found[mode.name]["below"] = falls_below(found[mode.name]["weak"])
    parts = shares(config, compute)
    fixed = {mode.name: strong(parts, order, mode) for mode in modes() if mode.tree and mode.element == 4}
    sizes = [4 * sum(order[i][1] for i in bucket) for bucket in buckets([4 * elements for _, elements in order])]
    return {
        "preset": preset_name,
        "timed": False,  # a model
        "compute": {**dataclasses.asdict(compute), "seconds": compute.seconds},
        "links": {"node": NODE, "launch": LAUNCH, "inside": vars(NVLINK), "between": vars(INFINIBAND)},
        "parameters": sum(elements for _, elements in order),
        "bucket_bytes": sizes,
        "enough": ENOUGH,
        "modes": found,
        "strong": fixed,
    }


# ---- the command


def verdict(below: int | None) -> str:
    return f"from {below:,} GPUs" if below else f"never up to {GPUS[-1]:,}"


def table(result: dict) -> Iterator[str]:
    """Lines: three tables of all modes by GPUs, then strong scaling."""
    compute = result["compute"]
    yield f"{result['preset']}, {compute['samples']} samples a GPU: {compute['seconds'] * 1e3:.1f} ms a step"
    yield f"  {compute['source']}"
    forms = {"seconds": ("ms a step", 1e3, ".1f"), "exposed": ("ms of them for communication", 1e3, ".2f")}
    forms["efficiency"] = ("% efficiency", 100, ".1f")
    for column, (title, unit, form) in forms.items():
        yield f"\n{title:40}" + "".join(f"{gpus:>8,}" for gpus in GPUS)
        for name, mode in result["modes"].items():
            yield f"{name:40}" + "".join(f"{unit * row[column]:>8{form}}" for row in mode["weak"].values())
    yield f"\n{'efficiency':40}{f'under {ENOUGH:.0%}':>20}{'MB a GPU sends, 8 GPUs':>26}"
    for name, mode in result["modes"].items():
        yield f"{name:40}{verdict(mode['below']):>20}{mode['weak'][str(NODE)]['sent'] / 1e6:>26,.0f}"
    head = ("GPUs", "samples", "ms", "efficiency", "links free")
    yield f"\n{'strong scaling':40}" + "".join(f"{part:>11}" for part in head)
    for name, rows in result["strong"].items():
        for gpus, row in rows.items():
            efficiency = f"{row['efficiency']:>11.1%}{row['links_free']:>11.1%}"
            yield f"{name:40}{gpus:>11}{row['samples']:>11}{row['seconds'] * 1e3:>11.1f}{efficiency}"


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="nanovlm-222m")
    parser.add_argument(
        "--samples", type=Range(int, least=1), default=256, help="on a GPU, where no measured step says how many"
    )
    parser.add_argument("--steps", type=Range(int), default=5, help="steps whose traffic is counted; 0: none")
    parser.add_argument("--device", default="auto", help="whose folder the result goes to; nothing is timed")
    parser.add_argument("--out", type=Path, help="folder of the result files (default: bench/results)")
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
