"""A model small enough to be tuned in a test."""

from __future__ import annotations

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.tune.parts import Job

SIZES = dict(
    vit_img_size=32,
    vit_patch_size=8,
    vit_hidden_dim=64,
    vit_inter_dim=96,
    vit_n_heads=4,
    vit_n_blocks=2,
    lm_hidden_dim=64,
    lm_inter_dim=96,
    lm_n_heads=4,
    lm_n_kv_heads=2,
    lm_n_blocks=4,
    lm_vocab_size=97,
    lm_max_position_embeddings=512,
    mp_pixel_shuffle_factor=2,
)
BUDGET = Budget(tokens=48, documents=8, images=3, labels=12, max_seqlen=16)


def job(dtype: str = "float32", **sizes: int) -> Job:
    return Job(VLMConfig(**{**SIZES, **sizes}), BUDGET, "cpu", dtype)
