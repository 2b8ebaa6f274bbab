"""The model that trains: nanoVLM's function on packed batches.

It computes what `reference.py` computes, without padding:

- Documents lie end to end (`PackedBatch`), and attention stays inside each of them.
- An image is encoded once for all documents that show it.
- The projections of q, k and v are one matrix, and so are those of gate and up (`fused.py`).
- Only rows with a label pass the last MLP and the head.

Between blocks two tensors travel: the residual stream `x`, and `delta`, which is still to be added
to it. That way an addition and the norm that follows it are one operation, hence one kernel.

`ops.py` decides how an operation runs. Modules have the reference's names, so that state dicts
convert by splitting the fused matrices.

Shapes: N images, P patches per image, T packed tokens, L labelled rows, C channels, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.model import fused, reference
from nanovlm_fast.model.init import init_weights
from nanovlm_fast.model.lora import Adapter
from nanovlm_fast.model.masters import Masters, work_in_bfloat16
from nanovlm_fast.model.ops import Ops, computed_type
from nanovlm_fast.model.recompute import run_block
from nanovlm_fast.packing.batch import PackedBatch

# Training, prefill and decoding each pass their own `Attend`.
Rotate = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # packed projection -> q, k, v
Attend = Callable[[int, Tensor, Rotate], Tensor]  # (layer, packed projection, rotate) -> (T, n D)


class PatchEmbedding(nn.Module):
    """(N, 3, H, W) uint8 -> (N, P, C), as one matrix product over patches.

    The normalisation of pixels, (x / 255 - mean) / std, is folded into weight and bias, so that no
    normalised copy of the images is made.
    """

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.patch = config.vit_patch_size
        self.grid = config.grid
        # A convolution only for its state-dict entry; `forward` multiplies by its flat weight.
        self.conv = nn.Conv2d(3, config.vit_hidden_dim, kernel_size=self.patch, stride=self.patch)
        self.position_embedding = nn.Parameter(torch.rand(1, self.grid**2, config.vit_hidden_dim))
        # The whole number nearest to the mean is subtracted from the bytes before the product. The
        # difference is exact, in bfloat16 too. Without it the result would be the difference of
        # two large numbers, and lose three bits in bfloat16 on bright pictures.
        self.centre = round(255 * config.image_mean)
        self.scale = 1 / (255 * config.image_std)
        self.shift = (self.centre / 255 - config.image_mean) / config.image_std

    def forward(self, images: Tensor) -> Tensor:
        n, grid, patch = len(images), self.grid, self.patch
        patches = images.view(n, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(n, grid * grid, 3 * patch * patch).to(self.conv.weight.dtype)
        if self.centre:
            patches = patches - self.centre
        weight = self.conv.weight.flatten(1)
        assert self.conv.bias is not None
        # Folded anew at each call: the weights change, and their gradient passes through here.
        bias = self.conv.bias + self.shift * weight.sum(1)
        return F.linear(patches, weight * self.scale, bias) + self.position_embedding


class VisionBlock(nn.Module):
    """The reference's block with its residual additions moved into the norms that follow them.

    Where the norms are kernels, the biases of the projections before them go with the additions.
    """

    # The norm that would add the last bias belongs to the next block. Where weights are sharded,
    # they are whole only inside their own block: sharding sets this, and the block adds it itself.
    keeps_last_bias = False

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.vit_hidden_dim, eps=config.vit_ln_eps)
        self.attn = reference.VisionAttention(config)
        self.ln2 = nn.LayerNorm(config.vit_hidden_dim, eps=config.vit_ln_eps)
        self.mlp = reference.VisionMLP(config)

    def forward(
        self, ops: Ops, x: Tensor, delta: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x and delta, both (N, P, C), and a bias (C,) -> the same after this block.

        delta and bias are still to be added to x. The first block has none; it gets None, as
        adding zeros would cost a kernel.
        """
        if delta is None:
            y = ops.layer_norm(x, self.ln1.weight, self.ln1.bias, self.ln1.eps)
        else:
            y, x = ops.layer_norm(delta, self.ln1.weight, self.ln1.bias, self.ln1.eps, x, bias)
        out, bias = _projected(self.attend(ops, y), self.attn.out_proj, ops.bias_in_norm)
        y, x = ops.layer_norm(out, self.ln2.weight, self.ln2.bias, self.ln2.eps, x, bias)
        fc1 = self.mlp.fc1
        fc2 = self.mlp.fc2
        apart = ops.bias_in_norm and not self.keeps_last_bias
        out = ops.gelu_mlp(y, fc1.weight, fc1.bias, fc2.weight, None if apart else fc2.bias)
        return x, out, fc2.bias if apart else None

    def attend(self, ops: Ops, x: Tensor) -> Tensor:
        """(N, P, C) -> (N, P, C), before the output projection."""
        attn = self.attn
        patches, width = x.shape[1:]
        by_kernel = ops.in_images(patches, width // attn.n_heads, computed_type(x))
        if not (ops.image_attention and by_kernel):
            return attn.attend(x, ops.vision_attention)
        # Without the bias, which the kernel adds: its gradient then comes out of the kernel too.
        qkv = F.linear(x, attn.qkv_proj.weight)
        return ops.image_attention(qkv, attn.qkv_proj.bias, attn.n_heads)


def _projected(x: Tensor, layer: nn.Linear, bias_apart: bool) -> tuple[Tensor, Tensor | None]:
    """The layer's result and None; or its result without the bias, and the bias."""
    if bias_apart:
        return F.linear(x, layer.weight), layer.bias
    return layer(x), None


class VisionTransformer(nn.Module):
    """(N, 3, H, W) uint8 -> (N, P, C)."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.patch_embedding = PatchEmbedding(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.vit_n_blocks))
        self.layer_norm = nn.LayerNorm(config.vit_hidden_dim, eps=config.vit_ln_eps)

    def forward(self, ops: Ops, images: Tensor) -> Tensor:
        x = self.patch_embedding(images)
        x = x.to(ops.stream_type or x.dtype)
        delta = None
        bias = None
        for block in self.blocks:
            x, delta, bias = run_block(ops.recompute, block, ops, x, delta, bias)
        norm = self.layer_norm
        return ops.layer_norm(delta, norm.weight, norm.bias, norm.eps, x, bias)[0]


class ModalityProjector(nn.Module):
    """(N, P, C) -> (N * P / s^2, C_lm): merge s x s neighbouring patches, then one linear map.

    The images' tokens come out as one table, whose rows `embed_splice` puts into the text.
    """

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.factor = config.mp_pixel_shuffle_factor
        self.proj = nn.Linear(
            config.vit_hidden_dim * self.factor**2, config.lm_hidden_dim, bias=False
        )

    def forward(self, ops: Ops, x: Tensor) -> Tensor:
        return ops.pixel_shuffle_proj(x, self.proj.weight, self.factor).flatten(0, 1)


class RotaryEmbedding(nn.Module):
    """Tables of cos and sin, (positions, D / 2), in float32.

    Made once for all positions: each step then only looks rows up.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: VLMConfig):
        super().__init__()
        exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        inv_freq = 1.0 / config.lm_re_base**exponents
        angles = torch.arange(config.lm_max_position_embeddings).float()[:, None] * inv_freq
        self.register_buffer("inv_freq", inv_freq)  # kept as nanoVLM's state dict has it
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)


