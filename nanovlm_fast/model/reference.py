"""The ground truth: nanoVLM's model in plain padded PyTorch, written to be read.

Architecture, state-dict keys and forward semantics are those of huggingface/nanoVLM v0.1: a SigLIP
vision tower, pixel shuffle and a linear projector, and a Llama decoder that sees the image tokens
first and then the text. Two details differ, so that a sample's result does not depend on what it
is batched with:

- Padded keys are masked on every device, together with the causal mask.
- Positions count real tokens only. v0.1 counts the padding between image and text too.

Nothing here is fast, and nothing here imports a kernel. What is fast is compared with it.

Shapes: B samples, N images per sample, P patches, S text tokens, C channels, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.model.init import init_weights


def normalise(images: Tensor, config: VLMConfig) -> Tensor:
    """Pixels of 0 to 255 -> the float32 pixels that the reference takes, of the same shape.

    The packed model does not call this: it folds the normalisation into its patch embedding.
    """
    return (images.float() / 255 - config.image_mean) / config.image_std


class PatchEmbedding(nn.Module):
    """(B, 3, H, W) normalised pixels -> (B, P, C): project patches, add learned positions."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        patch = config.vit_patch_size
        self.conv = nn.Conv2d(3, config.vit_hidden_dim, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.rand(1, config.grid**2, config.vit_hidden_dim))

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).flatten(2).transpose(1, 2) + self.position_embedding


class VisionAttention(nn.Module):
    """Every patch attends to every patch of its image."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.n_heads = config.vit_n_heads
        self.qkv_proj = nn.Linear(config.vit_hidden_dim, 3 * config.vit_hidden_dim)
        self.out_proj = nn.Linear(config.vit_hidden_dim, config.vit_hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, C) -> (B, P, C)."""
        return self.out_proj(self.attend(x))

    def attend(
        self, x: Tensor, attend: Callable[..., Tensor] = F.scaled_dot_product_attention
    ) -> Tensor:
        """Everything but the output projection: the packed model needs it with other kernels."""
        batch, patches, width = x.shape
        qkv = self.qkv_proj(x).view(batch, patches, 3, self.n_heads, width // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = attend(q, k, v)
        return out.transpose(1, 2).reshape(batch, patches, width)


class VisionMLP(nn.Module):
    """(B, P, C) -> (B, P, C). GELU is the tanh approximation, as SigLIP was trained with."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.vit_hidden_dim, config.vit_inter_dim)
        self.fc2 = nn.Linear(config.vit_inter_dim, config.vit_hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionBlock(nn.Module):
    """(B, P, C) -> (B, P, C). Pre-norm: each branch normalises its own input."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.vit_hidden_dim, eps=config.vit_ln_eps)
        self.attn = VisionAttention(config)
        self.ln2 = nn.LayerNorm(config.vit_hidden_dim, eps=config.vit_ln_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class VisionTransformer(nn.Module):
    """(B, 3, H, W) normalised pixels -> (B, P, C)."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.patch_embedding = PatchEmbedding(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.vit_n_blocks))
        self.layer_norm = nn.LayerNorm(config.vit_hidden_dim, eps=config.vit_ln_eps)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embedding(images)
        for block in self.blocks:
            x = block(x)
        return self.layer_norm(x)


class ModalityProjector(nn.Module):
    """(B, P, C) -> (B, P / s^2, C_lm): pixel shuffle, then one linear map.

    Pixel shuffle merges s x s neighbouring patches into one token of s * s * C channels.
    """

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.factor = config.mp_pixel_shuffle_factor
        self.proj = nn.Linear(
            config.vit_hidden_dim * self.factor**2, config.lm_hidden_dim, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, patches, width = x.shape
        side = math.isqrt(patches)
        s = self.factor
        x = x.view(batch, side // s, s, side // s, s, width).permute(0, 1, 3, 2, 4, 5)
        return self.proj(x.reshape(batch, (side // s) ** 2, s * s * width))


class RMSNorm(nn.Module):
    """(B, S, C) -> (B, S, C). Written out instead of `nn.RMSNorm`, which the packed model uses."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.lm_hidden_dim))
        self.eps = config.lm_rms_eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class RotaryEmbedding(nn.Module):
    """position_ids (B, S) -> cos and sin, each (B, 1, S, D), in Llama's half-rotation layout."""

    inv_freq: Tensor

    def __init__(self, config: VLMConfig):
        super().__init__()
        exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        self.register_buffer("inv_freq", 1.0 / config.lm_re_base**exponents)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[:, None, :, None].float() * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) by its angle; x is (B, heads, S, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class LanguageAttention(nn.Module):
    """Causal attention, (B, S, C) -> (B, S, C).

    Each key and value head serves n_heads / n_kv_heads query heads.
    """

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.n_heads = config.lm_n_heads
        self.n_kv_heads = config.lm_n_kv_heads
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.lm_hidden_dim, self.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.lm_hidden_dim, self.n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.lm_hidden_dim, self.n_kv_heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(self.n_heads * self.head_dim, config.lm_hidden_dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        q = self.q_proj(x).view(batch, length, self.n_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.n_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.n_kv_heads, self.head_dim).transpose(1, 2)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        k = k.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)
        v = v.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).reshape(batch, length, width))


