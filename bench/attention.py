"""Attention backends side by side: forward, backward and both, over documents of several lengths.

    python -m bench.attention                    on a GPU 20,736 tokens in bfloat16; on a CPU few, in float32
    python -m bench.attention --quick            three cases, few repeats

The language model's heads attend causally inside packed documents, the vision tower's to all patches of their image.
Beside the backends of nanovlm_fast/attention.py stand `reference`, which computes as reference.py does (rows padded to
nanoVLM's length or the longest document, a mask, keys and values repeated for every query head; masks and padded inputs
are given, for a model makes them once for all layers), and `flex`, torch.compile's flex_attention with a mask of blocks
(given too). FLOPs are those of real query-key pairs, with the backward at twice the forward. A backend gets a time only
if output and gradients are within twice the error of plain PyTorch in the same type. On a GPU the times come from
CUDA-graph replay.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench.kernels import PASSES, Timer, in_a_line, on_stream, within_rule
from bench.results import write
from bench.workload import draw_lengths
from nanovlm_fast.attention import LOAD, choose_attention, padded_slots
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.config import VLMConfig, preset
from nanovlm_fast.device import pick_device
from nanovlm_fast.ranges import Range

LENGTHS = (16, 48, 81, 128, 256, 1024)
FOR_TIMES = {"forward": 1, "backward": 2, "both": 3}  # FLOPs, in forwards


@dataclass
class Case:
    """Documents of these lengths; rows of the reference are `row` long. q (T, n_heads, D); k, v (T, n_kv_heads, D)."""

    name: str
    lengths: list[int]
    row: int
    heads: tuple[int, int]
    width: int
    causal: bool

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def waste(self) -> float:
        """Share of the reference's positions that are padding."""
        return 1 - self.tokens / (len(self.lengths) * self.row)

    @property
    def flops(self) -> int:
        """Of a forward: the two products of all pairs of a query and a key that it sees."""
        pairs = sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)
        return 4 * pairs * self.heads[0] * self.width

    def make(self, dtype: torch.dtype, device: torch.device) -> Inputs:
        q, kv = self.heads
        generator = torch.Generator(device).manual_seed(0)
        tensors = [
            torch.randn(self.tokens, heads, self.width, generator=generator, device=device).to(dtype)
            for heads in (q, kv, kv, q)
        ]
        starts = torch.tensor([0, *self.lengths], device=device).cumsum(0, dtype=torch.int32)
        return Inputs(self, *tensors, starts)