class LanguageAttention(nn.Module):
    """The projections around attention. Attention itself is passed to the block as `attend`."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.n_heads = config.lm_n_heads
        self.n_kv_heads = config.lm_n_kv_heads
        self.head_dim = config.head_dim
        heads = self.n_heads + 2 * self.n_kv_heads
        self.qkv_proj = nn.Linear(config.lm_hidden_dim, heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(self.n_heads * self.head_dim, config.lm_hidden_dim, bias=False)

    def rotate(
        self, ops: Ops, rope: RotaryEmbedding, position_ids: Tensor, qkv: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The projection's output as rotated q (T, n_heads, D), rotated k, v (T, n_kv_heads, D)."""
        return ops.rotary(qkv, rope.cos, rope.sin, position_ids, self.n_heads, self.n_kv_heads)


class LanguageMLP(nn.Module):
    """SwiGLU: (T, C) -> (T, C)."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.lm_hidden_dim, 2 * config.lm_inter_dim, bias=False)
        self.down_proj = nn.Linear(config.lm_inter_dim, config.lm_hidden_dim, bias=False)

    def forward(self, ops: Ops, x: Tensor) -> Tensor:
        if ops.swiglu_mlp:
            return ops.swiglu_mlp(x, self.gate_up_proj.weight, self.down_proj.weight)
        return self.down_proj(ops.swiglu(self.gate_up_proj(x)))


class LanguageBlock(nn.Module):
    """One Llama block on packed tokens."""

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
        """x and delta, both (T, C) -> x and delta after this block.

        With `rows` (L,) only those rows are computed and returned, (L, C).
        """
        if delta is None:
            y = ops.rms_norm(x, self.norm1.weight, self.norm1.eps)
        else:
            y, x = ops.rms_norm(delta, self.norm1.weight, self.norm1.eps, x)
        rotate = functools.partial(self.attn.rotate, ops, rope, position_ids)
        out = attend(self.attn.qkv_proj(y), rotate)
        if rows is not None:
            # Not earlier: attention needs the keys and values of every row. What follows works on
            # each row by itself, and after the last block nobody reads the others.
            x = x.index_select(0, rows)
            out = out.index_select(0, rows)
        y, x = ops.rms_norm(self.attn.out_proj(out), self.norm2.weight, self.norm2.eps, x)
        return x, self.mlp(ops, y)


class LanguageModel(nn.Module):
    """Token embedding, blocks, final norm and head."""

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
        delta = None
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            here = functools.partial(attend, layer)
            wanted = rows if layer == last else None
            x, delta = run_block(
                ops.recompute, block, ops, x, delta, self.rotary_embd, position_ids, here, wanted
            )
        return ops.rms_norm(delta, self.norm.weight, self.norm.eps, x)[0]


class VisionLanguageModel(nn.Module):
    """The whole model. `ops` says how its operations run (default: plain PyTorch)."""

    def __init__(self, config: VLMConfig, ops: Ops | None = None):
        super().__init__()
        self.config = config.validate()
        self.ops = ops or Ops()
        # Entries of a checkpoint's config.json that are not used here, kept to be written again.
        self.extra_config: dict[str, object] = {}
        self.vision_encoder = VisionTransformer(config)
        self.MP = ModalityProjector(config)
        self.decoder = LanguageModel(config)
        init_weights(self, config)
        self.masters = Masters()
        # Set by `lora.add_adapter`; the language model's weights then lie inside peft's layers.
        self.adapter: Adapter | None = None

    def keep_masters(self) -> None:
        """Compute with bfloat16 working weights; weights loaded and saved are float32 masters.

        On the device where it computes: `to` would move the parameters and leave the masters.
        """
        self.masters = work_in_bfloat16(self)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """As PyTorch's, with masters in place of the working weights that are made from them."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        state.update({prefix + name: one for name, one in self.masters.weights.items()})
        return state

    def encode_images(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> (N * image_tokens, C)."""
        return self.MP(self.ops, self.vision_encoder(self.ops, images))

    def embed(self, input_ids: Tensor, image_rows: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return (T, C), each token's embedding or its row of the encoded images; the head (V, C).

        image_rows (T,) holds that row, or -1 for a text token. The head's weight is returned for
        its gradient: where it is the table, a kernel adds that of the embedding to it.
        """
        return self.splice(input_ids, image_rows, self.encode_images(images))

    def splice(
        self, input_ids: Tensor, image_rows: Tensor, image_tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what `embed` does, of image tokens (R, C)."""
        table = self.decoder.token_embedding.weight
        rest = image_rows, image_tokens, self.ops.stream_type
        tied = self.ops.embed_splice_tied
        if tied and self.config.lm_tie_weights and table.requires_grad:
            return tied(input_ids, table, *rest)
        return self.ops.embed_splice(input_ids, table, *rest), self.decoder.head.weight

    def hidden(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return (L, C), normalised hidden states at batch.label_index; the head, see `embed`.

        Raises ValueError for a document of more tokens than there are positions.
        """
        limit = self.config.lm_max_position_embeddings
        # A batch's max_seqlen may be larger than its longest document. Only then does the exact
        # length cost a transfer from the device, which would otherwise stall every step.
        if batch.max_seqlen > limit and (longest := int(batch.cu_seqlens.diff().max())) > limit:
            room = f"lm_max_position_embeddings is {limit}"
            raise ValueError(f"a document of {longest} tokens: {room}")
        x, head = self.embed(batch.input_ids, batch.image_rows, batch.images)
        return self.decode(x, batch, batch.label_index), head

    def decode(self, x: Tensor, batch: PackedBatch, rows: Tensor | None = None) -> Tensor:
        """Embeddings (T, C) -> normalised hidden states (T, C), or (L, C) of `rows` alone."""
        documents = batch.cu_seqlens, batch.max_seqlen
        config = self.config
        rope = self.decoder.rotary_embd
        kernel = self.ops.document_attention

        def attend(layer: int, qkv: Tensor, rotate: Rotate) -> Tensor:
            if kernel and self.ops.in_documents(batch.max_seqlen, config.head_dim, qkv.dtype):
                heads = config.lm_n_heads, config.lm_n_kv_heads
                return kernel(qkv, rope.cos, rope.sin, batch.position_ids, *documents, *heads)
            return self.ops.attention(*rotate(qkv), *documents, True).flatten(1)

        return self.decoder(self.ops, x, batch.position_ids, attend, rows)

    def logits(self, batch: PackedBatch) -> Tensor:
        """Return (L, V): the logits at batch.label_index."""
        return self.decoder.head(self.hidden(batch)[0])

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return the float32 cross-entropy, summed over the labelled tokens.

        A sum and not a mean: the caller divides by the labelled tokens of the whole optimizer step,
        so that micro-batches and ranks count by their tokens.
        """
        h, head = self.hidden(batch)
        return self.ops.linear_cross_entropy(h, head, batch.labels)[0]

    def fused_parts(self) -> dict[str, dict[str, int]]:
        """Map each fused weight's name to the reference's weights in it, and their rows."""
        return fused.fused_parts(self.config)

    def by_reference_name(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename weights or gradients of this model to the reference's names, as views."""
        return fused.by_reference_name(self.config, tensors)

    def reference_state_dict(self) -> dict[str, Tensor]:
        """Return the state dict under the reference's names (nanoVLM's), sharing memory."""
        return self.by_reference_name(self.state_dict())

    def load_reference_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a state dict of the reference in place. Raises ValueError naming what does not fit.

        Of tied weights (head and token embedding) one may be absent; so may the rotary buffer.
        """
        fused.copy_reference_state(self.config, self.reference_state_dict(), state)
        self.masters.round()
