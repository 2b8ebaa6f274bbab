"""What is compared: one line a kernel, one function a competitor.

A kernel's module holds `<name>`, `<name>_reference`, `make_inputs`, `cost` and `aot` (see any file in kernels/).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import torch

from nanovlm_fast import ops


@dataclass(frozen=True)
class Kernel:
    """`sizes` are the arguments of its `make_inputs` at the seed model's shapes, `small` those of a rehearsal.

    `matrix`: it is a matrix product and must use wgmma. `also`: further sizes to measure at, by a label.
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
    Kernel("rotary", dict(t=32768, n_q=9, n_kv=3, head_dim=64), dict(t=8, n_q=2, n_kv=1, head_dim=16)),
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


def eager(kernel: Kernel) -> Callable:
    """Plain PyTorch, as the model runs without the kernel."""
    return getattr(ops, kernel.name)


def compiled(kernel: Kernel) -> Callable:
    return torch.compile(eager(kernel), fullgraph=True, dynamic=False)


def liger(kernel: Kernel) -> Callable | None:
    """Liger's operation of the same meaning, where it is installed and has one."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
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
        residual = x + residual
        return LigerLayerNormFunction.apply(residual, weight, bias, eps), residual

    return call


def _liger_swiglu() -> Callable:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda gate_up: LigerSiLUMulFunction.apply(*gate_up.chunk(2, dim=-1))


def _liger_linear_cross_entropy() -> Callable:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def call(h, weight, labels):
        out = LigerFusedLinearCrossEntropyFunction.apply(h, weight, labels, None, None, -100, 0.0, 0.0, "sum")
        return (out[0] if isinstance(out, tuple) else out), (labels >= 0).sum()

    return call


LIGER = {
    "rms_norm": _liger_rms_norm,
    "layer_norm": _liger_layer_norm,
    "swiglu": _liger_swiglu,
    "linear_cross_entropy": _liger_linear_cross_entropy,
}


def ours(kernel: Kernel) -> Callable:
    return getattr(kernel.module, kernel.name)


PROVIDERS = {"eager": eager, "compile": compiled, "liger": liger, "ours": ours}
