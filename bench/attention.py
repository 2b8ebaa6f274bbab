"""Attention backends side by side: forward, backward and both, on documents of several lengths.

    python -m bench.attention            on a GPU 20,736 tokens in bfloat16; on a CPU fewer, float32
    python -m bench.attention --quick    three cases, few repeats

The heads of the language model attend causally inside packed documents, those of the vision tower
to all patches of their image. Two rows stand beside the backends of nanovlm_fast/attention.py:

- `reference` computes as reference.py does: rows padded to nanoVLM's length or the longest
  document, a mask, keys and values repeated for every query head. Masks and padded inputs are made
  outside the timed part, because a model makes them once for all its layers.
- `flex` is torch.compile's flex_attention with a block mask, which is also made outside.

FLOPs count real query-key pairs, with the backward at twice the forward. A backend is timed only if
its output and gradients are within twice the error of plain PyTorch in the same dtype. On a GPU the
times come from CUDA-graph replay.
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

from bench.harness.passes import PASSES, Timer, in_a_line, on_stream, within_rule
from bench.harness.results import write
from bench.harness.tables import Rows, lined_up
from bench.subjects.workload import draw_lengths
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.config import VLMConfig
from nanovlm_fast.device import make_current, pick_device
from nanovlm_fast.model.attention import BACKENDS, choose_attention, padded_slots
from nanovlm_fast.presets import preset
from nanovlm_fast.ranges import Range

LENGTHS = (16, 48, 81, 128, 256, 1024)
FOR_TIMES = {"forward": 1, "backward": 2, "both": 3}  # FLOPs as multiples of a forward


@dataclass
class Case:
    """Documents of the given lengths; `row` is the length of the reference's padded rows.

    q is (T, n_heads, D); k and v are (T, n_kv_heads, D). `heads` is (n_heads, n_kv_heads) and
    `width` is D.
    """

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
        """FLOPs of a forward: two products for every query and each key that it attends to."""
        pairs = sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)
        return 4 * pairs * self.heads[0] * self.width

    def make(self, dtype: torch.dtype, device: torch.device) -> Inputs:
        q_heads, kv_heads = self.heads
        generator = torch.Generator(device).manual_seed(0)

        def random(heads: int) -> Tensor:
            shape = (self.tokens, heads, self.width)
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        q, k, v, grad = (random(heads) for heads in (q_heads, kv_heads, kv_heads, q_heads))
        starts = torch.tensor([0, *self.lengths], device=device).cumsum(0, dtype=torch.int32)
        return Inputs(self, q, k, v, grad, starts)


@dataclass
class Inputs:
    """Packed q, k, v, the gradient of the output and the documents' starts; padded on request."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    cu_seqlens: Tensor

    @functools.cached_property
    def slots(self) -> Tensor:
        """(T,) index of each packed token in the flattened padded rows."""
        return padded_slots(self.cu_seqlens, self.case.row, self.case.tokens)

    @functools.cached_property
    def mask(self) -> Tensor | None:
        """(B, 1, row, row) as reference.py makes it for left-aligned rows; None without masking."""
        # Without a mask SDPA may take a faster kernel; the reference gets that where it can.
        if not self.case.causal and self.case.waste == 0:
            return None
        row = self.case.row
        device = self.q.device
        valid = torch.arange(row, device=device) < self.cu_seqlens.diff()[:, None]
        seen = torch.ones(row, row, dtype=torch.bool, device=device)
        seen = seen.tril() if self.case.causal else seen
        # A padding position attends to itself, as in reference.py: a row that attends to nothing
        # would be NaN.
        visible = (seen & valid[:, None, :]) | torch.eye(row, dtype=torch.bool, device=device)
        return visible[:, None]

    def pad(self, x: Tensor) -> Tensor:
        """(T, heads, D) -> (B, heads, row, D), zeros where there is no token."""
        rows = x.new_zeros(len(self.case.lengths) * self.case.row, *x.shape[1:])
        rows = rows.index_copy(0, self.slots, x)
        return rows.view(-1, self.case.row, *x.shape[1:]).transpose(1, 2).contiguous()

    def unpad(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.slots)


