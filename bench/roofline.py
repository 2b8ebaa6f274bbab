"""The floor of a training step: every operator with its FLOPs, its fewest bytes, and the bound that binds.

    python -m bench.roofline                     this machine's measured rates, preset nanovlm-222m at 256 samples
    python -m bench.roofline --device h100       an H100's, wherever this runs
    python -m bench.roofline --measure           beside it the time of each kind of operator in a profiled step

An operator here is what one kernel could do: a matrix product, a norm with its residual addition, an activation. Each
reads its inputs once and writes its outputs once. What is no matrix product could also run inside one that is next to
it and cost nothing: the last table ranks what that would save. FLOPs are those of `metrics.step_flops`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.results import write
from bench.timing import interleave, summary
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.config import VLMConfig, preset
from nanovlm_fast.device import pick_device, pick_dtype
from nanovlm_fast.ranges import Range

STREAM = 4  # bytes of an element of the residual stream and its gradient, and of weights' gradients: float32


@dataclass(frozen=True)
class Rates:
    """What a device can do: FLOP/s of dense products, bytes/s read and written."""

    name: str
    flops: float
    bandwidth: float
    element: int = 2  # bytes of an activation


# products: what a large bfloat16 product reaches (the data sheet says 989e12); memory: 90% of 3.35e12
H100 = Rates("NVIDIA H100 SXM (table)", 798e12, 3.0e12)


@dataclass(frozen=True)
class Counts:
    """Of one step: images, real tokens, labelled tokens, and query-key pairs that the causal mask lets through."""

    images: int
    tokens: int
    labels: int
    pairs: int

    @staticmethod
    def of_samples(config: VLMConfig, samples: int, text: int, labels: int) -> Counts:
        """`samples` documents of one image and `text` text tokens, `labels` of them labelled."""
        length = config.image_tokens + text
        return Counts(samples, samples * length, samples * labels, samples * length * (length + 1) // 2)


@dataclass(frozen=True)
class Operator:
    """All calls of one operator in a step: FLOPs and bytes are their sums."""

    part: str
    name: str
    kind: str
    direction: str
    calls: int
    flops: int
    bytes: int

    def floor(self, rates: Rates) -> float:
        """Seconds."""
        return max(self.flops / rates.flops, self.bytes / rates.bandwidth)

    def bound(self, rates: Rates) -> str:
        return "compute" if self.flops / rates.flops > self.bytes / rates.bandwidth else "memory"


def operators(config: VLMConfig, work: Counts, element: int = 2) -> list[Operator]:
    """Forward and backward of every operator, and the optimizer's update."""
    vision, language = list(_vision(config, work, element)), list(_language(config, work, element))
    parameters = sum(n for *_, n in _parameters(config))
    adamw = Operator("optimizer", "AdamW", "optimizer", "update", 1, 0, 28 * parameters)  # p, m, v, g in; p, m, v out
    return [*vision, *language, adamw]


def _product(part: str, name: str, calls: int, rows: int, k: int, n: int, w: int, pixels: bool = False):
    """(rows, k) @ (k, n), and the gradients of both; `pixels` are bytes and take no gradient."""
    flops, data_in = 2 * rows * k * n, rows * k * (1 if pixels else w)
    forward = data_in + w * (k * n + rows * n)
    weight = data_in + w * rows * n + STREAM * k * n
    data = 0 if pixels else w * (rows * n + k * n + rows * k)
    yield Operator(part, name, "product", "forward", calls, calls * flops, calls * forward)
    yield Operator(part, name, "product", "backward", calls, calls * flops * (2 - pixels), calls * (weight + data))


def _moves(part: str, name: str, kind: str, calls: int, forward: int, backward: int):
    """An operator that only moves memory: bytes of one call."""
    yield Operator(part, name, kind, "forward", calls, 0, calls * forward)
    yield Operator(part, name, kind, "backward", calls, 0, calls * backward)


def _attention(part: str, calls: int, flops: int, query: int, key: int, w: int):
    """q, k, v in and out; backward reads those and both gradients of the output's side, and writes three."""
    yield Operator(part, "attention", "attention", "forward", calls, calls * flops, calls * w * 2 * (query + key))
    yield Operator(part, "attention", "attention", "backward", calls, calls * 2 * flops, calls * w * 4 * (query + key))


def _norm(part: str, calls: int, elements: int, w: int):
    """With the residual addition: branch and stream in, both out; backward has the stream's gradient too."""
    return _moves(part, "norm + residual", "norm", calls, elements * 2 * (w + STREAM), elements * (2 * w + 3 * STREAM))


