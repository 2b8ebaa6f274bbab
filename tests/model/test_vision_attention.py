"""The choice of the vision tower's attention kernel: `--vision-attention`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend

from nanovlm_fast.model.attention import VISION_BACKENDS, choose_vision_attention, only
from nanovlm_fast.model.ops import Ops
from nanovlm_fast.model.packed import VisionLanguageModel
from tests.support.kernel_checks import run

GPU = torch.cuda.is_available()
CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def fused_calls(model: VisionLanguageModel, ops: Ops, images: torch.Tensor) -> int:
    """How often the CPU's flash attention is in the compiled vision tower's forward graph."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    calls = 0

    def forward(graph, example_inputs):
        nonlocal calls
        # What is computed again in the backward pass stands as an argument of the operator that
        # keeps the random state for it.
        calls = sum(fused in (node.target, *node.args[:1]) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    def backward(graph, example_inputs):
        return make_boxed_func(graph)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=forward, bw_compiler=backward)
    tower = torch.compile(model.vision_encoder, fullgraph=True, dynamic=False, backend=backend)
    tower(ops, images).sum().backward()
    return calls


@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_the_compiled_tower_takes_the_kernel_that_was_chosen(small_config, recompute):
    """Whatever `recompute` is, in one graph. On a CPU PyTorch has `flash` and `math`."""
    model = VisionLanguageModel(small_config)
    images = torch.randint(256, (2, 3, small_config.vit_img_size, small_config.vit_img_size))
    images = images.to(torch.uint8)
    flash = Ops(vision_attention=only(SDPBackend.FLASH_ATTENTION), recompute=recompute)
    plain = Ops(vision_attention=only(SDPBackend.MATH), recompute=recompute)
    assert fused_calls(model, flash, images) == small_config.vit_n_blocks
    assert fused_calls(model, plain, images) == 0
    # The switch is PyTorch's own and global: it must be as it was.
    assert torch.backends.cuda.math_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.skipif(GPU, reason="what a machine without a GPU says")
def test_the_choice_without_a_gpu():
    chosen = choose_vision_attention("auto", CPU, torch.float32)
    assert chosen == ("sdpa", F.scaled_dot_product_attention)
    for name in VISION_BACKENDS:
        needs = f"--vision-attention {name} needs a CUDA device; --vision-attention auto runs"
        with pytest.raises(ValueError, match=needs):
            choose_vision_attention(name, CPU, torch.float32)
    with pytest.raises(ValueError, match="there are auto, flash, cudnn"):
        choose_vision_attention("ours", CPU, torch.float32)


def test_auto_is_flash_where_flash_attention_runs(monkeypatch):
    """The rule alone, for GPUs that are not here."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_vision_attention("auto", CUDA, torch.bfloat16)[0] == "flash"
    assert choose_vision_attention("auto", CUDA, torch.float32)[0] == "sdpa"
    with pytest.raises(ValueError, match="cudnn needs --dtype bfloat16"):
        choose_vision_attention("cudnn", CUDA, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_vision_attention("auto", CUDA, torch.bfloat16)[0] == "sdpa"


@pytest.mark.skipif(GPU, reason="a kernel that PyTorch does not have")
def test_a_kernel_that_does_not_run_is_one_line(monkeypatch):
    """As on a GPU whose cuDNN is too old: the kernel is tried when it is chosen."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ValueError, match=r"cudnn does not run here .*auto runs anywhere") as error:
        choose_vision_attention("cudnn", CUDA, torch.bfloat16)
    assert "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("backend", VISION_BACKENDS)
def test_each_kernel_on_the_gpu(backend):
    """Outputs and gradients in bfloat16 at the model's heads, also compiled in one graph."""
    try:
        name, attend = choose_vision_attention(backend, CUDA, torch.bfloat16)
    except ValueError as error:
        pytest.skip(str(error))
    assert name == backend
    shape = (4, 12, 196, 64)
    inputs = {name: torch.randn(shape).to(CUDA, torch.bfloat16) for name in "qkv"}
    plain = only(SDPBackend.MATH)
    truth = run(plain, {name: value.float() for name, value in inputs.items()})
    rounded = run(plain, inputs)
    for call in (attend, torch.compile(attend, fullgraph=True, dynamic=False)):
        for name, out in run(call, inputs).items():
            error = (out - truth[name]).abs().max()
            allowed = 2 * (rounded[name] - truth[name]).abs().max()
            floor = 1e-5 * truth[name].abs().max()
            assert error <= allowed + floor, f"{name}: {error:.1e}, allowed {allowed:.1e}"
