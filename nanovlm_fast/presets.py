"""Presets and data recipes: tables of option values.

`--preset` takes an entry of `PRESETS` as the defaults of all options. What a data set needs in any
preset is in `RECIPES`. To add a preset, add an entry.
"""

from __future__ import annotations

from typing import Any

from nanovlm_fast.config import CHATML, TrainConfig, VLMConfig, fields_of


def position_tokens(side: int) -> dict[str, str]:
    """The special tokens of a model whose images are cut into at most `side` x `side` tiles."""
    places = [(row, column) for row in range(1, side + 1) for column in range(1, side + 1)]
    return {
        "image_token": "<|image|>",
        "global_image_token": "<|global_image|>",
        **{f"r{row}c{column}": f"<row_{row}_col_{column}>" for row, column in places},
    }


# What nanoVLM's models with tiles have in common. A step is 16 packs of 8,192 tokens, as there in
# its runs of that length; two packs at a time, as there, would fill an H100's memory with the
# activations of 250 tiles.
TILES_OF_512: dict[str, Any] = dict(
    vision="google/siglip2-base-patch16-512",
    vit_img_size=512,
    mp_pixel_shuffle_factor=4,
    max_img_size=2048,
    resize_to_max_side_len=True,
    image_mean=0.0,
    image_std=1.0,
    vlm_extra_tokens=position_tokens(8),
    lm_chat_template=CHATML,
    lm_vocab_size=49152 + 66,
    lm_max_length=8192,
    # the run
    data="finevision",
    streaming=True,
    turns="chat",
    max_images=8,
    max_steps=80_100,
    tokens_per_batch=8192,
    accumulate=16,
    max_seqlen=8192,
    # A picture is 10 MB of tiles: what the packer looks at lies in memory, in every worker
    look_ahead=48,
    lr_projector=5.12e-3,
    lr_vision=5e-5,
    lr_language=5e-5,
    clip=1.0,
    eval="mmstar",
    compile="default",
)

PRESETS: dict[str, dict[str, Any]] = {
    # Learns easy-VQA in minutes on a CPU. Muon, because it reached AdamW's final loss in less than
    # half the steps (bench/NOTES.md).
    "tiny": dict(
        # vision tower
        vit_img_size=64,
        vit_patch_size=8,
        vit_hidden_dim=64,
        vit_inter_dim=256,
        vit_n_heads=4,
        vit_n_blocks=4,
        # language model; its tokenizer is made from the data
        lm_hidden_dim=64,
        lm_inter_dim=192,
        lm_n_heads=4,
        lm_n_kv_heads=4,
        lm_n_blocks=2,
        lm_vocab_size=384,
        lm_re_base=10000.0,
        lm_max_position_embeddings=512,
        lm_max_length=16,
        lm_tokenizer="train",
        # projector and pixels; easy-VQA's have a mean of 0.90 and a deviation of 0.20
        mp_pixel_shuffle_factor=4,
        image_mean=0.875,
        image_std=0.25,
        init="scratch",
        # the run
        epochs=10.0,
        tokens_per_batch=5120,
        optimizer="muon",
        lr_projector=2e-3,
        lr_vision=2e-3,
        lr_language=2e-3,
        beta2=0.98,
        min_lr=0.0,
        warmup=0.04,
        clip=1.0,
        eval_every=250,
        save_every=250,
    ),
    # tiny with tiles and conversations, as nanoVLM's models of 512 pixels have them. It learns
    # easy-VQA on canvases, where an object is only legible in a tile if the canvas is large.
    "tiny-split": dict(
        # vision tower
        vit_img_size=64,
        vit_patch_size=8,
        vit_hidden_dim=64,
        vit_inter_dim=256,
        vit_n_heads=4,
        vit_n_blocks=4,
        # tiles: up to 4 x 4 of them, and one of the whole
        max_img_size=256,
        vlm_extra_tokens=position_tokens(4),
        # language model; its tokenizer is made from the data
        lm_hidden_dim=64,
        lm_inter_dim=192,
        lm_n_heads=4,
        lm_n_kv_heads=4,
        lm_n_blocks=2,
        lm_vocab_size=400,
        lm_re_base=10000.0,
        lm_max_position_embeddings=512,
        lm_max_length=128,
        lm_tokenizer="train",
        lm_chat_template=CHATML,
        mp_pixel_shuffle_factor=4,
        image_mean=0.875,
        image_std=0.25,
        init="scratch",
        # the run: an epoch has 15 canvases of every picture
        data="easy_vqa_canvas",
        epochs=1.0,
        tokens_per_batch=6144,
        val_samples=20,
        optimizer="muon",
        lr_projector=2e-3,
        lr_vision=2e-3,
        lr_language=2e-3,
        beta2=0.98,
        min_lr=0.0,
        warmup=0.04,
        clip=1.0,
        eval_every=500,
        save_every=500,
    ),
    # Pretrained towers on emoji, for a laptop: python -m nanovlm_fast.demo names their folders.
    "demo": dict(
        # vision tower: the first blocks of a DINOv2-S/14, here at 8 x 8 patches
        vit_img_size=112,
        vit_patch_size=14,
        vit_hidden_dim=384,
        vit_inter_dim=1536,
        vit_n_heads=6,
        vit_n_blocks=8,
        # One object per drawing: 2 x 2 image tokens learn as much per image as 4 x 4, and take half
        # as long
        mp_pixel_shuffle_factor=4,
        # the language model is SmolLM2-135M, as in the default; a short prompt takes less time
        prompt="{question}",
        init="scratch",
        # the run
        data="emoji",
        epochs=8.0,
        tokens_per_batch=512,
        # The test split has its own pictures and is scored at the end
        val_samples=0,
        # Trained from the start, the tower comes to give the same features for every picture
        lr_projector=1e-3,
        lr_vision=0.0,
        lr_language=1e-4,
        warmup=0.05,
        min_lr=0.0,
        clip=1.0,
        log_every=5,
        eval_every=0,
        save_every=0,
    ),
    # nanoVLM v0.1's recipe. Its 256 samples per step are 20,736 packed tokens; 22,528, 278 samples,
    # is the budget near it that fills an H100's waves of tiles best (packing/waves.py). The packer
    # looks at more samples than a batch holds, or it could not fill it. Samples of more than 128
    # positions have no labels in v0.1 and are left out here. Nothing is held out, since the score
    # that counts is MMStar's.
    "nanovlm-222m": dict(
        vision="google/siglip-base-patch16-224",
        language="HuggingFaceTB/SmolLM2-135M",
        lm_tokenizer="HuggingFaceTB/cosmo2-tokenizer",
        image_mean=0.0,
        image_std=1.0,
        data="HuggingFaceM4/the_cauldron:all45",
        turns="first",
        max_seqlen=128,
        tokens_per_batch=22528,
        look_ahead=512,
        val_samples=0,
        eval="mmstar",
        compile="default",
    ),
    # nanoVLM-230M-8k and -460M-8k: images in tiles of 512 pixels, conversations, FineVision.
    "nanovlm-230m": dict(
        **TILES_OF_512,
        language="HuggingFaceTB/SmolLM2-135M-Instruct",
        lm_tokenizer="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "nanovlm-460m": dict(
        **TILES_OF_512,
        language="HuggingFaceTB/SmolLM2-360M-Instruct",
        lm_tokenizer="HuggingFaceTB/SmolLM2-360M-Instruct",
        lm_hidden_dim=960,
        lm_inter_dim=2560,
        lm_n_heads=15,
        lm_n_kv_heads=5,
        lm_n_blocks=32,
    ),
}

