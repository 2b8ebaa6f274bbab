"""The floor of a training step: every operator's FLOPs, fewest bytes, and which of the two binds.

    python -m bench.roofline                 this machine's rates, nanovlm-222m, 256 samples
    python -m bench.roofline --device h100   an H100's rates, or a T4's (t4), on any machine
    python -m bench.roofline --measure       with the time of each kind of operator in a step

An operator here is what one kernel could do: a matrix product, a norm with its residual addition,
an activation. It reads its inputs once and writes its outputs once. An operator that is not a
matrix product could also be fused into a product next to it and cost nothing: the last table ranks
what that would save. FLOPs are those of `metrics.step_flops`.

Sizes: c is the width of a tower, rows the positions it processes, w the bytes of an activation.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.compiled_step import predicted_step
from bench.harness.results import ROOT, write
from bench.harness.timing import interleave, random_bytes, summary
from bench.subjects.step_time import TABLES, Rates
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.config import VLMConfig
from nanovlm_fast.device import make_current, pick_device, pick_dtype
from nanovlm_fast.presets import preset
from nanovlm_fast.ranges import Range

# Bytes per element of the residual stream, its gradient and the weights' gradients: float32.
STREAM = 4


@dataclass(frozen=True)
class Counts:
    """Sizes of one step: images, real tokens, labelled tokens, query-key pairs.

    The pairs are those that the causal mask permits.
    """

    images: int
    tokens: int
    labels: int
    pairs: int

    @staticmethod
    def of_samples(config: VLMConfig, samples: int, text: int, labels: int) -> Counts:
        """`samples` documents of one image and `text` text tokens, `labels` of them labelled."""
        length = config.image_tokens + text
        pairs = samples * length * (length + 1) // 2
        return Counts(samples, samples * length, samples * labels, pairs)


@dataclass(frozen=True)
class Operator:
    """All calls of one operator in a step: FLOPs and bytes are sums over the calls."""

    part: str
    name: str
    kind: str
    direction: str
    calls: int
    flops: int
    bytes: int

    def floor(self, rates: Rates) -> float:
        """Seconds that the device needs at least: computing and moving memory can overlap."""
        return max(self.flops / rates.flops, self.bytes / rates.bandwidth)

    def bound(self, rates: Rates) -> str:
        return "compute" if self.flops / rates.flops > self.bytes / rates.bandwidth else "memory"


def operators(config: VLMConfig, work: Counts, element: int = 2) -> list[Operator]:
    """Forward and backward of every operator, and the optimizer's update."""
    vision = list(_vision(config, work, element))
    language = list(_language(config, work, element))
    parameters = sum(n for _, n in _parameters(config))
    # AdamW reads parameter, both moments and gradient, and writes all but the gradient: 7 float32.
    adamw = Operator("optimizer", "AdamW", "optimizer", "update", 1, 0, 28 * parameters)
    return [*vision, *language, adamw]


def _product(
    part: str, name: str, calls: int, rows: int, k: int, n: int, w: int, pixels: bool = False
) -> Iterator[Operator]:
    """(rows, k) @ (k, n), and the gradients of both; pixels are bytes and need no gradient."""
    flops = 2 * rows * k * n
    data_in = rows * k * (1 if pixels else w)
    forward = data_in + w * (k * n + rows * n)
    weight = data_in + w * rows * n + STREAM * k * n
    data = 0 if pixels else w * (rows * n + k * n + rows * k)
    backward_flops = flops * (2 - pixels)
    yield Operator(part, name, "product", "forward", calls, calls * flops, calls * forward)
    moved = calls * (weight + data)
    yield Operator(part, name, "product", "backward", calls, calls * backward_flops, moved)


def _moves(
    part: str, name: str, kind: str, calls: int, forward: int, backward: int
) -> Iterator[Operator]:
    """An operator that only moves memory; `forward` and `backward` are the bytes of one call."""
    yield Operator(part, name, kind, "forward", calls, 0, calls * forward)
    yield Operator(part, name, kind, "backward", calls, 0, calls * backward)


