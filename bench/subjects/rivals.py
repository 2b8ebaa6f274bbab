"""What is compared: one line per kernel, one function per competitor.

A kernel's module holds `<name>`, `<name>_reference`, `make_inputs` and `cost` (see any file in
kernels/). A competitor is a function of a kernel. It returns a callable with the signature of
`<name>`, or None where it has no such operation. It imports its package inside the function, so
that a package that is not installed becomes a row of the table.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.subjects.operators import Kernel, rotate_heads
from nanovlm_fast.model import ops
from nanovlm_fast.model.attention import choose_attention, choose_vision_attention


def eager(kernel: Kernel) -> Callable:
    """Plain PyTorch, as the model runs without the kernel."""
    if kernel.name == "document_attention":
        return rotary_then_attention
    if kernel.name == "image_attention":
        return bias_then_attention
    if kernel.name == "swiglu_mlp":
        return swiglu_between_products
    return getattr(ops, kernel.name)


def swiglu_between_products(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor) -> Tensor:
    """What `swiglu_mlp` replaces."""
    return F.linear(ops.swiglu(F.linear(x, gate_up_weight)), down_weight)


def bias_then_attention(qkv: Tensor, bias: Tensor, n_heads: int) -> Tensor:
    """What `image_attention` replaces, as it is checked; `as_timed` has what is timed."""
    return _attention(qkv + bias.to(qkv.dtype), n_heads)


def attention_after_bias(qkv: Tensor, bias: Tensor, n_heads: int) -> Tensor:
    """`bias_then_attention` of a qkv that has its bias; the bias gets its gradient all the same."""
    return _attention(BiasAdded.apply(qkv, bias), n_heads)


def _attention(qkv: Tensor, n_heads: int) -> Tensor:
    _, attend = choose_vision_attention("auto", qkv.device, qkv.dtype)
    q, k, v = qkv.unflatten(2, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)
    return attend(q, k, v).transpose(1, 2).flatten(2)


class BiasAdded(torch.autograd.Function):
    """A bias that the product before has added: nothing to do forward, a sum of rows backward."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return qkv.view_as(qkv)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.sum((0, 1), dtype=ctx.dtype)


def rotary_then_attention(  # noqa: PLR0913  # the kernel's own signature
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    n_q: int,
    n_kv: int,
) -> Tensor:
    """The two operations that `document_attention` replaces; attention as `auto` picks it."""
    _, attend = choose_attention("auto", qkv.device, qkv.dtype)
    q, k, v = ops.rotary(qkv, cos, sin, position_ids, n_q, n_kv)
    return attend(q, k, v, cu_seqlens, max_seqlen, True).flatten(1)


def compiled(kernel: Kernel) -> Callable:
    # Static shapes, as in training, where one graph serves all steps.
    return torch.compile(eager(kernel), fullgraph=True, dynamic=False)


def as_timed(provider: str, kernel: Kernel, call: Callable) -> Callable:
    """What is timed of a provider's `call`, which has been checked.

    PyTorch's attention among patches follows a product that adds the bias at no cost. Adding it in
    a pass of its own, as the check must, would make that rival slower than it is.
    """
    if kernel.name != "image_attention" or provider not in ("eager", "compile"):
        return call
    if provider == "eager":
        return attention_after_bias
    return torch.compile(attention_after_bias, fullgraph=True, dynamic=False)


def liger(kernel: Kernel) -> Callable | None:
    """Liger's operation of the same meaning, if it has one."""
    importlib.import_module("liger_kernel")
    return LIGER.get(kernel.name, lambda: None)()


def _liger_rms_norm() -> Callable:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def call(x, weight, eps, residual=None):
        if residual is None:
            return LigerRMSNormFunction.apply(x, weight, eps)
        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps)

    return call


def _liger_layer_norm() -> Callable:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def call(x, weight, bias, eps, residual=None):
        if residual is None:
            return LigerLayerNormFunction.apply(x, weight, bias, eps)
        residual = x + residual  # Liger's LayerNorm has no fused addition
        return LigerLayerNormFunction.apply(residual, weight, bias, eps), residual

    return call