# What an epoch of a recipe's data with certain `--turns` holds, so that --dry-run need not read it:
# the number of examples, and per example the images (tiles, where images are cut), tokens (49 of
# them per image, 65 per tile) and labelled tokens.
#
# FineVision has 24 million examples with 17 million images, 90 million turns and 10 billion tokens
# of answers (its authors' counts). A picture is taken to be 13 tiles, as at 4:3 and 16:9, and what
# surrounds an answer, the question included, 24 tokens.
COUNTS: dict[tuple[str, str], tuple[int, float, float, float]] = {
    ("HuggingFaceM4/the_cauldron:all45", "first"): (1_670_000, 1.0, 81.0, 12.0),
    ("finevision", "chat"): (
        24_000_000,
        17 / 24 * 13,
        17 / 24 * 13 * 65 + 10_000 / 24 + 90 / 24 * 24,
        10_000 / 24 + 90 / 24 * 2,
    ),
}

# What a data set needs in any preset. easy-VQA: a small model learns colours in seconds, and then
# stays at "colour, not shape" (84%) for a long time. Asked only for the shape at first, it learns
# both. For 8,000 examples: after 15,000 canvases a model knew shapes (81%) and was slow to learn
# colours (21%).
RECIPES: dict[str, dict[str, Any]] = {
    "easy_vqa": dict(curriculum="what shape", augment="shift"),
    "easy_vqa_canvas": dict(curriculum="what shape", curriculum_share=0.14),
    "emoji": dict(augment="shift"),
}


def defaults_of(name: str, data: str = "") -> dict[str, Any]:
    """Return the option values of a preset on a data set (default: the preset's own).

    Raises ValueError for an unknown preset.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are: {', '.join(PRESETS)}")
    values = {**PRESETS[name], "preset": name}
    return {**values, **RECIPES.get(data or values.get("data", TrainConfig.data), {})}


def preset(name: str) -> tuple[VLMConfig, TrainConfig]:
    """Return model and run of a preset. Raises ValueError for an unknown name."""
    values = defaults_of(name)
    return VLMConfig(**fields_of(VLMConfig, values)), TrainConfig(**fields_of(TrainConfig, values))