def _attention(
    part: str, calls: int, flops: int, query: int, key: int, w: int
) -> Iterator[Operator]:
    """Forward: q, k, v in, output out. Backward: those and the output's gradient in, three out."""
    moved = calls * w * (query + key)
    name = kind = "attention"
    yield Operator(part, name, kind, "forward", calls, calls * flops, 2 * moved)
    yield Operator(part, name, kind, "backward", calls, calls * 2 * flops, 4 * moved)


def _norm(part: str, calls: int, elements: int, w: int) -> Iterator[Operator]:
    """A norm with the residual addition: branch and stream in, both out.

    The backward also has the gradient of the stream.
    """
    forward = elements * 2 * (w + STREAM)
    backward = elements * (2 * w + 3 * STREAM)
    return _moves(part, "norm + residual", "norm", calls, forward, backward)


def _vision(config: VLMConfig, work: Counts, w: int) -> Iterator[Operator]:
    c = config.vit_hidden_dim
    inner = config.vit_inter_dim
    layers = config.vit_n_blocks
    patches = config.grid**2
    rows = work.images * patches
    patch = 3 * config.vit_patch_size**2
    yield from _product("vision", "patch embedding", 1, rows, patch, c, w, pixels=True)
    yield from _norm("vision", 2 * layers + 1, rows * c, w)
    yield from _product("vision", "qkv", layers, rows, c, 3 * c, w)
    yield from _attention("vision", layers, 4 * work.images * patches**2 * c, rows * c, rows * c, w)
    yield from _product("vision", "out", layers, rows, c, c, w)
    yield from _product("vision", "fc1", layers, rows, c, inner, w)
    size = w * rows * inner
    yield from _moves("vision", "GELU", "activation", layers, 2 * size, 3 * size)
    yield from _product("vision", "fc2", layers, rows, inner, c, w)
    shuffled = c * config.mp_pixel_shuffle_factor**2
    tokens = work.images * config.image_tokens
    name = "pixel shuffle + projection"
    yield from _product("projector", name, 1, tokens, shuffled, config.lm_hidden_dim, w)


def _language(config: VLMConfig, work: Counts, w: int) -> Iterator[Operator]:
    c = config.lm_hidden_dim
    inner = config.lm_inter_dim
    layers = config.lm_n_blocks
    rows = work.tokens
    kv = config.lm_n_kv_heads * config.head_dim
    table = config.lm_vocab_size * c
    # Rows of the table or of the images in, the stream out; the table's gradient is dense.
    spliced = rows * c * 2 * STREAM
    gradient = rows * c * (STREAM + w) + STREAM * table
    yield from _moves("language", "embedding + images", "gather", 1, spliced, gradient)
    yield from _norm("language", 2 * layers + 1, rows * c, w)
    yield from _product("language", "qkv", layers, rows, c, c + 2 * kv, w)
    turned = 2 * w * rows * (c + kv)  # queries and keys, read and written
    yield from _moves("language", "rotary", "rotary", layers, turned, turned)
    yield from _attention("language", layers, 4 * work.pairs * c, rows * c, rows * kv, w)
    yield from _product("language", "out", layers, rows, c, c, w)
    yield from _product("language", "gate_up", layers, rows, c, 2 * inner, w)
    size = w * rows * inner
    yield from _moves("language", "SwiGLU", "activation", layers, 3 * size, 5 * size)
    yield from _product("language", "down", layers, rows, inner, c, w)
    # The logits stay on the chip: hidden rows and the table in; the backward writes both gradients.
    flops = 2 * work.labels * table
    read = w * (work.labels * c + table)
    name = "head + cross-entropy"
    yield Operator("language", name, "product", "forward", 1, flops, read)
    written = 2 * read + STREAM * table
    yield Operator("language", name, "product", "backward", 1, 2 * flops, written)


def _parameters(config: VLMConfig) -> Iterator[tuple[str, int]]:
    """(name, elements) of every parameter; on the meta device, which allocates no weights."""
    from nanovlm_fast.model.packed import VisionLanguageModel

    with torch.device("meta"):
        model = VisionLanguageModel(config)
    for name, parameter in model.named_parameters():
        yield name, parameter.numel()


