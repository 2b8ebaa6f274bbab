"""What a run would be, without beginning it (`train.py --dry-run`): no network, nothing written.

Counts come from the data itself where it and its tokenizer are on this machine (an even draw of it is read), and from
`config.COUNTS` for the recipe's. Hours come from a committed measurement of the same preset on the same device.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.budget import even_draw
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.registry import is_local, load_source, make_tokenizer
from nanovlm_fast.data.split import split_off
from nanovlm_fast.data.text import TextProcessor
from nanovlm_fast.device import device_name, pick_device, pick_dtype
from nanovlm_fast.model.flops import peak_flops, step_flops
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.presets import COUNTS

# Measured tokens/s by preset and device, which `python -m bench.report` writes from its results. It
# ships with the package: an installed package has no bench/ beside it.
RATES = Path(__file__).with_name("rates.json")


def plan(model: VLMConfig, config: TrainConfig) -> dict[str, str]:
    """Names and values of the plan, for people.

    Raises what opening a local data set raises; hub data without known counts is said to be unknown.
    """
    device = pick_device(config.device)
    examples, per_example, origin = counts(model, config)
    images, tokens, labels, pairs = per_example
    batch = config.tokens_per_batch * config.accumulate
    rows = {"model": parameters(model), "data": f"{config.data}, turns: {config.turns}"}
    rates = f"{config.lr_projector:g} projector, {config.lr_vision:g} vision, {config.lr_language:g} language"
    rows["optimizer"] = (
        f"{config.optimizer}, {rates}; {config.warmup:.0%} warm-up, cosine to {config.min_lr:.0%}"
    )
    rows["scored by"] = ", ".join(
        filter(None, (f"{config.val_samples} held-out images", config.eval))
    )
    if not examples:
        return {**rows, "an epoch": f"unknown ({origin})", "a step": f"at most {batch:,} tokens"}
    rows["an epoch"] = (
        f"{examples:,} examples of {images:.1f} images, {tokens:.1f} tokens, {labels:.1f} labels ({origin})"
    )
    in_step = min(batch / tokens, examples)  # examples
    steps = config.max_steps or int(np.ceil(config.epochs * examples / in_step))
    epochs = steps * in_step / examples if config.max_steps else config.epochs
    total = epochs * examples * tokens
    rows["steps"] = (
        f"about {steps:,} of {in_step:,.0f} examples, {in_step * tokens:,.0f} tokens; {epochs:.1f} epochs"
    )
    frozen = [
        name
        for name, rate in (
            ("vision_encoder", config.lr_vision), ("MP", config.lr_projector), ("decoder", config.lr_language),
        )
        if not rate
    ]  # fmt: skip
    flops = step_flops(
        model, *(round(in_step * each) for each in (images, tokens, labels, pairs)), frozen
    )
    whole = flops / in_step * epochs * examples
    rows["tokens"] = f"{total:,.0f}"
    rows["FLOPs"] = (
        f"{scaled(flops)} a step, {scaled(flops / in_step)} an example, {scaled(whole)} in all"
    )
    if peak := peak_flops(device, pick_dtype(config.dtype, device)):
        rows["at peak"] = f"{whole / peak / 3600:.2f} h if {device_name(device)} did nothing else"
    rows["predicted"] = prediction(config, device, total)
    return rows


def scaled(flops: float) -> str:
    """Three digits and a unit."""
    power = int(np.log10(max(flops, 1)) // 3)
    return f"{flops / 1000**power:.3g} {['', 'K', 'M', 'G', 'T', 'P', 'E', 'Z'][power]}FLOP"


def parameters(model: VLMConfig) -> str:
    with torch.device("meta"):
        built = VisionLanguageModel(model)
    parts = {"vision": built.vision_encoder, "projector": built.MP, "language": built.decoder}
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return f"{sum(sizes.values()):,} parameters: " + ", ".join(
        f"{name} {size:,}" for name, size in sizes.items()
    )


def counts(
    model: VLMConfig, config: TrainConfig
) -> tuple[int, tuple[float, float, float, float], str]:
    """(examples an epoch, (images, tokens, labels, attended pairs) of one, where that is from); 0 if unknown."""
    if config.data in COUNTS and config.turns == "first":
        examples, images, tokens, labels = COUNTS[config.data]
        return examples, (images, tokens, labels, tokens * (tokens + 1) / 2), "the recipe's counts"
    if not is_local(config.data):
        return 0, (0, 0, 0, 0), f"{config.data} is on the hub, and this reads nothing from there"
    whole = load_source(config.data, "train")
    source, held_out = split_off(whole, config.val_samples, config.seed, config.data)
    try:
        tokenizer = make_tokenizer(model, source, local=True)
    except FileNotFoundError as error:
        return 0, (0, 0, 0, 0), str(error)
    text = TextProcessor(tokenizer, model.prompt, model.image_tokens, config.turns)
    drawn = even_draw(SampleLoader(source, model, config, text))
    pairs = sum(len(d) * (len(d) + 1) // 2 for sample in drawn for d in sample.documents)
    sums = (
        sum(len(s.images) for s in drawn),
        sum(s.tokens for s in drawn),
        sum(s.labels for s in drawn),
        pairs,
    )
    images, tokens, labels, pairs = (total / len(drawn) for total in sums)
    origin = f"measured on {len(drawn):,} of them, {len(held_out):,} more held out"
    return len(source), (images, tokens, labels, pairs), origin


def prediction(config: TrainConfig, device: torch.device, tokens: float) -> str:
    """Hours for so many tokens, at the measured rate of the preset on this device.

    The rate is that of a whole run if one was measured, else that of a bare optimizer step.
    """
    rates = json.loads(RATES.read_text())
    # A run comes first: its rate includes evaluations, checkpoints and waiting for data.
    for kind, at in (("runs", "at {}"), ("steps", "at a bare step's rate, {}")):
        for measured in rates[kind]:
            where = (measured["device"], measured["preset"])
            if where == (device_name(device), config.preset):
                rate = measured["tokens_per_s"]
                speed = at.format(f"{rate:,.0f} tokens/s")
                return f"{tokens / rate / 3600:.2f} h {speed} ({measured['source']})"
    return f"unknown: no run of {config.preset} was measured on {device_name(device)}"