@dataclass
class Inputs:
    """Packed q, k, v, the gradient of the output, and the documents' starts; the same padded for the reference."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    cu_seqlens: Tensor

    @functools.cached_property
    def slots(self) -> Tensor:
        """(T,) where a packed token lies in the padded rows."""
        return padded_slots(self.cu_seqlens, self.case.row, self.case.tokens)

    @functools.cached_property
    def mask(self) -> Tensor | None:
        """(B, 1, row, row), as reference.py makes it for left-aligned rows; None where nothing is masked."""
        if not self.case.causal and self.case.waste == 0:
            return None
        row, device = self.case.row, self.q.device
        valid = torch.arange(row, device=device) < self.cu_seqlens.diff()[:, None]
        seen = torch.ones(row, row, dtype=torch.bool, device=device)
        seen = seen.tril() if self.case.causal else seen
        return ((seen & valid[:, None, :]) | torch.eye(row, dtype=torch.bool, device=device))[:, None]

    def pad(self, x: Tensor) -> Tensor:
        """(T, heads, D) -> (B, heads, row, D), zeros where there is no token."""
        rows = x.new_zeros(len(self.case.lengths) * self.case.row, *x.shape[1:]).index_copy(0, self.slots, x)
        return rows.view(-1, self.case.row, *x.shape[1:]).transpose(1, 2).contiguous()

    def unpad(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.slots)


@dataclass
class Provider:
    """`call(q, k, v)` on packed tensors, or on padded rows; `only_graphs` is what cannot be timed in turn otherwise."""

    call: Callable
    padded: bool = False
    only_graphs: bool = False


def repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """(B, heads, S, D) -> the same, written out: the truth in float32, the yardstick in bfloat16."""
    k, v = repeat_heads(q, k, v)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return scores.float().softmax(-1).to(q.dtype) @ v


def reference_of(inputs: Inputs) -> Provider:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = repeat_heads(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.mask)

    return Provider(call, padded=True)


def flex_of(inputs: Inputs) -> Provider:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # a case has a mask and shapes of its own
    tokens, device, causal = inputs.case.tokens, inputs.q.device, inputs.case.causal
    document = torch.searchsorted(inputs.cu_seqlens, torch.arange(tokens, device=device), right=True)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = document[query] == document[key]
        return same & (query >= key) if causal else same

    blocks = create_block_mask(sees, None, None, tokens, tokens, device=device)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    grouped = inputs.q.shape[1] > inputs.k.shape[1]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.requires_grad and device.type == "cpu":
            raise ValueError("flex_attention has no backward on a CPU")
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(q, k, v, block_mask=blocks, enable_gqa=grouped)[0].transpose(0, 1)

    return Provider(call)


def backend_of(name: str, inputs: Inputs) -> Provider:
    """Raises ValueError if it cannot run here."""
    _, attend = choose_attention(name, inputs.q.device, inputs.q.dtype)
    cu_seqlens, longest, causal = inputs.cu_seqlens, max(inputs.case.lengths), inputs.case.causal
    # FlashAttention-3 and 4 replace the kernel under varlen_attn for the whole process, but not in a recorded graph
    swaps = name.startswith("torch_")
    return Provider(lambda q, k, v: attend(q, k, v, cu_seqlens, longest, causal), only_graphs=swaps)


PROVIDERS: dict[str, Callable[[Inputs], Provider]] = {
    "reference": reference_of,
    **{name: functools.partial(backend_of, name) for name in LOAD},
    "flex": flex_of,
}


def results_of(provider: Provider, inputs: Inputs, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and gradients of q, k and v at the real tokens, packed."""
    tensors = [x.to(dtype) if dtype else x for x in (inputs.q, inputs.k, inputs.v, inputs.grad)]
    q, k, v, grad = (inputs.pad(x) if provider.padded else x for x in tensors)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = provider.call(*leaves)
    results = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    return [inputs.unpad(x) for x in results] if provider.padded else results


