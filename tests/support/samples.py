"""Small models and random documents for the tests."""

from __future__ import annotations

import numpy as np

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.packing.documents import IGNORE, Document, Sample

SMALL = dict(
    vit_img_size=32,
    vit_patch_size=8,
    vit_hidden_dim=48,
    vit_inter_dim=96,
    vit_n_heads=3,
    vit_n_blocks=2,
    lm_hidden_dim=48,
    lm_inter_dim=80,
    lm_n_heads=6,
    lm_n_kv_heads=2,
    lm_n_blocks=3,
    lm_vocab_size=97,
    lm_max_position_embeddings=512,
    mp_pixel_shuffle_factor=2,
    image_mean=0.4,
    image_std=0.3,
)


def random_document(
    rng: np.random.Generator, config: VLMConfig, n_images: int, text: int
) -> Document:
    """`n_images` images first, then `text` random tokens, the last few of them labelled."""
    n = n_images * config.image_tokens
    ids = np.concatenate([np.zeros(n, np.int64), rng.integers(0, config.lm_vocab_size, text)])
    rows = np.concatenate([np.arange(n), np.full(text, -1)]).astype(np.int32)
    labels = np.full(len(ids), IGNORE, np.int64)
    answer = int(rng.integers(1, text)) if text > 1 else 0
    if answer:
        labels[-answer - 1 : -1] = ids[-answer:]
    return Document(ids, rows, labels)


def random_sample(
    rng: np.random.Generator,
    config: VLMConfig,
    n_images: int,
    n_documents: int = 1,
    name: str = "sample",
) -> Sample:
    size = config.vit_img_size
    images = rng.integers(0, 256, (n_images, 3, size, size)).astype(np.uint8)
    documents = [
        random_document(rng, config, n_images, int(rng.integers(2, 20))) for _ in range(n_documents)
    ]
    return Sample(name, images, documents)
