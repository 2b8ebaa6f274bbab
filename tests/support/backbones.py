"""Small backbones as transformers saves them, and models that start from them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from nanovlm_fast.cli import parse_config
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.model import reference
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.weights.backbones import load_pretrained_weights

VISION = dict(image_size=32, patch_size=8, hidden_size=48, intermediate_size=96)
VISION |= dict(num_attention_heads=3, num_hidden_layers=2)
LANGUAGE = dict(
    vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6
)
LANGUAGE |= dict(num_key_value_heads=2, max_position_embeddings=256)


def randomised(model):
    """Far from the initialisation, under which half of the weights do nothing."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def siglip(folder: Path, whole: bool = False, **sizes) -> SiglipVisionModel:
    """A vision tower saved in `folder`, alone or as the vision half of a SiglipModel."""
    sizes = {**VISION, "vision_use_head": True, **sizes}
    if whole:
        text = dict(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        model = randomised(SiglipModel(SiglipConfig(text_config=text, vision_config=sizes)))
        model.save_pretrained(folder)
        return model.vision_model
    model = randomised(SiglipVisionModel(SiglipVisionConfig(**sizes)))
    model.save_pretrained(folder)
    return model


def llama(folder: Path, tied: bool = True, shards: str = "10GB", **sizes) -> LlamaForCausalLM:
    """A language model and a tokenizer that fits it, saved in `folder`."""
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    config = LlamaConfig(
        **{**LANGUAGE, "tie_word_embeddings": tied, "rope_parameters": rope, **sizes}
    )
    model = randomised(LlamaForCausalLM(config))
    model.save_pretrained(folder, max_shard_size=shards)
    text = ["Question: what is it? Answer:", " a red cat", " two cats"] * 9
    Tokenizer.train(text, config.vocab_size).save(folder)
    return model


def start(options: str) -> tuple[VisionLanguageModel, reference.VisionLanguageModel]:
    """What `train.py OPTIONS` starts from: the packed model, and the reference with its weights."""
    config, train = parse_config(options.split())
    torch.manual_seed(train.seed)
    packed = VisionLanguageModel(config).eval()
    load_pretrained_weights(packed, train)
    plain = reference.VisionLanguageModel(config)
    plain.load_state_dict(packed.reference_state_dict())
    return packed, plain.eval()


SMALL_START = "--mp-pixel-shuffle-factor 2 --vision VISION --language LANGUAGE"


def both(folder: Path, more: str = "") -> str:
    places = SMALL_START.replace("VISION", str(folder / "vision")).replace(
        "LANGUAGE", str(folder / "language")
    )
    return f"{places} {more}"


RUN = (
    "--device cpu --data synthetic:32 --tokens-per-batch 512 --look-ahead 16 --val-samples 4 "
    "--no-final-eval"
)
