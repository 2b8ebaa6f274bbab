"""What is compared: one line per kernel, one function per competitor.

A kernel's module holds `<name>`, `<name>_reference`, `make_inputs`, `cost` and `aot` (see any file
in kernels/). A competitor is a function of a kernel. It returns a callable with the signature of
`<name>`, or None where it has no such operation. It imports its package inside the function, so
that a package that is not installed becomes a row of the table.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovlm_fast import ops


@dataclass(frozen=True)
class Kernel:
    """`sizes`: the arguments of its `make_inputs` at nanoVLM's shapes; `small`: of a rehearsal.

    `matrix`: it is a matrix product and must use wgmma. `also`: further sizes to measure, by label.
    """

    name: str
    sizes: dict
    small: dict
    matrix: bool = False
    also: dict[str, dict] = field(default_factory=dict)

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"nanovlm_fast.kernels.{self.name}")


F32 = torch.float32
KERNELS = (
    Kernel("rms_norm", dict(m=32768, n=576, residual=F32), dict(m=8, n=32, residual=F32)),
    Kernel("layer_norm", dict(m=50176, n=768, residual=F32), dict(m=8, n=32, residual=F32)),
    Kernel(
        "rotary", dict(t=32768, n_q=9, n_kv=3, head_dim=64), dict(t=8, n_q=2, n_kv=1, head_dim=16)
    ),
    Kernel("swiglu", dict(m=32768, n=1536), dict(m=8, n=32)),
    Kernel("embed_splice", dict(t=32768, v=49152, c=576, r=256 * 49), dict(t=40, v=50, c=32, r=8)),
    Kernel(
        "pixel_shuffle_proj",
        dict(batch=256, height=14, width=14, channels=768, n=576, factor=2),
        dict(batch=2, height=4, width=4, channels=32, n=16, factor=2),
        matrix=True,
    ),
    Kernel(
        "linear_cross_entropy",
        dict(rows=32768, vocabulary=49152, width=576),
        dict(rows=8, vocabulary=96, width=32),
        also={"8192 rows": dict(rows=8192, vocabulary=49152, width=576)},
    ),
)


def named(only: str) -> list[Kernel]:
    """The kernels of an --only option, all if it is empty. Raises ValueError for unknown names."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    if unknown := [name for name in names if name not in {kernel.name for kernel in KERNELS}]:
        known = ", ".join(kernel.name for kernel in KERNELS)
        raise ValueError(f"--only {','.join(unknown)}: there are {known}")
    return [kernel for kernel in KERNELS if kernel.name in names or not names]


def eager(kernel: Kernel) -> Callable:
    """Plain PyTorch, as the model runs without the kernel."""
    return getattr(ops, kernel.name)


def compiled(kernel: Kernel) -> Callable:
    # Static shapes, as in training, where one graph serves all steps.
    return torch.compile(eager(kernel), fullgraph=True, dynamic=False)


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


def rotate_heads(turn: Callable, qkv, cos, sin, position_ids, n_q: int, n_kv: int) -> Tensor:
    """`rotary` by means of a `turn` that rotates as Llama does.

    `turn` takes q and k (1, heads, T, D) and the tables (1, T, D), whose halves are equal.
    """
    heads = qkv.view(1, len(qkv), n_q + 2 * n_kv, -1).transpose(1, 2)
    q, k, v = heads.split([n_q, n_kv, n_kv], dim=1)
    cos, sin = (table[position_ids].repeat(1, 2)[None] for table in (cos, sin))
    q, k = turn(q, k, cos, sin)
    rotated = torch.cat([q.to(qkv.dtype), k.to(qkv.dtype), v], dim=1)
    return rotated.transpose(1, 2).reshape(len(qkv), -1)


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
    return getattr(kernel.module, kernel.name)


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
NOTHING = "has no such operation"


def call_of(provider: Callable[[Kernel], Callable | None], kernel: Kernel) -> Callable | str:
    """The provider's callable, or a string: 'not installed', NOTHING, or what went wrong."""
    try:
        return provider(kernel) or NOTHING
    except ModuleNotFoundError as error:
        return f"not installed: {error.name}"
    except Exception as error:  # another version of a package is a row of the table, not its end
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
