"""The plain operations that are written for the compiler, against a plainer formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanovlm_fast.model.ops import KERNELS, choose_ops, rotary


def by_concatenation(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, n_q: int, n_kv: int
) -> tuple[Tensor, ...]:
    """RoPE as it is usually written: rotate the halves of q and k, put them and v together."""
    heads = qkv.unflatten(1, (n_q + 2 * n_kv, -1))
    qk, v = heads.split([n_q + n_kv, n_kv], dim=1)
    cos = cos.index_select(0, position_ids)[:, None]
    sin = sin.index_select(0, position_ids)[:, None]
    first, second = qk.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned.to(qkv.dtype), v], dim=1).split([n_q, n_kv, n_kv], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "n_q", "n_kv", "size"),
    [(33, 9, 3, 64), (1, 15, 5, 64), (5, 3, 2, 46), (7, 2, 1, 2), (0, 9, 3, 64), (17, 1, 1, 128)],
)
def test_rotary_as_one_expression_gives_the_same_bits(tokens, n_q, n_kv, size, dtype):
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(tokens, (n_q + 2 * n_kv) * size, generator=generator).to(dtype)
    cos = torch.randn(64, size // 2, generator=generator)
    sin = torch.randn(64, size // 2, generator=generator)
    position_ids = torch.randint(64, (tokens,), generator=generator, dtype=torch.int32)
    upstream = torch.randn(tokens, n_q + 2 * n_kv, size, generator=generator).to(dtype)

    def run(function) -> list[Tensor]:
        leaf = qkv.clone().requires_grad_()
        out = function(leaf, cos, sin, position_ids, n_q, n_kv)
        return [*out, *torch.autograd.grad(out, leaf, upstream.split([n_q, n_kv, n_kv], dim=1))]

    ours = run(rotary)
    theirs = run(by_concatenation)
    assert [len(t.shape) for t in ours] == [3, 3, 3, 2]
    for mine, plain in zip(ours, theirs, strict=True):
        assert torch.equal(mine, plain)


def test_the_log_says_what_computes_attention(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    told = str(choose_ops("image_attention,document_attention"))
    assert "attention: document_attention or sdpa · vision attention: image_attention or" in told
    assert "document_attention or" not in str(choose_ops("image_attention"))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "image_attention or" not in str(choose_ops("image_attention"))  # asleep on a CPU


T4 = (7, 5)
PRODUCTS = {
    "document_attention",
    "image_attention",
    "gelu_mlp",
    "swiglu_mlp",
    "pixel_shuffle_proj",
}


@pytest.mark.parametrize(
    ("capability", "left_out"),
    [
        (T4, PRODUCTS),
        ((8, 0), set()),  # an A100: 163 KB of shared memory
        ((8, 9), PRODUCTS - {"document_attention"}),  # an L4 or RTX 4090: 99 KB
        ((9, 0), set()),
        ((10, 0), set()),
    ],
)
def test_all_kernels_are_those_that_the_gpu_can_run(monkeypatch, capability, left_out):
    """The rule only, for GPUs that this machine lacks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    ops = choose_ops("all", "cuda", "sdpa", torch.float16)
    assert set(ops.kernels) == set(KERNELS) - left_out
    assert (ops.document_attention is None) == ("document_attention" in left_out)
    for name in KERNELS:
        if name in left_out:
            with pytest.raises(ValueError, match=rf"--kernels {name} does not run on Tesla T4: "):
                choose_ops(f"rms_norm,{name}", "cuda", "sdpa", torch.float16)
        else:
            assert choose_ops(name, "cuda", "sdpa", torch.float16).kernels == (name,)
