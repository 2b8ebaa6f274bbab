"""The model's operations, each as a Triton kernel or as plain PyTorch (`--kernels`).

The model calls `ops.rms_norm(...)` and the like; `choose_ops` decides once, before training, what
runs behind each name, and also carries the choices of attention backends (`--attention`,
`--vision-attention`) and of recomputation (`--recompute`).

The functions in this file are the plain PyTorch versions. They define what a kernel must compute,
and run wherever no kernel is chosen. Shapes: T packed tokens, C channels, D head size, I MLP
width, V vocabulary.

| operation | inputs | result |
| --- | --- | --- |
| `rms_norm`, `layer_norm` | x (..., C), residual (..., C) or none | the same shape |
| `rotary` | qkv (T, (n_q + 2 n_kv) D) | q (T, n_q, D), k and v (T, n_kv, D) |
| `document_attention` | qkv (T, (n_q + 2 n_kv) D), rotary's tables, cu_seqlens | (T, n_q D) |
| `image_attention` | qkv (N, P, 3 C) and its bias (3 C,) | (N, P, C) |
| `swiglu` | gate_up (T, 2 I) | (T, I) |
| `gelu_mlp` | x (N, P, C), weights (I, C) and (C, I), biases (I,) and (C,) or none | (N, P, C) |
| `swiglu_mlp` | x (T, C), weights (2 I, C) and (C, I) | (T, C) |
| `pixel_shuffle_proj` | x (B, P, C), weight (N, factor^2 C) | (B, P / factor^2, N) |
| `embed_splice` | input_ids (T,), table (V, C), image_rows (T,), image_tokens (R, C) | (T, C) |
| `linear_cross_entropy` | h (T, C), weight (V, C), labels (T,) | two scalars |
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovlm_fast.model.attention import (
    Attention,
    VisionAttention,
    choose_attention,
    choose_vision_attention,
    sdpa,
)
from nanovlm_fast.model.capability import unfit_kernels
from nanovlm_fast.model.compiling import print_nodes_by_name

KERNELS = (
    "rms_norm",
    "layer_norm",
    "rotary",
    "document_attention",
    "image_attention",
    "swiglu",
    "gelu_mlp",
    "swiglu_mlp",
    "pixel_shuffle_proj",
    "embed_splice",
    "linear_cross_entropy",
    "adamw",
)
# Of these, what is no operation of the model: the optimizer runs it (`training/optim.py`).
UPDATES = ("adamw",)

# Kernels that contain a matrix product. They follow autocast as PyTorch's own products do: the
# activations are cast to autocast's type. Their weights are not: each kernel rounds them itself,
# and returns their gradients in the weights' own type.
PRODUCTS = ("gelu_mlp", "swiglu_mlp", "pixel_shuffle_proj", "linear_cross_entropy")


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the normalised x, or with a residual (normalised sum in x's type, x + residual)."""
    if residual is None:
        return F.rms_norm(_wide(x), weight.shape, weight, eps).to(x.dtype)
    # The sum has the residual's type: under autocast x is bfloat16 and the stream is float32.
    residual = x + residual
    return F.rms_norm(_wide(residual), weight.shape, weight, eps).to(x.dtype), residual


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    delta_bias: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the normalised x, or with a residual (normalised sum in x's type, the sum).

    The sum is x + residual + delta_bias, in the residual's type; delta_bias (C,) may be None.
    """
    if residual is None:
        return F.layer_norm(_wide(x), weight.shape, weight, bias, eps).to(x.dtype)
    if delta_bias is not None:
        x = x + delta_bias.to(x.dtype)
    residual = x + residual
    normed = F.layer_norm(_wide(residual), weight.shape, weight, bias, eps)
    return normed.to(x.dtype), residual


def _wide(x: Tensor) -> Tensor:
    """Return x in at least float32, in which norms compute; a stream may be bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotary(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, n_q: int, n_kv: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply half-rotation RoPE to the query and key heads of a packed projection.

    qkv (T, (n_q + 2 n_kv) D) holds q, k and v; cos and sin are float32 tables (positions, D / 2).
    Returns q (T, n_q, D), k and v (T, n_kv, D); v is a view of qkv.
    """
    qk, v = _heads(qkv, n_q, n_kv).split([n_q + n_kv, n_kv], dim=1)
    cos = cos.index_select(0, position_ids)[:, None, None]
    sin = sin.index_select(0, position_ids)[:, None, None]
    # One expression over both halves of a head, (T, n_q + n_kv, 2, D / 2): the compiler makes one
    # kernel of it. Halves that are put together by `cat` become float32 buffers of their own, and
    # so does a `cat` with v. Rotated in float32: bfloat16 would round cos and sin to eight bits.
    halves = qk.unflatten(-1, (2, -1)).float()
    signs = torch.arange(-1, 2, 2, device=qkv.device)[:, None]  # first * cos - second * sin, and +
    turned = (halves * cos + halves.flip(-2) * (sin * signs)).to(qkv.dtype).flatten(-2)
    q, k = turned.split([n_q, n_kv], dim=1)
    return q, k, v


def _heads(qkv: Tensor, n_q: int, n_kv: int) -> Tensor:
    """View (T, heads D) as (T, heads, D)."""
    return qkv.unflatten(1, (n_q + 2 * n_kv, -1))


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, (T, I), of gate_up (T, 2 I), which is packed as [gate | up]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor | None = None
) -> Tensor:
    """Return gelu(x @ weight1^T + bias1) @ weight2^T [+ bias2], (..., C), of x (..., C).

    GELU is the tanh approximation, as SigLIP was trained with.
    """
    inner = F.gelu(F.linear(x, weight1, bias1), approximate="tanh")
    return F.linear(inner, weight2, bias2)


def pixel_shuffle_proj(
    x: Tensor,
    weight: Tensor,
    factor: int,
    bias: Tensor | None = None,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Merge factor x factor neighbouring patches into one token and project it.

    (B, H W, C) -> (B, H W / factor^2, N). `grid` is (H, W); the default is a square.
    """
    images, patches, width = x.shape
    side = math.isqrt(patches)
    height, across = grid or (side, side)
    # `reshape` copies all patches here, since the axes were transposed. The kernel does this
    # gather in the loads of its product instead.
    x = x.view(images, height // factor, factor, across // factor, factor, width).transpose(2, 3)
    return F.linear(x.reshape(images, patches // factor**2, factor**2 * width), weight, bias)


def embed_splice(
    input_ids: Tensor,
    table: Tensor,
    image_rows: Tensor,
    image_tokens: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return (T, C): each token's embedding, or its row of image_tokens, in `dtype` or the table's.

    image_rows (T,) holds that row, or -1 for a text token.
    """
    text = F.embedding(input_ids, table)
    if len(image_tokens) == 0:
        # Where the table is frozen, the loss would depend on no weight, and could have no backward.
        if not text.requires_grad:
            text = text + image_tokens.sum(0)
        return text.to(dtype or text.dtype)
    # Widened before the gather, not after: the gradients of all documents that show an image are
    # added up in the type of the gather's input, and bfloat16 would round every addition.
    shown = F.embedding(image_rows.clamp(min=0), image_tokens.to(text.dtype))
    return torch.where(image_rows[:, None] >= 0, shown, text).to(dtype or text.dtype)


def linear_cross_entropy(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the float32 sum of the cross-entropy over labels other than -100, and their number."""
    loss = F.cross_entropy(F.linear(h, weight).float(), labels, ignore_index=-100, reduction="sum")
    return loss, (labels >= 0).sum()


Fits = Callable[[int, int, torch.dtype], bool]  # (tokens or patches, head size, type)


def _never(length: int, head_dim: int, dtype: torch.dtype) -> bool:
    return False


def computed_type(x: Tensor) -> torch.dtype:
    """Return the type in which a matrix product of x computes."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # which knows no "meta"
        return x.dtype
    return torch.get_autocast_dtype(device)


@dataclass(frozen=True)
class Ops:
    """How the model computes: one callable per operation, the attention, the recomputation.

    `kernels` names the operations that are Triton kernels, `backend` and `vision_backend` what
    computes attention in the language model and in the vision tower.
    """

    rms_norm: Callable = rms_norm
    layer_norm: Callable = layer_norm
    rotary: Callable = rotary
    swiglu: Callable = swiglu
    gelu_mlp: Callable = gelu_mlp
    # The language model's whole MLP, of which `swiglu` is the middle; then that one is not used.
    swiglu_mlp: Callable | None = None
    pixel_shuffle_proj: Callable = pixel_shuffle_proj
    embed_splice: Callable = embed_splice
    linear_cross_entropy: Callable = linear_cross_entropy
    # `embed_splice` that hands the table on to the head that shares it, with the table's gradient
    # in one buffer. Plain PyTorch has none: autograd adds the two gradients.
    embed_splice_tied: Callable | None = None
    # Whether `layer_norm` adds the bias of the projection before it. The kernel does, and its
    # backward gives the bias's gradient, which a projection would read its own output's gradient
    # again for. The compiler's norm would only read more.
    bias_in_norm: bool = False
    # Rotary and attention in one kernel; plain PyTorch has them as two operations. `in_documents`
    # says whether it takes documents of at most so many tokens, heads of a size, and a type.
    document_attention: Callable | None = None
    in_documents: Fits = _never
    # The same for the vision tower, by patches: the projection's bias and attention in one kernel.
    image_attention: Callable | None = None
    in_images: Fits = _never
    kernels: tuple[str, ...] = ()
    attention: Attention = sdpa
    backend: str = "sdpa"
    vision_attention: VisionAttention = F.scaled_dot_product_attention
    vision_backend: str = "sdpa"
    recompute: str = "none"
    stream: str = "float32"  # type of the residual streams, see `stream_type`
    asleep: bool = False  # no GPU: the chosen kernels fall back to plain PyTorch

    @property
    def updated_by_kernel(self) -> bool:
        """Whether the kernel `adamw` updates the weights, and not PyTorch's AdamW."""
        return "adamw" in self.kernels and not self.asleep

    @property
    def stream_type(self) -> torch.dtype | None:
        """The type in which residual streams begin: bfloat16, or None for that of the weights."""
        return torch.bfloat16 if self.stream == "bfloat16" else None

    def __str__(self) -> str:
        kernels = ", ".join(self.kernels) or "none, plain PyTorch"
        if self.asleep:
            kernels = f"none, plain PyTorch (they need a GPU: {kernels})"
        # The attention kernels take short documents and small images; the backends take the others.
        ours = () if self.asleep else self.kernels
        language = ("document_attention or " if "document_attention" in ours else "") + self.backend
        vision = ("image_attention or " if "image_attention" in ours else "") + self.vision_backend
        attention = f"attention: {language} · vision attention: {vision}"
        stream = "" if self.stream == "float32" else f" · stream: {self.stream}"
        return f"{attention} · kernels: {kernels} · recompute: {self.recompute}{stream}"


def choose_ops(
    kernels: str = "auto",
    device: torch.device | str = "cpu",
    attention: str = "auto",
    dtype: torch.dtype = torch.float32,
    recompute: str = "none",
    vision_attention: str = "auto",
    stream: str = "float32",
) -> Ops:
    """Choose the operations of a model that computes in `dtype` on `device`.

    Args:
        kernels: "none", "all" (all that the device can run), or names separated by commas. "auto"
            is none: a run's tuner (`tune/`) has put names in its place where any were measured to
            be faster.
        attention: see `choose_attention`.
        recompute: see `recompute.py`.
        vision_attention: see `choose_vision_attention`.
        stream: type of the residual streams, "float32" or "bfloat16".

    Raises:
        ValueError: for an unknown name, and for a kernel or attention backend that cannot run here.
    """
    device = torch.device(device)
    names = _kernel_names(kernels, device)
    backend, attend = choose_attention(attention, device, dtype)
    vision_backend, attend_to_image = choose_vision_attention(vision_attention, device, dtype)
    chosen: dict[str, Any] = {name: _kernel(name) for name in names if name not in UPDATES}
    if "document_attention" in names:
        from nanovlm_fast.kernels import document_attention

        chosen["in_documents"] = document_attention.fits
    if "image_attention" in names:
        from nanovlm_fast.kernels import image_attention

        chosen["in_images"] = image_attention.fits
    if "embed_splice" in names:
        from nanovlm_fast.kernels import embed_splice

        chosen["embed_splice_tied"] = embed_splice.embed_splice_tied
    if recompute == "norms_and_activations":
        # The operators of these kernels are products, whose results are all kept.
        for name in {"gelu_mlp", "swiglu_mlp"} & chosen.keys():
            chosen[name] = functools.partial(chosen[name], keep_activation=False)
    if names and device.type == "cuda":
        print_nodes_by_name()
    # Triton's interpreter runs kernels on a CPU; the tests use it.
    asleep = bool(names) and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1"
    return Ops(
        **chosen,
        bias_in_norm="layer_norm" in names and not asleep,
        kernels=names,
        attention=attend,
        backend=backend,
        vision_attention=attend_to_image,
        vision_backend=vision_backend,
        recompute=recompute,
        stream=stream,
        asleep=asleep,
    )


def _kernel_names(kernels: str, device: torch.device) -> tuple[str, ...]:
    """Return the names that a value of --kernels stands for on this device."""
    if kernels in ("auto", "none"):
        return ()
    if kernels == "all":
        unfit = unfit_kernels(KERNELS, device)
        return tuple(name for name in KERNELS if name not in unfit)
    names = tuple(dict.fromkeys(name.strip() for name in kernels.split(",")))
    unknown = [name for name in names if name not in KERNELS]
    if unknown:
        raise ValueError(
            f"--kernels {','.join(unknown)}: there are auto, none, all, {', '.join(KERNELS)}"
        )
    for name, why in unfit_kernels(names, device).items():
        gpu = torch.cuda.get_device_name(device)
        raise ValueError(f"--kernels {name} does not run on {gpu}: {why}; all leaves it out")
    return names


def _kernel(name: str) -> Callable:
    """Return a kernel, with its activations cast under autocast if it contains a product."""
    try:
        function = _import_kernel(name)
    except ImportError as error:
        raise ValueError(
            f"--kernels {name} needs Triton, which does not load here ({error}): pip install "
            "triton, or --kernels none"
        ) from error
    if name not in PRODUCTS:
        return function

    def under_autocast(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(x.to(computed_type(x)), *args, **kwargs)

    return under_autocast


def _unpacked(packed_rotary: Callable) -> Callable:
    """Return q, k and v as views of the kernel's result, which is packed as its input is."""

    def rotary(
        qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, n_q: int, n_kv: int
    ) -> tuple[Tensor, ...]:
        turned = packed_rotary(qkv, cos, sin, position_ids, n_q, n_kv)
        return _heads(turned, n_q, n_kv).split([n_q, n_kv, n_kv], dim=1)

    return rotary


def _import_kernel(name: str) -> Callable:
    """Return a kernel's function.

    The imports stand here and not at the head of the file because a kernel's module imports
    Triton, which a CPU installation may lack and which `--kernels none` does not need.
    """
    from nanovlm_fast.kernels import (
        document_attention,
        embed_splice,
        gelu_mlp,
        image_attention,
        layer_norm,
        linear_cross_entropy,
        pixel_shuffle_proj,
        rms_norm,
        rotary,
        swiglu,
        swiglu_mlp,
    )

    kernels: dict[str, Callable] = {
        "rms_norm": rms_norm.rms_norm,
        "layer_norm": layer_norm.layer_norm,
        "rotary": _unpacked(rotary.rotary),
        "document_attention": document_attention.document_attention,
        "image_attention": image_attention.image_attention,
        "swiglu": swiglu.swiglu,
        "gelu_mlp": gelu_mlp.gelu_mlp,
        "swiglu_mlp": swiglu_mlp.swiglu_mlp,
        "pixel_shuffle_proj": pixel_shuffle_proj.pixel_shuffle_proj,
        "embed_splice": embed_splice.embed_splice,
        "linear_cross_entropy": linear_cross_entropy.linear_cross_entropy,
    }
    return kernels[name]