def measure(case: Case, repeats: int, device: torch.device, progress: Callable) -> dict:
    """The case's sizes, and for every provider {'error': why} or {pass: {median, quartiles, flops_per_s}}."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = case.make(dtype, device)
    yardstick = Provider(lambda q, k, v: plain(q, k, v, inputs.mask), padded=True)
    truth, allowed = results_of(yardstick, inputs, torch.float32), results_of(yardstick, inputs)

    def here(stream: torch.cuda.Stream | None) -> dict:
        moved = 2 * (inputs.q.nbytes + inputs.k.nbytes)
        timer, rows = Timer(moved, stream), {}
        for name, make in PROVIDERS.items():
            rows[name] = add(timer, name, make, inputs, truth, allowed)
            progress()
        for name, times in timer.times(repeats).items():
            for part, row in times.items():
                row["flops_per_s"] = FOR_TIMES[part] * case.flops / row["median"]
            rows[name] |= times
        return rows

    sizes = {"documents": len(case.lengths), "tokens": case.tokens, "longest": max(case.lengths), "row": case.row}
    sizes |= {"heads": case.heads, "head_dim": case.width, "causal": case.causal, "dtype": str(dtype)[6:]}
    return {**sizes, "padded_waste": case.waste, "flops": case.flops, "providers": on_stream(here, device)}


def add(timer: Timer, name: str, make: Callable, inputs: Inputs, truth: list[Tensor], allowed: list[Tensor]) -> dict:
    """Compare the provider and hand it to the timer; what its row begins with."""
    try:
        provider = make(inputs)
        if wrong := within_rule(truth, allowed, results_of(provider, inputs)):
            return {"error": wrong}
        tensors = {n: getattr(inputs, n) for n in ("q", "k", "v")}
        graph = timer.add(name, provider.call, {n: inputs.pad(x) if provider.padded else x for n, x in tensors.items()})
        if provider.only_graphs and not graph:
            timer.drop(name)
            return {"error": "cannot be recorded as a CUDA graph, so not timed in turn with the others"}
        return {"graph": graph}
    except Exception as error:  # a backend that cannot run is a row of the table, not the end of it
        return {"error": str(error) if isinstance(error, ValueError) else in_a_line(error)}
    finally:
        if name.startswith("torch_") and inputs.q.is_cuda:
            torch.nn.attention.restore_flash_attention_impl()


def cases(config: VLMConfig, tokens: int, images: int) -> list[Case]:
    """The language model on `tokens` tokens in documents of each length and in mixed ones; the tower on `images`."""
    seed_row, heads = config.image_tokens + config.lm_max_length, (config.lm_n_heads, config.lm_n_kv_heads)
    lengths = {str(n): split(tokens, [n]) for n in LENGTHS}
    text = sum(draw_lengths(np.random.default_rng(0), -(-tokens // config.image_tokens), config.lm_max_length))
    lengths["mixed"] = split(tokens, (config.image_tokens + text).tolist())
    found = [
        Case(f"language, {name}", documents, max(seed_row, *documents), heads, config.head_dim, True)
        for name, documents in lengths.items()
    ]
    patches, heads = config.grid**2, (config.vit_n_heads, config.vit_n_heads)
    return [*found, Case("vision", [patches] * images, patches, heads, config.vit_hidden_dim // heads[0], False)]


def split(tokens: int, lengths: list[int]) -> list[int]:
    """Documents of these lengths, again and again, until there are so many tokens; the last is cut."""
    documents: list[int] = []
    while tokens:
        documents.append(min(tokens, lengths[len(documents) % len(lengths)]))
        tokens -= documents[-1]
    return documents


def table(results: dict[str, dict]) -> str:
    head = " ".join(f"{name:>11}" for name in (*(f"{part} us" for part in PASSES), "GFLOP/s", "of padded"))
    lines = [f"{'case':15} {'waste':>5} {'backend':10} {head}"]
    for name, result in results.items():
        against = result["providers"]["reference"].get("both")
        for provider, row in result["providers"].items():
            label = f"{name:15} {result['padded_waste']:>5.0%} {provider:10}"
            if "error" in row:
                lines.append(f"{label} {row['error']}")
                continue
            times = " ".join(f"{row[part]['median'] * 1e6:>11,.1f}" for part in PASSES)
            share = f"{row['both']['median'] / against['median']:>10.0%}" if against else ""
            lines.append(f"{label} {times} {row['both']['flops_per_s'] / 1e9:>11,.0f} {share:>11}")
    return "\n".join(lines)


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="documents of 81, mixed ones and the tower; few repeats")
    parser.add_argument("--preset", default="nanovlm-222m", help="whose heads")
    parser.add_argument("--tokens", type=Range(int), default=0, help="0: 20,736 on a GPU, 1,296 on a CPU")
    parser.add_argument("--images", type=Range(int), default=0, help="for the tower; 0: 256 on a GPU, 4 on a CPU")
    parser.add_argument("--repeats", type=Range(int), default=0, help="0: 30, with --quick 5")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder of the result files (default: bench/results)")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    device = pick_device(args.device)
    on_gpu = device.type == "cuda"
    args.repeats = args.repeats or (5 if args.quick else 30)
    config, _ = preset(args.preset)
    chosen = cases(config, args.tokens or (20736 if on_gpu else 1296), args.images or (256 if on_gpu else 4))
    if args.quick:
        chosen = [case for case in chosen if case.name in ("language, 81", "language, mixed", "vision")]
    results: dict[str, dict] = {}
    with tqdm(total=len(chosen) * len(PROVIDERS), desc="backends", leave=False) as bar:
        for case in chosen:
            results[case.name] = measure(case, args.repeats, device, bar.update)
            file = write("attention", device, {"preset": args.preset, "cases": results}, args.out)
    print(table(results))
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
