"""Floating-point operations of a step."""

from __future__ import annotations

from collections.abc import Collection

import torch

from nanovlm_fast.config import VLMConfig

# FLOP/s of dense bfloat16 products from NVIDIA's data sheets, by the whole name that the driver gives: what begins
# alike (H100 PCIe and NVL, a MIG slice) is slower
PEAK_FLOPS = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of matrix products of `dtype`, or None where there is none to hold a run against."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device))


def step_flops(
    config: VLMConfig,
    n_images: int,
    n_tokens: int,
    n_labels: int,
    n_pairs: int,
    frozen: Collection[str] = (),
) -> int:
    """Model FLOPs of forward and backward: matrix products and attention of the useful work, 2 a multiply-add.

    n_images are encoded once each, all n_tokens (image tokens among them, padding not) go through all language layers,
    n_labels of them through the head; n_pairs is what `PackedBatch` counts. Work that an implementation does besides
    (padding, logits nobody asked for, recomputation), or finds a way to leave out, does not change the number. Norms,
    activations and other pointwise work are not counted. `frozen` names the parts of the model that are not trained
    (vision_encoder, MP, decoder): their weights take no gradients, and neither do inputs that only they lead to; the
    pixels never do. The convention is that of PaLM (Chowdhery et al., 2022, appendix B).
    """
    vision, projector, language = (
        part not in frozen for part in ("vision_encoder", "MP", "decoder")
    )
    c, patches, kv = config.vit_hidden_dim, config.grid**2, config.lm_n_kv_heads * config.head_dim
    embedding = 3 * config.vit_patch_size**2 * c
    blocks = config.vit_n_blocks * (4 * c * c + 2 * c * config.vit_inter_dim)
    pairs = config.vit_n_blocks * 2 * patches * c  # q k^T and the weights times v, a patch
    total = n_images * patches * ((1 + vision) * embedding + (1 + 2 * vision) * (blocks + pairs))

    shuffled = c * config.mp_pixel_shuffle_factor**2
    total += (
        n_images * config.image_tokens * (1 + vision + projector) * shuffled * config.lm_hidden_dim
    )

    c = config.lm_hidden_dim
    layers = config.lm_n_blocks * (2 * c * c + 2 * c * kv + 3 * c * config.lm_inter_dim)
    total += (2 + language) * (n_tokens * layers + n_labels * c * config.lm_vocab_size)
    total += 3 * n_pairs * config.lm_n_blocks * 2 * c
    return 2 * total