def _vision(config: VLMConfig, work: Counts, w: int) -> Iterator[Operator]:
    c, inner, layers, patches = config.vit_hidden_dim, config.vit_inter_dim, config.vit_n_blocks, config.grid**2
    rows = work.images * patches
    yield from _product("vision", "patch embedding", 1, rows, 3 * config.vit_patch_size**2, c, w, pixels=True)
    yield from _norm("vision", 2 * layers + 1, rows * c, w)
    yield from _product("vision", "qkv", layers, rows, c, 3 * c, w)
    yield from _attention("vision", layers, 4 * work.images * patches**2 * c, rows * c, rows * c, w)
    yield from _product("vision", "out", layers, rows, c, c, w)
    yield from _product("vision", "fc1", layers, rows, c, inner, w)
    yield from _moves("vision", "GELU", "activation", layers, 2 * w * rows * inner, 3 * w * rows * inner)
    yield from _product("vision", "fc2", layers, rows, inner, c, w)
    shuffled, n = c * config.mp_pixel_shuffle_factor**2, config.lm_hidden_dim
    yield from _product("projector", "pixel shuffle + projection", 1, work.images * config.image_tokens, shuffled, n, w)


def _language(config: VLMConfig, work: Counts, w: int) -> Iterator[Operator]:
    c, inner, layers, rows = config.lm_hidden_dim, config.lm_inter_dim, config.lm_n_blocks, work.tokens
    kv = config.lm_n_kv_heads * config.head_dim
    table = config.lm_vocab_size * c
    spliced = rows * c * 2 * STREAM  # rows of the table or of the images in, the stream out
    yield from _moves("language", "embedding + images", "gather", 1, spliced, rows * c * (STREAM + w) + STREAM * table)
    yield from _norm("language", 2 * layers + 1, rows * c, w)
    yield from _product("language", "qkv", layers, rows, c, c + 2 * kv, w)
    yield from _moves("language", "rotary", "rotary", layers, 2 * w * rows * (c + kv), 2 * w * rows * (c + kv))
    yield from _attention("language", layers, 4 * work.pairs * c, rows * c, rows * kv, w)
    yield from _product("language", "out", layers, rows, c, c, w)
    yield from _product("language", "gate_up", layers, rows, c, 2 * inner, w)
    yield from _moves("language", "SwiGLU", "activation", layers, 3 * w * rows * inner, 5 * w * rows * inner)
    yield from _product("language", "down", layers, rows, inner, c, w)
    # the logits stay on the chip: hidden rows and table in; backward writes both gradients
    flops, read = 2 * work.labels * table, w * (work.labels * c + table)
    yield Operator("language", "head + cross-entropy", "product", "forward", 1, flops, read)
    yield Operator("language", "head + cross-entropy", "product", "backward", 1, 2 * flops, 2 * read + STREAM * table)


def _parameters(config: VLMConfig) -> Iterator[tuple[str, int]]:
    """(name, elements), without building the weights."""
    from nanovlm_fast.model import VisionLanguageModel

    with torch.device("meta"):
        yield from ((name, p.numel()) for name, p in VisionLanguageModel(config).named_parameters())


