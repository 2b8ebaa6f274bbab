"""Models to export, and what ours and the reference say about a picture."""

from __future__ import annotations

import dataclasses

import easy_vqa
import numpy as np
import torch

from nanovlm_fast import VisionLanguageModel
from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data.images import load_image
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.generate import generate
from nanovlm_fast.model import reference
from nanovlm_fast.presets import preset
from tests.support.processes import ROOT
from tests.support.samples import SMALL

QUESTION = "what color is the shape?"
SHAPE = easy_vqa.get_test_image_paths()[0]  # 64 x 64
PICTURE = next(ROOT.glob("bench/results/*/train_tiny_samples.png"))  # wide, RGBA
PROPORTIONS = dict(vit_n_blocks=2, lm_n_blocks=2, lm_vocab_size=320, lm_max_position_embeddings=512)
CONFIGS = {
    "tiny": dataclasses.replace(preset("tiny")[0], lm_vocab_size=384),
    "nanovlm-222m, two layers": dataclasses.replace(preset("nanovlm-222m")[0], **PROPORTIONS),
    "untied, normalised, full vocabulary": VLMConfig(
        **{**SMALL, "lm_vocab_size": 281, "lm_tie_weights": False, "prompt": "Q: {question}\nA:"}
    ),
}


def random_model(config: VLMConfig) -> VisionLanguageModel:
    """Weights far from uniform answers: an error of place, order or scale changes the argmax."""
    model = VisionLanguageModel(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
        else:
            torch.nn.init.normal_(parameter, mean=float("norm" in name or "ln" in name), std=0.2)
    torch.nn.init.normal_(model.decoder.token_embedding.weight, std=0.05)
    return model


def ask(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    images: list,
    question: str = QUESTION,
    n: int = 12,
):
    """(reply, prompt ids, pixels (n, 3, H, W) uint8) of our own generate."""
    config = model.config
    pixels = torch.from_numpy(
        np.stack([load_image(image, config.vit_img_size) for image in images])
    )
    prompt = TextProcessor(tokenizer, config.prompt, config.image_tokens).document(
        [(question, "")], len(images)
    )
    (reply,) = generate(model, pixels, [prompt], -1, max_new_tokens=n)
    return reply, prompt, pixels


def reference_logits(model: VisionLanguageModel, prompt, pixels: torch.Tensor) -> torch.Tensor:
    """(S, V) of the text positions, from the padded reference."""
    config = model.config
    plain = reference.VisionLanguageModel(config)
    plain.load_state_dict(model.reference_state_dict())
    ids = torch.from_numpy(prompt.input_ids[prompt.image_rows < 0])[None]
    with torch.no_grad():
        return plain(ids, ((pixels.float() / 255 - config.image_mean) / config.image_std)[None])[0][
            0
        ]
