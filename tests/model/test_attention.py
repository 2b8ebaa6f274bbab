"""Every attention backend that runs here against a loop over documents: outputs and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nanovlm_fast.model.attention import BACKENDS, choose_attention, efficient, sdpa
from tests.support.kernel_checks import is_float, run

GPU = torch.cuda.is_available()
LENGTHS = [[7], [1, 1, 1], [5, 0, 16, 1, 0, 3], [16, 16, 0, 0]]


def loop(q, k, v, cu_seqlens, max_seqlen, causal):
    """Attention of each document by itself, with repeated heads and the softmax written out.

    It computes in the type of the inputs.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    documents = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) / q.shape[-1] ** 0.5
        if causal:
            above = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(above, float("-inf"))
        documents.append(torch.einsum("hqk,khd->qhd", F.softmax(scores, -1), v[start:end]))
    return torch.cat(documents)


def inputs_of(
    lengths: list[int], heads: tuple[int, int], causal: bool, dtype, device="cpu", width=16
) -> dict:
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    q, k, v = (
        torch.randn(sum(lengths), h, width).to(device, dtype)
        for h in (heads[0], heads[1], heads[1])
    )
    return dict(q=q, k=k, v=v, cu_seqlens=cu_seqlens, max_seqlen=max(lengths), causal=causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_equals_a_loop_over_documents(causal, heads, lengths):
    inputs = inputs_of(lengths, heads, causal, torch.float64)
    ours, theirs = run(sdpa, inputs), run(loop, inputs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [*LENGTHS, [128, 1, 77, 0, 128, 0, 0]])
def test_each_backend_on_the_gpu(backend, causal, lengths):
    """Outputs and gradients in bfloat16 at the model's heads, also compiled in one graph."""
    try:
        name, attend = choose_attention(backend, torch.device("cuda"), torch.bfloat16)
    except ValueError as error:
        pytest.skip(str(error))
    assert name == backend
    inputs = inputs_of(lengths, (9, 3), causal, torch.bfloat16, "cuda", width=64)
    truth = run(
        loop, {name: value.float() if is_float(value) else value for name, value in inputs.items()}
    )
    plain = run(loop, inputs)
    try:
        for call in (attend, torch.compile(attend, fullgraph=True, dynamic=False)):
            for name, out in run(
                call, inputs
            ).items():  # two runs do not give the same bits: the backward adds up with atomics
                error, allowed = (
                    (out - truth[name]).abs().max(),
                    2 * (plain[name] - truth[name]).abs().max(),
                )
                floor = 1e-5 * max(
                    1, truth[name].abs().max()
                )  # of a single token the gradients of q and k are 0
                assert error <= allowed + floor, f"{name}: {error:.1e}, allowed {allowed:.1e}"
    finally:
        if backend.startswith("torch_"):
            torch.nn.attention.restore_flash_attention_impl()


@pytest.mark.skipif(GPU, reason="what a machine without a GPU says")
def test_the_choice_without_a_gpu():
    cpu = torch.device("cpu")
    assert choose_attention("auto", cpu, torch.float32) == ("sdpa", sdpa)
    assert choose_attention("sdpa", cpu, torch.bfloat16) == ("sdpa", sdpa)
    with pytest.raises(
        ValueError, match=r"--attention torch needs a CUDA device.*sdpa runs anywhere"
    ):
        choose_attention("torch", cpu, torch.bfloat16)
    with pytest.raises(ValueError, match="there are auto, flash_attn, torch"):
        choose_attention("fa2", cpu, torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((7, 5), torch.float32, "compute capability 8.0"),  # a T4
        ((7, 5), torch.float16, "compute capability 8.0"),
        ((8, 0), torch.float32, "--dtype bfloat16"),
        ((9, 0), torch.float16, None),
        ((9, 0), torch.bfloat16, None),
    ],
)
def test_what_flash_attention_needs_of_a_gpu(monkeypatch, capability, dtype, expected):
    """The rule only, for GPUs that this machine lacks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    gpu = torch.device("cuda")
    if expected:
        padded = ("efficient", efficient) if capability < (8, 0) else ("sdpa", sdpa)
        assert choose_attention("auto", gpu, dtype) == padded
        with pytest.raises(ValueError, match=expected):
            choose_attention("torch", gpu, dtype)
    else:
        assert choose_attention("auto", gpu, dtype)[0] in ("flash_attn", "torch")


@pytest.mark.skipif(GPU, reason="packages may be there")
@pytest.mark.parametrize("backend", ["flash_attn", "torch_fa3", "torch_fa4"])
def test_a_backend_that_is_not_installed_says_what_to_install(monkeypatch, backend):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(
        ValueError,
        match=rf"--attention {backend} is not installed.*(pip install|build) .*(?i:flash)",
    ):
        choose_attention(backend, torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_memory_efficient_kernel_gets_whole_heads(dtype):
    """Grouped heads would make PyTorch compute all scores. A CPU only tests the repeating."""
    inputs = inputs_of([5, 0, 9, 1], (6, 2), True, dtype, "cpu", width=16)
    wide = {name: inputs[name].double().requires_grad_() for name in "qkv"}
    ours = {name: inputs[name].clone().requires_grad_() for name in "qkv"}
    rest = (inputs["cu_seqlens"], inputs["max_seqlen"], True)
    expected = sdpa(*wide.values(), *rest)
    out = efficient(*ours.values(), *rest)
    upstream = torch.randn(out.shape)
    out.backward(upstream.to(dtype))
    expected.backward(upstream.double())
    close = 1e-5 if dtype == torch.float32 else 5e-3
    assert out.dtype == dtype and torch.allclose(out.double(), expected, atol=close)
    for name in "qkv":
        assert torch.allclose(ours[name].grad.double(), wide[name].grad, atol=4 * close), name
    with pytest.raises(ValueError, match="efficient needs a CUDA device"):
        choose_attention("efficient", torch.device("cpu"), dtype)


def test_misfitting_heads_are_refused():
    with pytest.raises(ValueError, match="expected"):
        sdpa(
            torch.randn(4, 3, 8),
            torch.randn(4, 2, 8),
            torch.randn(4, 2, 8),
            torch.tensor([0, 4]),
            4,
        )
