"""What a recorded step should take on an H100: a floor, and an expected time. Both are predictions.

The floor is that of `bench.roofline`: every launch at the rate of memory or of products, whichever
binds. No step reaches it. The expected time takes the rates that kernels reach in practice:

- Pointwise kernels move 2.85 TB/s, kernels with a reduction 2.35 TB/s, and none takes less than
  2 us.
- A product runs in waves of tiles over 132 multiprocessors, at 700 TFLOP/s at most. Of the tiles
  that cuBLAS has, and of ways to split K, the fastest is assumed, for our own kernels too.
- Products of ours with an epilogue reach half of that rate.
- Attention works on whole blocks of 128 queries and keys. FlashAttention-2's backward is three
  launches and, with grouped heads, a sum: it clears a float32 accumulator for dq and reads dO and
  O; it computes, adding to the accumulator; it converts the accumulator; and it adds up dk and dv
  of the query heads that share one head of keys. Our own kernels need one pass, at a lower rate.

The rates of attention and of products with an epilogue were measured: `FLASH`, `OURS` and
`EPILOGUE` say where. All others are assumed. Six whole steps on an H100 took 0% to 4% longer than
they give (kernel_sets.json). Left out are the caches, clocks under load, gaps between launches (3%
of a step's time on an H200), and waiting for data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bench.subjects.fake_h100 import SMS
from bench.subjects.launches import DIRECTIONS, KINDS, Launch


@dataclass(frozen=True)
class Rates:
    """What a device can do: FLOP/s of dense products, bytes/s read and written together."""

    name: str
    flops: float
    bandwidth: float
    element: int = 2  # bytes of an activation


# Products: what a large bfloat16 product reaches in practice (the data sheet says 989e12).
# Memory: 90% of the data sheet's 3.35e12.
H100 = Rates("NVIDIA H100 SXM (table)", 798e12, 3.0e12)
# The data sheet's, in float16. What of them a T4 reaches in practice has not been measured here.
T4 = Rates("NVIDIA T4 (data sheet)", 65e12, 320e9)
TABLES = {"h100": H100, "t4": T4}

# Expected rates. Bytes/s: a copy and a reduction over rows on an H100, as Triton kernels reach
# them. FLOP/s of products of this model's sizes, which are small for an H100.
POINTWISE = 2.85e12
REDUCTION = 2.35e12
PRODUCT = 700e12
LEAST = 2e-6  # seconds of the smallest launch
# The share of cuBLAS's rate that a product of ours with an epilogue reaches: no other tile is
# computed while a program works on its sums. Measured in blocks on an H100: the step takes 0.9 ms
# longer with gelu_mlp and 0.7 ms less with swiglu_mlp (tune_nanovlm-222m.json); at this share it
# takes 0.5 ms longer and 0.4 ms less.
EPILOGUE = 0.5
# Tile (m, n) -> share of PRODUCT that it reaches. Small tiles load more for each product.
TILES = {
    (128, 256): 1.0,
    (256, 128): 1.0,
    (128, 192): 1.0,
    (192, 128): 1.0,
    (128, 128): 0.9,
    (64, 256): 0.8,
    (128, 64): 0.7,
    (64, 64): 0.5,
}
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# FLOP/s of FlashAttention-2 with heads of 64, on the blocks that it computes. One rate for both
# towers and directions. Measured on an H200 (profile.json), which has an H100's multiprocessors:
# 207e12 forward and 187e12 in the backward's loop of the vision tower, 132e12 and 142e12 in the
# language model, so 175e12 and 170e12 over both.
FLASH = 175e12
# The same of our attention. Measured in blocks on an H100 (tune_nanovlm-222m.json): what
# document_attention and image_attention together changed leaves them this rate. Alone, about 155e12
# and 105e12, so the gain of the first is predicted too low, and the loss from the second too.
OURS = 115e12


def floor(launch: Launch, rates: Rates = H100) -> float:
    """Seconds that a launch needs at least: computing and moving memory can overlap."""
    return max(launch.bytes / rates.bandwidth, launch.flops / rates.flops)


def expected(launch: Launch) -> float:
    """Seconds that a launch should take."""
    if launch.shape:  # a product, cuBLAS's or ours
        rate = EPILOGUE if launch.epilogue else 1.0
        return max(product(*launch.shape) / rate, launch.bytes / POINTWISE, LEAST)
    if launch.kind == "attention":
        return max(attention(launch), LEAST)
    moving = launch.bytes / (REDUCTION if launch.reduces else POINTWISE)
    return max(moving, launch.flops / PRODUCT, LEAST)


def product(m: int, k: int, n: int) -> float:
    """Seconds of (m, k) @ (k, n) by the best tile and the best split of k."""
    return min(
        _waves(m, k, n, tile, share, split) for tile, share in TILES.items() for split in SPLITS
    )


def _waves(m: int, k: int, n: int, tile: tuple[int, int], share: float, split: int) -> float:
    rows, columns = tile
    tiles = -(-m // rows) * -(-n // columns) * split
    waves = -(-tiles // SMS)
    seconds = waves * 2 * rows * columns * -(-k // split) / (PRODUCT * share / SMS)
    if split > 1:  # float32 partial results, written and read
        seconds += 2 * 4 * m * n * split / POINTWISE
    return seconds


def attention(launch: Launch) -> float:
    """Seconds of FlashAttention-2 by its passes, or of our one. Bytes are bfloat16's, float32's."""
    work = launch.attention
    ours = work.get("one_pass")
    rate = OURS if ours else FLASH
    row = work["heads"] * work["width"]
    computed = 4 * work["padded_pairs"] * row
    if launch.direction != "backward":
        return max(computed / rate, launch.bytes / POINTWISE)
    if ours:
        return max(computed * 5 / 2 / rate, launch.bytes / POINTWISE)
    kv_row = work["kv_heads"] * work["width"]
    rows = work["rows"]
    accumulator = 4 * work["padded_rows"] * row
    bf16 = 2 * rows * row
    clear = (2 * bf16 + accumulator) / POINTWISE  # dO and O in
    # q, dO, k, v in; dk and dv of every query head out; the accumulator in and out, from L2.
    moved = 2 * bf16 + 2 * 2 * rows * kv_row + 2 * bf16 + 2 * accumulator
    compute = max(computed * 5 / 2 / rate, moved / POINTWISE)
    convert = (accumulator + bf16) / POINTWISE
    grouped = 0.0
    if work["heads"] > work["kv_heads"]:
        grouped = (2 * bf16 + 2 * 2 * rows * kv_row) / REDUCTION
    return clear + compute + convert + grouped


# ---- sums


def totals(launches: Iterable[Launch]) -> dict[str, Any]:
    """Sums over launches: counts, bytes, FLOPs and seconds."""
    some = list(launches)
    moving = [launch for launch in some if launch.moves_only]
    return {
        "launches": len(some),
        "distinct": len({launch.name for launch in some}),
        "read_gb": sum(launch.read for launch in some) / 1e9,
        "written_gb": sum(launch.written for launch in some) / 1e9,
        "tflop": sum(launch.flops for launch in some) / 1e12,
        "floor_ms": sum(floor(launch) for launch in some) * 1e3,
        "expected_ms": sum(expected(launch) for launch in some) * 1e3,
        "atomics": sum(launch.atomic for launch in some),
        "moves_only": len(moving),
        "moves_only_gb": sum(launch.bytes for launch in moving) / 1e9,
        "moves_only_ms": sum(expected(launch) for launch in moving) * 1e3,
    }


def by_kind(launches: list[Launch]) -> dict[str, dict[str, dict[str, Any]]]:
    """Direction ('all' too) -> kind -> `totals`, without empty ones."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for direction in (*DIRECTIONS, "all"):
        of_it = [launch for launch in launches if direction in (launch.direction, "all")]
        kinds = {kind: [launch for launch in of_it if launch.kind == kind] for kind in KINDS}
        found[direction] = {kind: totals(some) for kind, some in kinds.items() if some}
    return found


def dearest(launches: list[Launch], count: int = 20) -> list[dict[str, Any]]:
    """Launches of one kernel in one direction together, by expected time, dearest first.

    Every number is the sum over the calls.
    """
    groups: dict[tuple[str, str], list[Launch]] = {}
    for launch in launches:
        groups.setdefault((launch.direction, launch.name), []).append(launch)
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "kind": some[0].kind,
            "direction": direction,
            "calls": len(some),
            "read_mb": sum(launch.read for launch in some) / 1e6,
            "written_mb": sum(launch.written for launch in some) / 1e6,
            "gflop": sum(launch.flops for launch in some) / 1e9,
            "floor_ms": sum(floor(launch) for launch in some) * 1e3,
            "expected_ms": sum(expected(launch) for launch in some) * 1e3,
            "moves_only": some[0].moves_only,
            "atomic": some[0].atomic,
            "detail": some[0].detail,
            "where": some[0].where,
        }
        for (direction, name), some in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["expected_ms"])[:count]