def _liger_rotary() -> Callable:
    from liger_kernel.ops.rope import LigerRopeFunction

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor):
        return LigerRopeFunction.apply(q, k, cos, sin)[:2]

    return lambda *args, **kwargs: rotate_heads(turn, *args, **kwargs)


def _liger_swiglu() -> Callable:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    # Liger takes gate and up as two tensors, so the packed projection is split first.
    return lambda gate_up: LigerSiLUMulFunction.apply(*gate_up.chunk(2, dim=-1))


def _liger_linear_cross_entropy() -> Callable:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def call(h, weight, labels):
        out = LigerFusedLinearCrossEntropyFunction.apply(
            h, weight, labels, None, None, -100, 0.0, 0.0, "sum"
        )
        return (out[0] if isinstance(out, tuple) else out), (labels >= 0).sum()

    return call


LIGER = {
    "rms_norm": _liger_rms_norm,
    "layer_norm": _liger_layer_norm,
    "rotary": _liger_rotary,
    "swiglu": _liger_swiglu,
    "linear_cross_entropy": _liger_linear_cross_entropy,
}


def transformers(kernel: Kernel) -> Callable | None:
    """What Llama and SmolVLM in Hugging Face's transformers compute with, if not PyTorch's own."""
    importlib.import_module("transformers")
    return TRANSFORMERS.get(kernel.name, lambda: None)()


def _transformers_rms_norm() -> Callable:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def call(x, weight, eps, residual=None):
        stream = x if residual is None else x + residual
        # Called on a stand-in for the module, so that `weight` can be any tensor.
        module: Any = SimpleNamespace(weight=weight, variance_epsilon=eps)
        y = LlamaRMSNorm.forward(module, stream).to(x.dtype)
        return y if residual is None else (y, stream)

    return call


def _transformers_rotary() -> Callable:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return lambda *args, **kwargs: rotate_heads(apply_rotary_pos_emb, *args, **kwargs)


def _transformers_swiglu() -> Callable:
    from transformers.activations import ACT2FN

    def call(gate_up):  # the middle of LlamaMLP
        gate, up = gate_up.chunk(2, dim=-1)
        return ACT2FN["silu"](gate) * up

    return call


def _transformers_pixel_shuffle_proj() -> Callable:
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

    def call(x, weight, factor, bias=None, grid=None):
        if grid and grid[0] != grid[1]:
            raise ValueError(f"SmolVLM shuffles square pictures only, got {grid}")
        module: Any = None  # the method does not read its module
        return F.linear(SmolVLMConnector.pixel_shuffle(module, x, factor), weight, bias)

    return call


def _transformers_linear_cross_entropy() -> Callable:
    from transformers.loss.loss_utils import ForCausalLMLoss

    def call(h, weight, labels):
        # One item per batch turns the mean that the function returns into a sum.
        one: Any = 1
        loss = ForCausalLMLoss(
            F.linear(h, weight), None, len(weight), num_items_in_batch=one, shift_labels=labels
        )
        return loss, (labels >= 0).sum()

    return call


TRANSFORMERS = {
    "rms_norm": _transformers_rms_norm,
    "rotary": _transformers_rotary,
    "swiglu": _transformers_swiglu,
    "pixel_shuffle_proj": _transformers_pixel_shuffle_proj,
    "linear_cross_entropy": _transformers_linear_cross_entropy,
}


def ours(kernel: Kernel) -> Callable:
    return kernel.call


def ours_in_place(kernel: Kernel) -> Callable | None:
    """Rotary in the projection's own memory.

    With gradients it copies its input first, because here the input is a leaf.
    """
    if kernel.name != "rotary":
        return None

    def call(qkv, *args, **kwargs):
        copied = qkv.clone() if torch.is_grad_enabled() else qkv
        return ours(kernel)(copied, *args, inplace=True, **kwargs)

    return call


PROVIDERS = {
    "eager": eager,
    "compile": compiled,
    "transformers": transformers,
    "liger": liger,
    "ours": ours,
    "in place": ours_in_place,
}