def measured_rates(device: torch.device, repeats: int = 10) -> Rates:
    """Of this machine: a large copy, and a large square product in the type that training computes in."""
    on_gpu = device.type == "cuda"
    dtype, size, megabytes = (torch.bfloat16, 8192, 1024) if on_gpu else (torch.float32, 2048, 256)
    source = torch.empty(megabytes * 2**20, dtype=torch.uint8, device=device)
    target, a, b = torch.empty_like(source), *(torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    seconds = {name: summary(times)["median"] for name, times in interleave(calls, repeats, warmup=2).items()}
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    bandwidth = 2 * source.numel() / seconds["copy"]
    return Rates(f"{name} (measured)", 2 * size**3 / seconds["product"], bandwidth, a.element_size())


KINDS = {  # operators of PyTorch by what their names hold -> kind
    "product": ("aten::mm", "aten::addmm", "aten::bmm", "pixel_shuffle_proj", "linear_cross_entropy", "log_softmax"),
    "attention": ("scaled_dot_product", "flash_attn", "varlen_attn"),
    "norm": ("layer_norm", "rms_norm"),
    "activation": ("gelu", "silu", "swiglu"),
    "rotary": ("rotary",),
    "gather": ("embedding", "embed_splice"),
    "optimizer": ("_fused_adamw",),
}


def kind_of(name: str) -> str:
    """The kind of a profiled operator; copies, casts, additions and all else that the floor lacks: other."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def profiled(step: Callable[[], None], device: torch.device, steps: int = 3) -> dict[str, float]:
    """Seconds of one step by kind: of the device's kernels on a GPU, of the operators themselves on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    step()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as trace:
        for _ in range(steps):
            step()
    kinds: Counter[str] = Counter()
    for event in trace.key_averages():
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if event.device_type == torch.autograd.DeviceType.CPU:  # kernels are counted under what launched them
            kinds[kind_of(event.key)] += time / steps / 1e6
    return dict(kinds)


def measured_step(args: argparse.Namespace, device: torch.device) -> tuple[Counts, dict[str, float]]:
    """What the drawn samples hold, and the profiled seconds of ours by kind, uncompiled: a compiler mixes the kinds."""
    from bench.variants import Packed, Recipe, Workbench
    from bench.workload import load_work

    work = load_work(args.preset, "cauldron_like", args.samples, args.layers)
    pairs = sum(len(document) * (len(document) + 1) // 2 for document in work.documents)
    step = Packed(Workbench(work, device, pick_dtype("auto", device)), Recipe(compile="none"))
    counts = Counts(work.counts["images"], work.counts["tokens"], work.counts["labels"], pairs)
    return counts, profiled(step, device)


def by_kind(found: list[Operator], rates: Rates) -> dict[str, float]:
    kinds: Counter[str] = Counter()
    for operator in found:
        kinds[operator.kind] += operator.floor(rates)
    return dict(kinds)


def table(found: list[Operator], rates: Rates) -> str:
    """Every operator, dearest first."""
    total = sum(operator.floor(rates) for operator in found)
    work = f"{'calls':>5} {'GFLOP':>9} {'MB':>9} {'floor us':>10} {'share':>6}  bound"
    lines = [f"{'part':10} {'operator':28} {'pass':9} {work}"]
    for operator in sorted(found, key=lambda o: -o.floor(rates)):
        floor = operator.floor(rates)
        names = f"{operator.part:10} {operator.name:28} {operator.direction:9} {operator.calls:>5}"
        work = f"{operator.flops / 1e9:>9,.1f} {operator.bytes / 1e6:>9,.0f}"
        lines.append(f"{names} {work} {floor * 1e6:>10,.0f} {floor / total:>6.1%}  {operator.bound(rates)}")
    return "\n".join(lines)


def worth_fusing(found: list[Operator], rates: Rates) -> list[tuple[str, float]]:
    """(operator, seconds of its floor) of all that could run inside a product next to it, dearest first."""
    saved: Counter[str] = Counter()
    for operator in found:
        if operator.kind in ("norm", "activation", "rotary", "gather"):
            saved[f"{operator.name} ({operator.part}, {operator.direction})"] += operator.floor(rates)
    return saved.most_common()


def summarised(config: VLMConfig, work: Counts, rates: Rates) -> dict:
    """What the result file holds."""
    found = operators(config, work, rates.element)
    floor, flops = sum(o.floor(rates) for o in found), sum(o.flops for o in found)
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


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="nanovlm-222m")
    parser.add_argument("--samples", type=Range(int, least=1), default=256, help="documents of one image")
    parser.add_argument("--text", type=Range(int, least=1), default=32, help="text tokens of a document")
    parser.add_argument("--labels", type=Range(int, least=1), default=12, help="labelled tokens of a document")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | h100 (its table, and no result file)")
    parser.add_argument("--measure", action="store_true", help="profile the step too, on documents drawn like these")
    parser.add_argument("--layers", type=Range(int), default=0, help="of each tower, at full width; 0: the preset's")
    parser.add_argument("--out", type=Path, help="folder of the result files (default: bench/results)")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    config, _ = preset(args.preset)
    if args.layers:
        config = dataclasses.replace(config, vit_n_blocks=args.layers, lm_n_blocks=args.layers)
    if args.measure and args.device == "h100":
        raise ValueError("--measure needs the device itself, and --device h100 is a table")
    if args.labels > args.text:
        raise ValueError(f"--labels {args.labels} --text {args.text}: no more labels than text")
    device = None if args.device == "h100" else pick_device(args.device)
    rates = measured_rates(device) if device else H100
    counts, seconds = Counts.of_samples(config, args.samples, args.text, args.labels), None
    if args.measure:
        counts, seconds = measured_step(args, device)
    result = {**summarised(config, counts, rates), "measured_by_kind": seconds}
    file = write("roofline", device, {"preset": args.preset, **result}, args.out) if device else None
    print(table(operators(config, Counts(**result["work"]), rates.element), rates))
    print(f"\n{rates.name}: {rates.flops / 1e12:,.2f} TFLOP/s, {rates.bandwidth / 1e9:,.0f} GB/s")
    print(f"floor {result['floor_seconds'] * 1e3:,.1f} ms, {result['samples_per_s']:,.0f} samples/s")
    print("inside the products next to them these would cost nothing:")
    for name, saved in result["worth_fusing"]:
        print(f"  {saved * 1e3:8.2f} ms  {name}")
    if seconds:
        print(f"\n{'kind':12} {'floor ms':>10} {'measured ms':>12} {'times':>7}   (profiled without a compiler)")
        for kind, time in sorted(seconds.items(), key=lambda item: -item[1]):
            floor = result["by_kind"].get(kind, 0.0)
            times = f"{time / floor:>7.1f}" if floor else f"{'-':>7}"
            print(f"{kind:12} {floor * 1e3:>10,.2f} {time * 1e3:>12,.2f} {times}")
    if file:
        print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
