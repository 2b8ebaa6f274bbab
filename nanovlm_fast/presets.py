"""Presets, and what a data set needs whoever learns it: tables of option values."""

from __future__ import annotations

from typing import Any

from nanovlm_fast.config import (
    TrainConfig,
    VLMConfig,
    fields_of,
)

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vit_img_size=64, vit_patch_size=8, vit_hidden_dim=64, vit_inter_dim=256, vit_n_heads=4, vit_n_blocks=4,
        lm_hidden_dim=64, lm_inter_dim=192, lm_n_heads=4, lm_n_kv_heads=4, lm_n_blocks=2, lm_vocab_size=384,
        lm_re_base=10000.0, lm_max_position_embeddings=512, lm_max_length=16, lm_tokenizer="train",
        mp_pixel_shuffle_factor=4, image_mean=0.875, image_std=0.25, init="scratch",
        epochs=10.0,
        tokens_per_batch=5120, optimizer="muon", lr_projector=2e-3, lr_vision=2e-3, lr_language=2e-3,
        beta2=0.98, min_lr=0.0, warmup=0.04, clip=1.0, eval_every=250, save_every=250,
    ),
    # nanoVLM v0.1's recipe. Its 256 samples a step are 20,736 packed tokens; samples of over 128 positions lose their
    # labels there and are left out here. Nothing is held out: MMStar is what tells.
    "nanovlm-222m": dict(
        vision="google/siglip-base-patch16-224", language="HuggingFaceTB/SmolLM2-135M",
        lm_tokenizer="HuggingFaceTB/cosmo2-tokenizer", image_mean=0.0, image_std=1.0,
        data="HuggingFaceM4/the_cauldron:all45", turns="first", max_seqlen=128, val_samples=0, eval="mmstar",
        compile="default",
    ),
}  # fmt: skip

# What an epoch of a data set holds, so that --dry-run need not read it: examples, and of each with `--turns first` the
# images, tokens (49 of an image) and labelled tokens, of which nanoVLM's recipe sees
COUNTS: dict[str, tuple[int, float, float, float]] = {
    "HuggingFaceM4/the_cauldron:all45": (1_670_000, 1.0, 81.0, 12.0),
}

# What a data set needs, whoever learns it. easy-VQA: once colours are learnt, which takes seconds, a small model stays
# at "colour, not shape" (84%) for a long time; asked for the shape alone first, it learns both.
RECIPES: dict[str, dict[str, Any]] = {
    "easy_vqa": dict(curriculum="what shape", augment="shift"),
}


def defaults_of(name: str, data: str = "") -> dict[str, Any]:
    """Option values of a preset on a data set (default: the preset's). Raises ValueError for an unknown preset."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are: {', '.join(PRESETS)}")
    values = {**PRESETS[name], "preset": name}
    return {**values, **RECIPES.get(data or values.get("data", TrainConfig.data), {})}


def preset(name: str) -> tuple[VLMConfig, TrainConfig]:
    """Model and run of a preset. Raises ValueError for an unknown name."""
    values = defaults_of(name)
    return VLMConfig(**fields_of(VLMConfig, values)), TrainConfig(**fields_of(TrainConfig, values))
