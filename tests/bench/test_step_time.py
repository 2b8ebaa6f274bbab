"""Floors and expected times of launches, held by hand."""

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest
import torch

from bench.harness import step_tables
from bench.subjects import step_time
from bench.subjects.launches import Launch, attention_of, product_of
from nanovlm_fast.kernels import gelu_mlp, pixel_shuffle_proj, swiglu_mlp


def test_a_product_in_waves_by_hand():
    """132 tiles of 128 x 256 are one wave at the full rate; one row more starts another."""
    m, n, k = 132 * 128, 256, 576
    assert step_time.product(m, k, n) == pytest.approx(2 * m * n * k / 700e12)
    assert step_time.product(m + 1, k, n) > 1.2 * step_time.product(m, k, n)


def test_attentions_blocks_and_passes():
    """196 patches are two blocks of 128; a document of 81 tokens is one."""
    work = attention_of([196] * 2, heads=12, kv_heads=12, width=64, causal=False)
    assert (work["rows"], work["padded_rows"], work["padded_pairs"]) == (392, 512, 2 * 256**2)
    work = attention_of([81, 128, 129], heads=9, kv_heads=3, width=64, causal=True)
    assert work["padded_pairs"] == (1 + 1 + 3) * 128**2
    q = 338 * 9 * 64
    launch = Launch("backward", "attention", "backward", read=8 * q, attention=work)
    grouped = dataclasses.replace(launch, attention=work | {"kv_heads": 9})
    assert step_time.attention(launch) > step_time.floor(launch)
    assert step_time.attention(launch) > step_time.attention(grouped) * 0.99


def test_a_reduction_is_slower_and_nothing_is_faster_than_a_launch():
    launch = Launch("copy", "generated", "forward", read=10**9, written=10**9)
    norm = dataclasses.replace(launch, reduces=True)
    assert step_time.floor(launch) < step_time.expected(launch) < step_time.expected(norm)
    assert step_time.expected(Launch("tiny", "generated", "forward", read=4)) == 2e-6


def test_our_projection_is_a_product_like_cublass():
    """In waves of tiles, and not at the full rate whatever its shape."""
    sizes = dict(M=290 * 49, N=576, S=2, C=768)
    shapes = []
    for part in ("fwd", "bwd_x", "bwd_weight"):
        name = f"_pixel_shuffle_proj_{part}_kernel"
        arguments = inspect.signature(getattr(pixel_shuffle_proj, name).fn).parameters
        assert sizes.keys() <= arguments.keys()
        shapes.append(product_of(name, dict.fromkeys(arguments) | sizes))
    forward, backward, weight = shapes
    assert forward == (290 * 49, 4 * 768, 576)
    cost = pixel_shuffle_proj.cost(290, 14, 14, 768, 576, 2, torch.bfloat16)
    assert 2 * math.prod(forward) == cost["forward"][1]
    assert 2 * (math.prod(backward) + math.prod(weight)) == cost["backward"][1]
    ours = Launch("ours", "kernel", "forward", flops=cost["forward"][1], shape=forward)
    theirs = dataclasses.replace(ours, name="mm", kind="product")
    assert step_time.expected(ours) == step_time.expected(theirs)
    assert step_time.expected(ours) > 1.02 * ours.flops / step_time.PRODUCT


def test_a_product_with_an_epilogue_is_slower_than_cublass():
    m, c, inner = 290 * 196, 768, 3072
    sizes = dict(M=m, K=c, N=inner)
    for part in ("fwd", "bwd"):
        name = f"_gelu_mlp_{part}_kernel"
        assert sizes.keys() <= inspect.signature(getattr(gelu_mlp, name).fn).parameters.keys()
        assert product_of(name, sizes) == (m, c, inner)
    flops = 2 * m * c * inner
    assert gelu_mlp.cost(m, c, inner, torch.bfloat16)["forward"][1] == 2 * flops
    theirs = Launch("mm", "product", "forward", flops=flops, shape=(m, c, inner))
    ours = dataclasses.replace(theirs, name="ours", kind="kernel", epilogue=True)
    assert step_time.expected(ours) == pytest.approx(step_time.expected(theirs) / 0.5)
    assert step_time.floor(ours) == step_time.floor(theirs)


def test_swiglus_product_has_gate_and_up():
    m, c, inner = 22528, 576, 1536
    work = 0
    for part, columns in (("fwd", 2 * inner), ("bwd", inner)):
        name = f"_swiglu_mlp_{part}_kernel"
        arguments = inspect.signature(getattr(swiglu_mlp, name).fn).parameters
        shape = product_of(name, dict.fromkeys(arguments) | dict(M=m, K=c, N=inner))
        assert shape == (m, c, columns)
        work += 2 * math.prod(shape)
    # With the product for y: the forward; without it and the backward's: half of the backward.
    flops = swiglu_mlp.cost(m, c, inner, torch.bfloat16)
    assert work == flops["forward"][1] == flops["backward"][1] // 2


def test_attention_at_the_rates_that_were_measured():
    """FLOP by hand; FlashAttention on an H200 took 3.36 ms forward in 12 vision blocks."""
    work = attention_of([196] * 290, heads=12, kv_heads=12, width=64, causal=False)
    flop = 4 * 290 * 256**2 * 768
    theirs = Launch("flash", "attention", "forward", attention=work)
    assert step_time.expected(theirs) == pytest.approx(flop / 175e12)
    assert 12 * step_time.expected(theirs) == pytest.approx(3.36e-3, rel=0.25)
    ours = dataclasses.replace(theirs, direction="backward", attention=work | {"one_pass": 1})
    assert step_time.expected(ours) == pytest.approx(2.5 * flop / 115e12)


def test_the_dearest_kernels_are_summed():
    """The optimizer's launches of one name are of different sizes."""
    sizes = (10, 20, 70)
    launches = [Launch("adamw", "other", "update", 2 * n, n, flops=3 * n) for n in sizes]
    (row,) = step_time.dearest(launches)
    moved = (row["read_mb"] * 1e6, row["written_mb"] * 1e6, row["gflop"] * 1e9)
    assert row["calls"] == 3 and moved == pytest.approx((200, 100, 300))
    assert "in all" in step_tables.dearest_table({"dearest": [row]})