def measured_rates(device: torch.device, repeats: int = 10) -> Rates:
    """This machine's rates: a large copy, and a large square product in the training dtype."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    size = 8192 if on_gpu else 2048
    copied = (1024 if on_gpu else 256) * 2**20  # far more than any cache holds
    source = random_bytes(copied, device)
    target = torch.empty_like(source)
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    calls = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    times = interleave(calls, repeats, warmup=2)
    flops = 2 * size**3 / summary(times["product"])["median"]
    bandwidth = 2 * copied / summary(times["copy"])["median"]
    name = f"CPU, {torch.get_num_threads()} threads"
    if on_gpu:
        name = torch.cuda.get_device_name(device)
    return Rates(f"{name} (measured)", flops, bandwidth, a.element_size())


KINDS = {  # kind -> what the names of its PyTorch operators contain; the first that matches
    "product": (
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "pixel_shuffle_proj",
        "gelu_mlp",
        "swiglu_mlp",
        "linear_cross_entropy",
        "log_softmax",
    ),
    "attention": ("scaled_dot_product", "flash_attn", "varlen_attn"),
    "norm": ("layer_norm", "rms_norm"),
    "activation": ("gelu", "silu", "swiglu"),
    "rotary": ("rotary",),
    "gather": ("embedding", "embed_splice"),
    "optimizer": ("_fused_adamw",),
}


def kind_of(name: str) -> str:
    """The kind of a profiled operator.

    "other" is everything that the floor does not contain: copies, casts, separate additions.
    """
    for kind, parts in KINDS.items():
        if any(part in name for part in parts):
            return kind
    return "other"


def profiled(step: Callable[[], object], device: torch.device, steps: int = 3) -> dict[str, float]:
    """Seconds per step by kind: of kernels on a GPU, of the operators themselves on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    step()  # the first step allocates the optimizer's state
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as trace:
        for _ in range(steps):
            step()
    kinds: dict[str, float] = defaultdict(float)
    for event in trace.key_averages():
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        # Kernels are counted under the operators that launched them, not by themselves again.
        if event.device_type == torch.autograd.DeviceType.CPU:
            kinds[kind_of(event.key)] += time / steps / 1e6
    return dict(kinds)