class LanguageMLP(nn.Module):
    """SwiGLU: (B, S, C) -> (B, S, C)."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.lm_hidden_dim, config.lm_inter_dim, bias=False)
        self.up_proj = nn.Linear(config.lm_hidden_dim, config.lm_inter_dim, bias=False)
        self.down_proj = nn.Linear(config.lm_inter_dim, config.lm_hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LanguageBlock(nn.Module):
    """(B, S, C) -> (B, S, C). Pre-norm, like the vision block."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.norm1 = RMSNorm(config)
        self.attn = LanguageAttention(config)
        self.norm2 = RMSNorm(config)
        self.mlp = LanguageMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, mask)
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """Embeddings (B, S, C) and their validity (B, S) -> normalised hidden states (B, S, C)."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.positions = config.lm_max_position_embeddings
        self.token_embedding = nn.Embedding(config.lm_vocab_size, config.lm_hidden_dim)
        self.rotary_embd = RotaryEmbedding(config)
        self.blocks = nn.ModuleList(LanguageBlock(config) for _ in range(config.lm_n_blocks))
        self.norm = RMSNorm(config)
        self.head = nn.Linear(config.lm_hidden_dim, config.lm_vocab_size, bias=False)
        if config.lm_tie_weights:
            self.head.weight = self.token_embedding.weight

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        length = x.shape[1]
        # The padded length may exceed the positions; only a row's real tokens may not.
        if length > self.positions and (most := int(valid.sum(1).max())) > self.positions:
            limit = self.positions
            raise ValueError(f"a row of {most} tokens: lm_max_position_embeddings is {limit}")
        cos, sin = self.rotary_embd(valid.cumsum(1) - 1)
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        # Every token sees itself. For real ones `causal` says so already; a padded one in front of
        # its row would otherwise have an empty softmax, which is NaN.
        itself = torch.eye(length, dtype=torch.bool, device=x.device)
        mask = ((causal & valid[:, None, :]) | itself)[:, None]
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        return self.norm(x)


class VisionLanguageModel(nn.Module):
    """The whole model. Each question is one padded row, as nanoVLM trains it."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.config = config.validate()
        self.vision_encoder = VisionTransformer(config)
        self.MP = ModalityProjector(config)
        self.decoder = LanguageModel(config)
        init_weights(self, config)

    def hidden(
        self,
        input_ids: Tensor,
        images: Tensor | None,
        attention_mask: Tensor | None,
        image_rows: Tensor | None = None,
    ) -> Tensor:
        """Return normalised hidden states; arguments as in `forward`.

        They are (B, image tokens + S, C), and (B, S, C) with `image_rows`.
        """
        x = self.decoder.token_embedding(input_ids)
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if images is not None and image_rows is not None:
            image_tokens = self.MP(self.vision_encoder(images)).flatten(0, 1)
            shown = image_tokens[image_rows.clamp(min=0)].to(x.dtype)
            x = torch.where(image_rows[..., None] >= 0, shown, x)
        elif images is not None:
            batch = input_ids.shape[0]
            image_tokens = self.MP(self.vision_encoder(images.reshape(-1, *images.shape[-3:])))
            image_tokens = image_tokens.reshape(batch, -1, x.shape[-1])
            x = torch.cat([image_tokens, x], dim=1)
            valid = torch.cat([valid.new_ones(batch, image_tokens.shape[1]), valid], dim=1)
        return self.decoder(x, valid.bool())

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None,
        attention_mask: Tensor | None = None,
        targets: Tensor | None = None,
        image_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logits of the text positions and, given targets, the mean cross-entropy.

        Args:
            input_ids: (B, S) int64.
            images: (B, 3, H, W) or (B, N, 3, H, W) normalised pixels, or None for text alone.
            attention_mask: (B, S), 1 for real tokens; None if all are.
            targets: (B, S) int64, the *next* token of each position, or -100 for no label.
            image_rows: where image tokens stand among the text, as nanoVLM has them after v0.1:
                (B, S), rows of the tokens of all `images` (N, 3, H, W), or -1. None: before it.

        Returns:
            Logits (B, S, V), and a scalar or None.
        """
        hidden = self.hidden(input_ids, images, attention_mask, image_rows)
        logits = self.decoder.head(hidden[:, -input_ids.shape[1] :])
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100
        )