@dataclass
class Provider:
    """`call(q, k, v)` takes packed tensors, or padded rows if `padded`.

    `only_graphs`: outside a CUDA graph it cannot be timed interleaved with the others.
    """

    call: Callable
    padded: bool = False
    only_graphs: bool = False


def repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention written out, (B, heads, S, D) -> the same.

    In float32 it is the truth; in the test's dtype its error is the yardstick for the backends.
    """
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

    torch._dynamo.reset()  # each case has its own mask and shapes
    tokens = inputs.case.tokens
    device = inputs.q.device
    causal = inputs.case.causal
    positions = torch.arange(tokens, device=device)
    document = torch.searchsorted(inputs.cu_seqlens, positions, right=True)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = document[query] == document[key]
        return same & (query >= key) if causal else same

    blocks = create_block_mask(sees, None, None, tokens, tokens, device=device)
    # Uncompiled flex_attention computes every score, without using the block mask.
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    grouped = inputs.q.shape[1] > inputs.k.shape[1]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.requires_grad and device.type == "cpu":
            raise ValueError("flex_attention has no backward on a CPU")
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(q, k, v, block_mask=blocks, enable_gqa=grouped)[0].transpose(0, 1)

    return Provider(call)


def backend_of(name: str, inputs: Inputs) -> Provider:
    """The backend of nanovlm_fast/attention.py; raises ValueError if it cannot run here."""
    _, attend = choose_attention(name, inputs.q.device, inputs.q.dtype)
    cu_seqlens = inputs.cu_seqlens
    longest = max(inputs.case.lengths)
    causal = inputs.case.causal
    # FlashAttention-3 and 4 replace the kernel under varlen_attn for the whole process. A recorded
    # CUDA graph keeps the kernel that it was recorded with, so only graphs can take turns.
    swaps = name.startswith("torch_")
    return Provider(lambda q, k, v: attend(q, k, v, cu_seqlens, longest, causal), only_graphs=swaps)


PROVIDERS: dict[str, Callable[[Inputs], Provider]] = {
    "reference": reference_of,
    **{name: functools.partial(backend_of, name) for name in BACKENDS},
    "flex": flex_of,
}


def results_of(
    provider: Provider, inputs: Inputs, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Output and the gradients of q, k and v at the real tokens, packed."""
    tensors = [x.to(dtype) if dtype else x for x in (inputs.q, inputs.k, inputs.v, inputs.grad)]
    q, k, v, grad = (inputs.pad(x) if provider.padded else x for x in tensors)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = provider.call(*leaves)
    results = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    return [inputs.unpad(x) for x in results] if provider.padded else results


