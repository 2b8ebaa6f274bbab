"""Floating-point operations of a training step, and the peak of known devices.

Their quotient over the step's time is MFU, model FLOPs utilisation.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from nanovlm_fast.config import VLMConfig

# FLOP/s of dense 16-bit matrix products, from NVIDIA's data sheets, by the full name that the
# driver reports. A prefix is not enough: "NVIDIA H100 PCIe", the NVL and a MIG slice are slower.
PEAK_FLOPS = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "Tesla T4": 65e12,  # float16: it has no bfloat16
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak FLOP/s of products of `dtype`, or None if it is not known."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
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
    """Return the model FLOPs of forward and backward: the sum of `flops_by_part`."""
    return sum(flops_by_part(config, n_images, n_tokens, n_labels, n_pairs, frozen).values())


def flops_by_part(
    config: VLMConfig,
    n_images: int,
    n_tokens: int,
    n_labels: int,
    n_pairs: int,
    frozen: Collection[str] = (),
) -> dict[str, int]:
    """Return the model FLOPs of forward and backward, by vision_encoder, MP and decoder.

    Counted are matrix products and attention of the useful work, a multiply-add as 2, by the
    convention of PaLM (Chowdhery et al., 2022, appendix B). Norms, activations and other pointwise
    work are not counted. Neither padding, unused logits and recomputation, nor a way to leave work
    out, changes the number: it measures the task and not the implementation.

    Args:
        n_images: images, each encoded once.
        n_tokens: tokens that pass all language layers; image tokens included, padding excluded.
        n_labels: tokens that pass the head.
        n_pairs: pairs of tokens that attend to each other, as `PackedBatch` counts them.
        frozen: parts that are not trained (vision_encoder, MP, decoder). Their weights take no
            gradient; neither do inputs that only frozen parts lead to. Pixels never do.
    """
    vision, projector, language = (
        part not in frozen for part in ("vision_encoder", "MP", "decoder")
    )
    # Everything is counted in multiply-adds; the factors in front say how often each product is
    # computed: once forward, once for the gradient of its weight, once for that of its input.
    width = config.vit_hidden_dim
    patches = config.grid**2
    embedding = 3 * config.vit_patch_size**2 * width
    blocks = config.vit_n_blocks * (4 * width * width + 2 * width * config.vit_inter_dim)
    pairs = config.vit_n_blocks * 2 * patches * width  # q k^T, and the weights times v, per patch
    tower = n_images * patches * ((1 + vision) * embedding + (1 + 2 * vision) * (blocks + pairs))

    # The projector's input needs a gradient only if the tower behind it is trained.
    projection = width * config.mp_pixel_shuffle_factor**2 * config.lm_hidden_dim
    projected = n_images * config.image_tokens * (1 + vision + projector) * projection

    # The gradient of the language model's input is always computed: it leads to the projector.
    width = config.lm_hidden_dim
    kv_width = config.lm_n_kv_heads * config.head_dim
    attention = 2 * width * width + 2 * width * kv_width
    layers = config.lm_n_blocks * (attention + 3 * width * config.lm_inter_dim)
    text = (2 + language) * (n_tokens * layers + n_labels * width * config.lm_vocab_size)
    # Attention has no weights: its two products have two inputs each that need a gradient.
    text += 3 * n_pairs * config.lm_n_blocks * 2 * width
    return {"vision_encoder": 2 * tower, "MP": 2 * projected, "decoder": 2 * text}
