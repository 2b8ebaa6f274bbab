"""The operations that have a kernel, at the sizes of nanoVLM's model."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor


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

    @property
    def call(self) -> Callable:
        """The operation, with results as the model takes them."""
        return self._unpacked(self.name)

    @property
    def reference(self) -> Callable:
        """Its plain reference, with results as the model takes them."""
        return self._unpacked(f"{self.name}_reference")

    def _unpacked(self, name: str) -> Callable:
        call = getattr(self.module, name)
        return with_heads(call) if self.name == "rotary" else call


F32 = torch.float32
KERNELS = (
    Kernel("rms_norm", dict(m=32768, n=576, residual=F32), dict(m=8, n=32, residual=F32)),
    Kernel("layer_norm", dict(m=50176, n=768, residual=F32), dict(m=8, n=32, residual=F32)),
    Kernel(
        "rotary", dict(t=32768, n_q=9, n_kv=3, head_dim=64), dict(t=8, n_q=2, n_kv=1, head_dim=16)
    ),
    Kernel(
        "document_attention",
        dict(t=20736, max_seqlen=128, n_q=9, n_kv=3, head_dim=64),
        dict(t=20, max_seqlen=9, n_q=2, n_kv=1, head_dim=32),
        matrix=True,
    ),
    Kernel(
        "image_attention",
        dict(n=256, patches=196, n_heads=12, head_dim=64),
        dict(n=2, patches=9, n_heads=2, head_dim=32),
        matrix=True,
    ),
    Kernel("swiglu", dict(m=32768, n=1536), dict(m=8, n=32)),
    Kernel(
        "gelu_mlp",
        dict(m=50176, c=768, inner=3072, bias=False),
        dict(m=8, c=32, inner=64),
        matrix=True,
    ),
    Kernel(
        "swiglu_mlp",
        dict(m=20736, c=576, inner=1536),
        dict(m=8, c=32, inner=64),
        matrix=True,
        also={"nanovlm-460m": dict(m=20736, c=960, inner=2560)},
    ),
    Kernel("embed_splice", dict(t=32768, v=49152, c=576, r=256 * 49), dict(t=40, v=50, c=32, r=8)),
    Kernel(
        "pixel_shuffle_proj",
        dict(batch=256, height=14, width=14, channels=768, n=576, factor=2),
        dict(batch=2, height=4, width=4, channels=32, n=16, factor=2),
        matrix=True,
        also={
            "64 tiles of 512 pixels": dict(
                batch=64, height=32, width=32, channels=768, n=960, factor=4
            )
        },
    ),
    Kernel(
        "linear_cross_entropy",
        dict(rows=32768, vocabulary=49152, width=576),
        dict(rows=8, vocabulary=96, width=32),
        also={"8192 rows": dict(rows=8192, vocabulary=49152, width=576)},
    ),
)
# The elements of every matrix of a vision and of a language block, and of the projector.
VISION = (768 * 2304, 768 * 768, 768 * 3072, 3072 * 768)
LANGUAGE = (576 * 960, 576 * 576, 576 * 3072, 1536 * 576)
MATRICES = [*12 * VISION, *30 * LANGUAGE, 3072 * 576]
# What is no function of the model, but updates weights in place: it has no gradient, and no rivals
# that take the same arguments. It is timed in the step.
UPDATES = (Kernel("adamw", dict(sizes=MATRICES), dict(sizes=[40, 5000])),)
ALL = (*KERNELS, *UPDATES)


def named(only: str, among: tuple[Kernel, ...] = KERNELS) -> list[Kernel]:
    """The kernels of an --only option, all if it is empty. Raises ValueError for unknown names."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    if unknown := [name for name in names if name not in {kernel.name for kernel in among}]:
        known = ", ".join(kernel.name for kernel in among)
        raise ValueError(f"--only {','.join(unknown)}: there are {known}")
    return [kernel for kernel in among if kernel.name in names or not names]


def with_heads(rotary: Callable) -> Callable:
    """`rotary` with q (T, n_q, D), k and v (T, n_kv, D) as results, views of its packed result.

    Plain PyTorch gives them like that. Packing them would be a copy that no model makes, and would
    make every rival slower than it is.
    """

    def call(qkv, cos, sin, position_ids, n_q: int, n_kv: int, **options) -> tuple[Tensor, ...]:
        turned = rotary(qkv, cos, sin, position_ids, n_q, n_kv, **options)
        return turned.unflatten(1, (n_q + 2 * n_kv, -1)).split([n_q, n_kv, n_kv], dim=1)

    return call


def rotate_heads(
    turn: Callable, qkv, cos, sin, position_ids, n_q: int, n_kv: int
) -> tuple[Tensor, ...]:
    """`rotary`, see `with_heads`, by means of a `turn` that rotates as Llama does.

    `turn` takes q and k (1, heads, T, D) and the tables (1, T, D), whose halves are equal.
    """
    heads = qkv.view(1, len(qkv), n_q + 2 * n_kv, -1).transpose(1, 2)
    q, k, v = heads.split([n_q, n_kv, n_kv], dim=1)
    cos, sin = (table[position_ids].repeat(1, 2)[None] for table in (cos, sin))
    q, k = turn(q, k, cos, sin)
    return tuple(part[0].transpose(0, 1).to(qkv.dtype) for part in (q, k, v))


NOTHING = "has no such operation"


def call_of(provider: Callable[[Kernel], Callable | None], kernel: Kernel) -> Callable | str:
    """The provider's callable, or a string: 'not installed', NOTHING, or what went wrong."""
    try:
        return provider(kernel) or NOTHING
    except ModuleNotFoundError as error:
        return f"not installed: {error.name}"
    except Exception as error:  # another version of a package is a row of the table, not its end
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