def measure(case: Case, repeats: int, device: torch.device, progress: Callable) -> dict:
    """The sizes of the case, and per provider {'error': why} or {pass: {..., flops_per_s}}."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = case.make(dtype, device)
    yardstick = Provider(lambda q, k, v: plain(q, k, v, inputs.mask), padded=True)
    truth = results_of(yardstick, inputs, torch.float32)
    allowed = results_of(yardstick, inputs)

    def here(stream: torch.cuda.Stream | None) -> dict:
        moved = 2 * (inputs.q.nbytes + inputs.k.nbytes)
        timer = Timer(moved, stream)
        rows = {}
        for name, make in PROVIDERS.items():
            rows[name] = add(timer, name, make, inputs, truth, allowed)
            progress()
        for name, times in timer.times(repeats).items():
            for part, row in times.items():
                row["flops_per_s"] = FOR_TIMES[part] * case.flops / row["median"]
            rows[name] |= times
        return rows

    return {
        "documents": len(case.lengths),
        "tokens": case.tokens,
        "longest": max(case.lengths),
        "row": case.row,
        "heads": case.heads,
        "head_dim": case.width,
        "causal": case.causal,
        "dtype": str(dtype).removeprefix("torch."),
        "padded_waste": case.waste,
        "flops": case.flops,
        "providers": on_stream(here, device),
    }


def add(
    timer: Timer,
    name: str,
    make: Callable,
    inputs: Inputs,
    truth: list[Tensor],
    allowed: list[Tensor],
) -> dict:
    """Check a provider and add it to the timer; return the first entries of its row."""
    try:
        provider = make(inputs)
        if wrong := within_rule(truth, allowed, results_of(provider, inputs)):
            return {"error": wrong}
        tensors = {n: getattr(inputs, n) for n in ("q", "k", "v")}
        if provider.padded:
            tensors = {n: inputs.pad(x) for n, x in tensors.items()}
        graph = timer.add(name, provider.call, tensors)
        if provider.only_graphs and not graph:
            timer.drop(name)
            why = "cannot be recorded as a CUDA graph, so not timed in turn with the others"
            return {"error": why}
        return {"graph": graph}
    except Exception as error:  # a backend that cannot run is a row of the table, not its end
        return {"error": str(error) if isinstance(error, ValueError) else in_a_line(error)}
    finally:
        # The next backend must find the kernel that varlen_attn started with.
        if name.startswith("torch_") and inputs.q.is_cuda:
            torch.nn.attention.restore_flash_attention_impl()


def cases(config: VLMConfig, tokens: int, images: int) -> list[Case]:
    """The language model on `tokens` tokens, in documents of each length and in mixed ones.

    The last case is the vision tower on `images` images.
    """
    row = config.image_tokens + config.lm_max_length
    heads = (config.lm_n_heads, config.lm_n_kv_heads)
    lengths = {str(n): split(tokens, [n]) for n in LENGTHS}
    # More documents than fit even if each were an image without text; `split` takes what it needs.
    count = -(-tokens // config.image_tokens)
    prompts, answers = draw_lengths(np.random.default_rng(0), count, config.lm_max_length)
    mixed = config.image_tokens + prompts + answers
    lengths["mixed"] = split(tokens, mixed.tolist())
    found = [
        Case(f"language, {name}", cut, max(row, *cut), heads, config.head_dim, True)
        for name, cut in lengths.items()
    ]
    patches = config.grid**2
    heads = (config.vit_n_heads, config.vit_n_heads)
    width = config.vit_hidden_dim // config.vit_n_heads
    return [*found, Case("vision", [patches] * images, patches, heads, width, False)]


def split(tokens: int, lengths: list[int]) -> list[int]:
    """Documents of these lengths, repeated until they hold `tokens` tokens; the last is cut."""
    documents: list[int] = []
    while tokens:
        documents.append(min(tokens, lengths[len(documents) % len(lengths)]))
        tokens -= documents[-1]
    return documents


def table(results: dict[str, dict]) -> str:
    times = (f"{part} us" for part in PASSES)
    rows: Rows = [("case", "waste", "backend", *times, "GFLOP/s", "of padded")]
    for name, result in results.items():
        against = result["providers"]["reference"].get("both")
        for provider, row in result["providers"].items():
            label = (name, f"{result['padded_waste']:.0%}", provider)
            if "error" in row:
                rows.append((*label, row["error"]))
                continue
            times = (f"{row[part]['median'] * 1e6:,.1f}" for part in PASSES)
            rate = f"{row['both']['flops_per_s'] / 1e9:,.0f}"
            share = f"{row['both']['median'] / against['median']:.0%}" if against else "-"
            rows.append((*label, *times, rate, share))
    return lined_up(rows, left=(0, 2))


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.attention", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="documents of 81 tokens, mixed ones and the vision tower; few repeats",
    )
    parser.add_argument("--preset", default="nanovlm-222m", help="whose heads")
    parser.add_argument(
        "--tokens", type=Range(int), default=0, help="0: 20,736 on a GPU, 1,296 on a CPU"
    )
    parser.add_argument(
        "--images", type=Range(int), default=0, help="for the tower; 0: 256 on a GPU, 4 on a CPU"
    )
    parser.add_argument("--repeats", type=Range(int), default=0, help="0: 30, with --quick 5")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    device = make_current(pick_device(args.device))
    on_gpu = device.type == "cuda"
    args.repeats = args.repeats or (5 if args.quick else 30)
    config, _ = preset(args.preset)
    tokens = args.tokens or (20736 if on_gpu else 1296)
    images = args.images or (256 if on_gpu else 4)
    chosen = cases(config, tokens, images)
    if args.quick:
        quick = ("language, 81", "language, mixed", "vision")
        chosen = [case for case in chosen if case.name in quick]
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
