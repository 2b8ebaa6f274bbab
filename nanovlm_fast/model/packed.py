"""The fast model: nanoVLM on packed batches.

The same function as `reference.py` without the padding: documents lie end to end (`PackedBatch`), an image is encoded
once for all documents that show it, the projections of q, k, v and of gate and up are one matrix each, and only rows
that carry a label go through the last MLP and the head. Module names are the reference's, so the state dicts convert
by splitting the fused matrices (`reference_state_dict`, `load_reference_state_dict`).

Between blocks travel the residual stream and what is still to be added to it, so that the addition and the next norm
are one operation. How an operation runs is `ops.py`'s matter.

Shapes: N images, P patches an image, T packed tokens, L labelled rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.model import reference
from nanovlm_fast.model.init import init_weights
from nanovlm_fast.model.ops import Ops
from nanovlm_fast.model.recompute import run_block
from nanovlm_fast.packing.batch import PackedBatch

# attend(layer, q, k, v) -> out: how the language model attends; training, prefill and decoding each bring their own
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class PatchEmbedding(nn.Module):
    """(N, 3, H, W) uint8 -> (N, P, C), as one matrix product over patches.

    The pixels' normalisation, (x / 255 - mean) / std, is folded into the weights: bytes go into the product. First the
    whole number nearest to the mean is taken off them, which is exact, in bfloat16 too; without it the product would be
    a difference of large numbers, and a bfloat16 one lose three bits on bright pictures.
    """

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.patch, self.grid = config.vit_patch_size, config.grid
        self.conv = nn.Conv2d(3, config.vit_hidden_dim, kernel_size=self.patch, stride=self.patch)
        self.position_embedding = nn.Parameter(torch.rand(1, self.grid**2, config.vit_hidden_dim))
        mean, std = config.image_mean, config.image_std
        self.centre = round(255 * mean)
        self.scale, self.shift = 1 / (255 * std), (self.centre / 255 - mean) / std

    def forward(self, images: Tensor) -> Tensor:
        n, grid, patch = len(images), self.grid, self.patch
        patches = images.view(n, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(n, grid * grid, 3 * patch * patch).to(self.conv.weight.dtype)
        patches = patches - self.centre if self.centre else patches
        weight = self.conv.weight.flatten(1)
        bias = self.conv.bias + self.shift * weight.sum(1)
        return F.linear(patches, weight * self.scale, bias) + self.position_embedding


class VisionBlock(reference.VisionBlock):
    """The reference's block with its residual additions moved into the norms that follow them."""

    def forward(self, ops: Ops, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """Residual stream x and what is still to be added to it, both (N, P, C) -> the same after this block."""
        if delta is None:
            y = ops.layer_norm(x, self.ln1.weight, self.ln1.bias, self.ln1.eps)
        else:
            y, x = ops.layer_norm(delta, self.ln1.weight, self.ln1.bias, self.ln1.eps, x)
        y, x = ops.layer_norm(self.attn(y), self.ln2.weight, self.ln2.bias, self.ln2.eps, x)
        return x, self.mlp(y)


class VisionTransformer(nn.Module):
    """(N, 3, H, W) uint8 -> (N, P, C)."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.patch_embedding = PatchEmbedding(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.vit_n_blocks))
        self.layer_norm = nn.LayerNorm(config.vit_hidden_dim, eps=config.vit_ln_eps)

    def forward(self, ops: Ops, images: Tensor) -> Tensor:
        x, delta = self.patch_embedding(images), None
        for block in self.blocks:
            x, delta = run_block(ops.recompute, block, ops, x, delta)
        norm = self.layer_norm
        return ops.layer_norm(delta, norm.weight, norm.bias, norm.eps, x)[0]


class ModalityProjector(nn.Module):
    """(N, P, C) -> (N * P / s^2, C_lm): s x s neighbouring patches become one token, then one linear map."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.factor = config.mp_pixel_shuffle_factor
        self.proj = nn.Linear(
            config.vit_hidden_dim * self.factor**2, config.lm_hidden_dim, bias=False
        )

    def forward(self, ops: Ops, x: Tensor) -> Tensor:
        return ops.pixel_shuffle_proj(x, self.proj.weight, self.factor).flatten(0, 1)


class RotaryEmbedding(nn.Module):
    """Tables of cos and sin (positions, head_dim / 2), float32."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        inv_freq = 1.0 / config.lm_re_base**exponents
        angles = torch.arange(config.lm_max_position_embeddings).float()[:, None] * inv_freq
        self.register_buffer("inv_freq", inv_freq)  # nanoVLM's state dict has it
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)


class LanguageAttention(nn.Module):
    def __init__(self, config: VLMConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = (
            config.lm_n_heads,
            config.lm_n_kv_heads,
            config.head_dim,
        )
        heads = self.n_heads + 2 * self.n_kv_heads
        self.qkv_proj = nn.Linear(config.lm_hidden_dim, heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(self.n_heads * self.head_dim, config.lm_hidden_dim, bias=False)

    def qkv(
        self, ops: Ops, x: Tensor, rope: RotaryEmbedding, position_ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q (T, n_heads, D), rotated k and plain v (T, n_kv_heads, D)."""
        qkv = ops.rotary(
            self.qkv_proj(x), rope.cos, rope.sin, position_ids, self.n_heads, self.n_kv_heads
        )
        heads = qkv.view(len(x), -1, self.head_dim)
        return heads.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=1)