def measured_step(
    args: argparse.Namespace, device: torch.device | None
) -> tuple[Counts, dict[str, float]]:
    """The sizes of drawn samples, and the profiled seconds of our step by kind.

    The step is not compiled, because a compiler fuses operators of different kinds.
    """
    from bench.subjects.variants import Packed, Recipe, Workbench
    from bench.subjects.workload import load_work

    assert device is not None  # None is a table of rates, with which --measure is refused
    work = load_work(args.preset, "cauldron_like", args.samples, args.layers)
    pairs = sum(len(document) * (len(document) + 1) // 2 for document in work.documents)
    step = Packed(Workbench(work, device, pick_dtype("auto", device)), Recipe(compile="none"))
    counts = Counts(work.counts["images"], work.counts["tokens"], work.counts["labels"], pairs)
    return counts, profiled(step, device)


def by_kind(found: list[Operator], rates: Rates) -> dict[str, float]:
    """Seconds of the floor by kind."""
    kinds: dict[str, float] = defaultdict(float)
    for operator in found:
        kinds[operator.kind] += operator.floor(rates)
    return dict(kinds)


def table(found: list[Operator], rates: Rates) -> str:
    """Every operator, the most expensive first."""
    total = sum(operator.floor(rates) for operator in found)
    work = f"{'calls':>5} {'GFLOP':>9} {'MB':>9} {'floor us':>10} {'share':>6}  bound"
    lines = [f"{'part':10} {'operator':28} {'pass':9} {work}"]
    for operator in sorted(found, key=lambda o: -o.floor(rates)):
        floor = operator.floor(rates)
        names = f"{operator.part:10} {operator.name:28} {operator.direction:9} {operator.calls:>5}"
        work = f"{operator.flops / 1e9:>9,.1f} {operator.bytes / 1e6:>9,.0f}"
        lines.append(
            f"{names} {work} {floor * 1e6:>10,.0f} {floor / total:>6.1%}  {operator.bound(rates)}"
        )
    return "\n".join(lines)


def worth_fusing(found: list[Operator], rates: Rates) -> list[tuple[str, float]]:
    """(operator, seconds of its floor) for all that could be fused into a product next to it.

    The most expensive come first.
    """
    saved: dict[str, float] = defaultdict(float)
    for operator in found:
        if operator.kind in ("norm", "activation", "rotary", "gather"):
            name = f"{operator.name} ({operator.part}, {operator.direction})"
            saved[name] += operator.floor(rates)
    return sorted(saved.items(), key=lambda item: -item[1])


def summarised(config: VLMConfig, work: Counts, rates: Rates) -> dict:
    """The content of the result file."""
    found = operators(config, work, rates.element)
    floor = sum(o.floor(rates) for o in found)
    flops = sum(o.flops for o in found)
    rows = [vars(o) | {"floor": o.floor(rates), "bound": o.bound(rates)} for o in found]
    return {
        "rates": vars(rates),
        "work": vars(work),
        "floor_seconds": floor,
        "samples_per_s": work.images / floor,
        "flops": flops,
        "share_of_rate": flops / floor / rates.flops,
        "by_kind": by_kind(found, rates),
        "worth_fusing": worth_fusing(found, rates),
        "operators": rows,
    }


def compiled_line(preset_name: str, results: Path = ROOT) -> str:
    """What torch.compile makes of the step on an H100, beside this floor of its operators."""
    step = predicted_step(preset_name, results)
    if step is None:
        return (
            f"compiled for an H100: unknown (python -m bench.compiled_step --preset {preset_name})"
        )
    predicted = f"{step.step_ms:,.1f} ms predicted, not measured"
    work = f"{step.images} images, {step.tokens:,} tokens"
    return (
        f"compiled for an H100: floor {step.floor_ms:,.1f} ms, {predicted} ({work}; {step.source})"
    )


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="nanovlm-222m")
    parser.add_argument(
        "--samples", type=Range(int, least=1), default=256, help="documents of one image"
    )
    parser.add_argument(
        "--text", type=Range(int, least=1), default=32, help="text tokens per document"
    )
    parser.add_argument(
        "--labels", type=Range(int, least=1), default=12, help="labelled tokens per document"
    )
    parser.add_argument(
        "--device", default="auto", help="auto | cpu | cuda | h100, t4 (from a table; no file)"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="also profile the step, on documents drawn like these",
    )
    parser.add_argument(
        "--layers", type=Range(int), default=0, help="of each tower, at full width; 0: the preset's"
    )
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    config, _ = preset(args.preset)
    if args.layers:
        config = dataclasses.replace(config, vit_n_blocks=args.layers, lm_n_blocks=args.layers)
    if args.measure and args.device in TABLES:
        table_of = f"--device {args.device} is a table"
        raise ValueError(f"--measure needs the device itself, and {table_of}")
    if args.labels > args.text:
        raise ValueError(f"--labels {args.labels} exceeds --text {args.text}")
    device = None if args.device in TABLES else make_current(pick_device(args.device))
    rates = measured_rates(device) if device else TABLES[args.device]
    counts = Counts.of_samples(config, args.samples, args.text, args.labels)
    seconds = None
    if args.measure:
        counts, seconds = measured_step(args, device)
    result = {**summarised(config, counts, rates), "measured_by_kind": seconds}
    file = None  # rates from a table are no result of a device
    if device:
        file = write("roofline", device, {"preset": args.preset, **result}, args.out)
    print(table(operators(config, Counts(**result["work"]), rates.element), rates))
    print(f"\n{rates.name}: {rates.flops / 1e12:,.2f} TFLOP/s, {rates.bandwidth / 1e9:,.0f} GB/s")
    rate = f"{result['samples_per_s']:,.0f} samples/s"
    print(f"floor {result['floor_seconds'] * 1e3:,.1f} ms, {rate}")
    print(compiled_line(args.preset))
    print("fused into the products next to them, these would cost nothing:")
    for name, saved in result["worth_fusing"]:
        print(f"  {saved * 1e3:8.2f} ms  {name}")
    if seconds:
        head = f"{'kind':12} {'floor ms':>10} {'measured ms':>12} {'times':>7}"
        print(f"\n{head}   (profiled without a compiler)")
        for kind, time in sorted(seconds.items(), key=lambda item: -item[1]):
            floor = result["by_kind"].get(kind, 0.0)
            times = f"{time / floor:>7.1f}" if floor else f"{'-':>7}"
            print(f"{kind:12} {floor * 1e3:>10,.2f} {time * 1e3:>12,.2f} {times}")
    if file:
        print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