class LanguageMLP(nn.Module):
    def __init__(self, config: VLMConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.lm_hidden_dim, 2 * config.lm_inter_dim, bias=False)
        self.down_proj = nn.Linear(config.lm_inter_dim, config.lm_hidden_dim, bias=False)

    def forward(self, ops: Ops, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_up_proj(x)))


class LanguageBlock(nn.Module):
    def __init__(self, config: VLMConfig):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.lm_hidden_dim, eps=config.lm_rms_eps)
        self.attn = LanguageAttention(config)
        self.norm2 = nn.RMSNorm(config.lm_hidden_dim, eps=config.lm_rms_eps)
        self.mlp = LanguageMLP(config)

    def forward(
        self,
        ops: Ops,
        x: Tensor,
        delta: Tensor | None,
        rope: RotaryEmbedding,
        position_ids: Tensor,
        attend: Callable,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Residual stream x and what is still to be added to it, both (T, C) -> the same after this block.

        With `rows` (L,) only those rows come out, (L, C).
        """
        if delta is None:
            y = ops.rms_norm(x, self.norm1.weight, self.norm1.eps)
        else:
            y, x = ops.rms_norm(delta, self.norm1.weight, self.norm1.eps, x)
        out = attend(*self.attn.qkv(ops, y, rope, position_ids)).flatten(1)
        if rows is not None:  # keys and values needed every row; the rest of the block does not
            x, out = x.index_select(0, rows), out.index_select(0, rows)
        y, x = ops.rms_norm(self.attn.out_proj(out), self.norm2.weight, self.norm2.eps, x)
        return x, self.mlp(ops, y)


class LanguageModel(nn.Module):
    def __init__(self, config: VLMConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.lm_vocab_size, config.lm_hidden_dim)
        self.rotary_embd = RotaryEmbedding(config)
        self.blocks = nn.ModuleList(LanguageBlock(config) for _ in range(config.lm_n_blocks))
        self.norm = nn.RMSNorm(config.lm_hidden_dim, eps=config.lm_rms_eps)
        self.head = nn.Linear(config.lm_hidden_dim, config.lm_vocab_size, bias=False)
        if config.lm_tie_weights:
            self.head.weight = self.token_embedding.weight

    def forward(
        self, ops: Ops, x: Tensor, position_ids: Tensor, attend: Attend, rows: Tensor | None = None
    ) -> Tensor:
        """Embeddings (T, C) -> normalised hidden states (T, C), or (L, C) of `rows` alone."""
        delta, last = None, len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            here = functools.partial(attend, layer)
            wanted = rows if layer == last else None
            x, delta = run_block(
                ops.recompute, block, ops, x, delta, self.rotary_embd, position_ids, here, wanted
            )
        return ops.rms_norm(delta, self.norm.weight, self.norm.eps, x)[0]


class VisionLanguageModel(nn.Module):
    """The whole model; `ops` says which operations are Triton kernels (default: none)."""

    def __init__(self, config: VLMConfig, ops: Ops | None = None):
        super().__init__()
        self.config, self.ops = config.validate(), ops or Ops()
        self.extra_config: dict[
            str, object
        ] = {}  # entries of a checkpoint's config.json that are kept for it
        self.vision_encoder = VisionTransformer(config)
        self.MP = ModalityProjector(config)
        self.decoder = LanguageModel(config)
        init_weights(self, config)

    def encode_images(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> (N * image_tokens, C)."""
        return self.MP(self.ops, self.vision_encoder(self.ops, images))

    def embed(self, input_ids: Tensor, image_rows: Tensor, images: Tensor) -> Tensor:
        """(T, C): the token's embedding, or where image_rows is not -1 that row of the encoded images."""
        table = self.decoder.token_embedding.weight
        return self.ops.embed_splice(input_ids, table, image_rows, self.encode_images(images))

    def hidden(self, batch: PackedBatch) -> Tensor:
        """(L, C): normalised hidden states at batch.label_index.

        Raises ValueError for a document of more tokens than there are positions.
        """
        limit = self.config.lm_max_position_embeddings
        if batch.max_seqlen > limit and (longest := int(batch.cu_seqlens.diff().max())) > limit:
            room = f"lm_max_position_embeddings is {limit}"
            raise ValueError(f"a document of {longest} tokens: {room}")
        x = self.embed(batch.input_ids, batch.image_rows, batch.images)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.ops.attention(q, k, v, batch.cu_seqlens, batch.max_seqlen, True)

        return self.decoder(self.ops, x, batch.position_ids, attend, batch.label_index)

    def logits(self, batch: PackedBatch) -> Tensor:
        """(L, V) at batch.label_index."""
        return self.decoder.head(self.hidden(batch))

    def forward(self, batch: PackedBatch) -> Tensor:
        """Cross-entropy in float32, summed over the labelled tokens: divide by their number over the whole step."""
        return self.ops.linear_cross_entropy(
            self.hidden(batch), self.decoder.head.weight, batch.labels
        )[0]

    def fused_parts(self) -> dict[str, dict[str, int]]:
        """Fused weights by name -> the reference's weights that they hold, in order, and their row counts."""
        config = self.config
        q, kv = config.lm_n_heads * config.head_dim, config.lm_n_kv_heads * config.head_dim
        parts = {}
        for i in range(config.lm_n_blocks):
            attn, mlp = f"decoder.blocks.{i}.attn.", f"decoder.blocks.{i}.mlp."
            parts[attn + "qkv_proj.weight"] = {
                f"{attn}{n}_proj.weight": size for n, size in zip("qkv", (q, kv, kv), strict=True)
            }
            parts[mlp + "gate_up_proj.weight"] = {
                f"{mlp}{n}_proj.weight": config.lm_inter_dim for n in ("gate", "up")
            }
        return parts

    def by_reference_name(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights or gradients under this model's names -> views of them under the reference's, fused ones split."""
        fused, split = self.fused_parts(), {}
        for name, tensor in tensors.items():
            parts = fused.get(name, {name: len(tensor)})
            split.update(zip(parts, tensor.split(list(parts.values())), strict=True))
        return split

    def reference_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the reference (nanoVLM's keys), sharing memory with this model."""
        return self.by_reference_name(self.state_dict())

    def load_reference_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a state dict of the reference, in place. Raises ValueError naming missing, extra and misshapen keys.

        Of tied weights (head and token embedding) one may be absent; the rotary buffer may be too.
        """
        state = dict(state)
        tied = ("decoder.head.weight", "decoder.token_embedding.weight")
        if self.config.lm_tie_weights:
            for name, other in (tied, tied[::-1]):
                if other in state:
                    state.setdefault(name, state[other])
        target = self.reference_state_dict()
        rotary = "decoder.rotary_embd.inv_freq"
        stored = state.setdefault(rotary, target[rotary])
        problems = [f"missing {name}" for name in target if name not in state]
        problems += [f"unexpected {name}" for name in state if name not in target]
        problems += [
            f"{name} has shape {tuple(state[name].shape)}, the model's is {tuple(tensor.shape)}"
            for name, tensor in target.items()
            if name in state and state[name].shape != tensor.shape
        ]
        if problems:
            more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
            raise ValueError("weights do not fit the model: " + "; ".join(problems[:8]) + more)
        expected = target.pop(rotary)  # not copied: the tables come from lm_re_base
        rtol = 1e-4 if stored.dtype == torch.float32 else 1e-2  # half precision rounds
        on_meta = stored.is_meta or expected.is_meta  # without values
        if not on_meta and not torch.allclose(stored.cpu().float(), expected.cpu(), rtol, 0.0):
            raise ValueError(
                f"{rotary} is not what lm_re_base = {self.config.lm_re_base} gives: the weights "
                "were trained with another base, or with scaled positions (not supported)"
            )
        with torch.no_grad():
            for name, tensor in target.items():
                tensor.copy_(state[name])
