"""The plan of a run (`train.py --dry-run`): nothing is downloaded and nothing is written.

Counts are measured on the data where it and its tokenizer are on this machine (an even draw of it
is read), and come from `presets.COUNTS` for the recipe's. Hours come from a committed measurement
of the same preset on the same device.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.budget import even_draw
from nanovlm_fast.data.chat import make_text
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.registry import is_local, load_source, make_tokenizer
from nanovlm_fast.data.split import split_off
from nanovlm_fast.device import device_name, pick_device, pick_dtype
from nanovlm_fast.model.flops import PEAK_FLOPS, flops_by_part, peak_flops
from nanovlm_fast.model.footprint import step_bytes
from nanovlm_fast.model.lora import adapter_size
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.fitting import Trial, largest_budget
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.presets import COUNTS, preset

POINT = 8192  # tokens at which memory is estimated, and twice as many
H100 = "NVIDIA H100 80GB HBM3"
T4 = "Tesla T4"
# By value of --device-like: name, bytes of memory, and the type that `auto` computes in there.
LIKE = {
    "t4": (T4, 15e9, torch.float16),
    "h100": (H100, 80e9, torch.bfloat16),
}
# Measured and predicted tokens/s by preset and device, which `python -m bench.report` writes. It
# ships with the package: an installed package has no bench/ beside it.
RATES = Path(__file__).with_name("rates.json")


@dataclass(frozen=True)
class Example:
    """The size of the average example."""

    images: float
    tokens: float
    labels: float
    pairs: float  # of query and key that attention lets meet


@dataclass(frozen=True)
class Counts:
    """The size of an epoch; `example` is None if it is unknown, and `origin` says why."""

    examples: int
    example: Example | None
    origin: str


def plan(model: VLMConfig, config: TrainConfig) -> dict[str, str]:
    """Names and values of the plan, for people.

    Hub data without known counts is reported as unknown. Raises what opening a local data set
    raises.
    """
    if not config.tokens_per_batch:  # which a plan cannot try
        preset_tokens = preset(config.preset)[1].tokens_per_batch
        config = dataclasses.replace(config, tokens_per_batch=preset_tokens)
    found = counts(model, config)
    batch = config.tokens_per_batch * config.accumulate
    rows = {"model": parameters(model), "data": f"{config.data}, turns: {config.turns}"}
    rows["optimizer"] = optimizer(config)
    if config.lora_rank:
        adapted = adapter_size(model, config.lora_rank)
        rows["adapters"] = f"rank {config.lora_rank}, {adapted:,} parameters; the base is frozen"
    held_out = f"{config.val_samples} held-out images"
    rows["scored by"] = ", ".join(filter(None, (held_out, config.eval)))
    example = found.example
    if example is None:
        rows["an epoch"] = f"unknown ({found.origin})"
        rows["a step"] = f"at most {batch:,} tokens"
        if config.device_like != "none":
            rows["memory"] = "unknown, as the examples are"
        return rows
    shown = "tiles" if model.max_img_size else "images"
    each = f"{example.images:.1f} {shown}, {example.tokens:.1f} tokens, {example.labels:.1f} labels"
    rows["an epoch"] = f"{found.examples:,} examples of {each} ({found.origin})"
    # As if every batch were full, which packing comes close to.
    in_step = min(batch / example.tokens, found.examples)  # examples
    steps = config.max_steps or int(np.ceil(config.epochs * found.examples / in_step))
    epochs = steps * in_step / found.examples if config.max_steps else config.epochs
    size = f"{in_step:,.0f} examples, {in_step * example.tokens:,.0f} tokens"
    if model.max_img_size:
        size += f", {in_step * example.images:,.0f} tiles"
    rows["steps"] = f"about {steps:,} of {size}; {epochs:.1f} epochs"
    examples = epochs * found.examples
    rows |= compute(model, config, example, in_step, examples)
    tokens = examples * example.tokens
    share = share_of_preset(model, config, example, in_step)
    rows["predicted"] = prediction(config, pick_device(config.device), tokens, share)
    rows["on an H100"] = compiled_for_h100(config, in_step * example.tokens, tokens, share)
    if config.device_like != "none":
        rows |= memory(model, config, example)
    return rows


def memory(model: VLMConfig, config: TrainConfig, example: Example) -> dict[str, str]:
    """Rows on the token budgets that fit the memory of a GPU of --device-like."""
    name, room, auto = LIKE[config.device_like]
    dtype = auto if config.dtype == "auto" else getattr(torch, config.dtype)

    def budget(tokens: int) -> Budget:
        examples = tokens / example.tokens
        # Of a document of n tokens there are n (n + 1) / 2 pairs.
        length = max(2 * example.pairs / example.tokens - 1, 1.0)
        longest = config.max_seqlen or min(int(2 * length), model.lm_max_position_embeddings)
        return Budget(
            tokens=tokens,
            documents=-(-tokens // longest) + int(tokens / length) + 1,
            images=max(round(examples * example.images), 1),
            labels=max(round(examples * example.labels), 1),
            max_seqlen=longest,
        )

    rows = {}
    adapters = adapter_size(model, config.lora_rank)
    for recompute in ("none", "blocks"):
        # The estimate is a line, of which two points are enough.
        first, second = (
            step_bytes(model, budget(n * POINT), dtype, recompute, frozen_parts(config), adapters)
            for n in (1, 2)
        )

        def trial(tokens: int, first: float = first, second: float = second) -> float:
            return first + (second - first) * (tokens / POINT - 1)

        says = f"{config.tokens_per_batch:,} tokens take {trial(config.tokens_per_batch) / 1e9:.1f}"
        says += f" GB; {most_tokens(config, model, trial, room, budget(1).max_seqlen)}"
        rows[f"--recompute {recompute}"] = f"{says}: an estimate without --compile"
    kind = str(dtype).removeprefix("torch.")
    return {"memory": f"{room / 1e9:.0f} GB of a {name}, in {kind}, a tenth left free", **rows}


def most_tokens(
    config: TrainConfig, model: VLMConfig, trial: Trial, room: float, longest: int
) -> str:
    """The largest token budget in `room` bytes, and how the step keeps its size."""
    try:
        most = largest_budget(trial, room, model, longest)
    except ValueError:
        return "no budget fits"
    if most >= config.tokens_per_batch:
        return f"at most {most:,} fit"
    parts = -(-config.tokens_per_batch * config.accumulate // most)
    return f"at most {most:,} fit (--accumulate {parts} keeps the step's size)"


def optimizer(config: TrainConfig) -> str:
    """Optimizer, learning rates and their schedule."""
    projector = f"{config.lr_projector:g} projector"
    rates = f"{projector}, {config.lr_vision:g} vision, {config.lr_language:g} language"
    schedule = f"{config.warmup:.0%} warm-up, cosine to {config.min_lr:.0%}"
    return f"{config.optimizer}, {rates}; {schedule}"


def frozen_parts(config: TrainConfig) -> list[str]:
    """The parts of the model whose own weights are not trained; adapters freeze the decoder's."""
    rates = {
        "vision_encoder": config.lr_vision,
        "MP": config.lr_projector,
        "decoder": 0.0 if config.lora_rank else config.lr_language,
    }
    return [name for name, rate in rates.items() if not rate]


def flops_of(
    model: VLMConfig, config: TrainConfig, example: Example, in_step: float
) -> dict[str, int]:
    """FLOPs of a step of `in_step` examples by part."""
    return flops_by_part(
        model,
        n_images=round(in_step * example.images),
        n_tokens=round(in_step * example.tokens),
        n_labels=round(in_step * example.labels),
        n_pairs=round(in_step * example.pairs),
        frozen=frozen_parts(config),  # what an adapter itself computes is not counted: it is small
    )


def share_of_preset(
    model: VLMConfig, config: TrainConfig, example: Example, in_step: float
) -> float:
    """A step's FLOPs over those of one that trains what the preset trains.

    Hours come from rates of the preset as it is; adapters and frozen towers take fewer.
    """
    whole = flops_of(model, preset(config.preset)[1], example, in_step)
    return sum(flops_of(model, config, example, in_step).values()) / (sum(whole.values()) or 1)


def by_flops(share: float) -> str:
    """What a line on hours says if the rate in it was not that of such a step; empty if it was."""
    return "" if share == 1 else f", scaled by FLOPs to {share:.0%}"


def compute(
    model: VLMConfig, config: TrainConfig, example: Example, in_step: float, examples: float
) -> dict[str, str]:
    """Rows on tokens, FLOPs and the device's peak; `examples` are those of the whole run."""
    by_part = flops_of(model, config, example, in_step)
    flops = sum(by_part.values())
    in_all = flops / in_step * examples
    rows = {"tokens": f"{examples * example.tokens:,.0f}"}
    of_example = f"{scaled(flops / in_step)} an example"
    rows["FLOPs"] = f"{scaled(flops)} a step, {of_example}, {scaled(in_all)} in all"
    vision, projector, language = (part / flops for part in by_part.values())
    rows["of these"] = f"vision {vision:.1%}, projector {projector:.1%}, language {language:.1%}"
    device = pick_device(config.device)
    if peak := peak_flops(device, pick_dtype(config.dtype, device)):
        hours = in_all / peak / 3600
        rows["at peak"] = f"{hours:.2f} h if {device_name(device)} did nothing else"
    elif flops:
        gpu = LIKE[config.device_like][0] if config.device_like != "none" else H100
        hours = in_all / PEAK_FLOPS[gpu] / 3600
        rows["at peak"] = f"{hours:.2f} h on {gpu} if it did nothing else: a bound, not a forecast"
    return rows


def scaled(flops: float) -> str:
    """Three digits and a unit."""
    power = int(np.log10(max(flops, 1)) // 3)
    return f"{flops / 1000**power:.3g} {['', 'K', 'M', 'G', 'T', 'P', 'E', 'Z'][power]}FLOP"


def parameters(model: VLMConfig) -> str:
    """Parameters of the model, in all and by part."""
    # On the meta device, which allocates nothing: the plan of a large model must fit a laptop.
    with torch.device("meta"):
        built = VisionLanguageModel(model)
    parts = {"vision": built.vision_encoder, "projector": built.MP, "language": built.decoder}
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    by_part = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    return f"{sum(sizes.values()):,} parameters: {by_part}"


def counts(model: VLMConfig, config: TrainConfig) -> Counts:
    """The size of an epoch: known for the recipe's data, measured on local data, else unknown."""
    # First, because the recipe's data would take hours to download for a plan.
    if (known := COUNTS.get((config.data, config.turns))) is not None:
        examples, images, tokens, labels = known
        # As if all examples were as long as their mean.
        pairs = tokens * (tokens + 1) / 2
        return Counts(examples, Example(images, tokens, labels, pairs), "the recipe's counts")
    if not is_local(config.data):
        return Counts(0, None, f"{config.data} is on the hub, and this reads nothing from there")
    everything = load_source(config.data, "train")
    source, held_out = split_off(everything, config.val_samples, config.seed, config.data)
    try:
        tokenizer = make_tokenizer(model, source, local=True)
    except FileNotFoundError as error:
        return Counts(0, None, str(error))
    text = make_text(tokenizer, model, config.turns)
    drawn = even_draw(SampleLoader(source, model, config, text))
    lengths = [len(document) for sample in drawn for document in sample.documents]
    example = Example(
        images=sum(len(sample.images) for sample in drawn) / len(drawn),
        tokens=sum(sample.tokens for sample in drawn) / len(drawn),
        labels=sum(sample.labels for sample in drawn) / len(drawn),
        pairs=sum(length * (length + 1) // 2 for length in lengths) / len(drawn),
    )
    origin = f"measured on {len(drawn):,} of them, {len(held_out):,} more held out"
    return Counts(len(source), example, origin)


def prediction(config: TrainConfig, device: torch.device, tokens: float, share: float = 1) -> str:
    """Hours for so many tokens, at the measured rate of the preset on this device.

    The rate is that of a whole run if one was measured, else that of a bare optimizer step. `share`
    is `share_of_preset`, and so below.
    """
    rates = json.loads(RATES.read_text())
    # A run comes first: its rate includes evaluations, checkpoints and waiting for data.
    for kind, at in (("runs", "at {}"), ("steps", "at a bare step's rate, {}")):
        for measured in rates[kind]:
            where = (measured["device"], measured["preset"])
            if where == (device_name(device), config.preset):
                rate = measured["tokens_per_s"] / share
                speed = at.format(f"{rate:,.0f} tokens/s")
                hours = f"{tokens / rate / 3600:.2f} h {speed}"
                return f"{hours} ({measured['source']}{by_flops(share)})"
    return f"unknown: no run of {config.preset} was measured on {device_name(device)}"


def compiled_for_h100(config: TrainConfig, in_step: float, tokens: float, share: float = 1) -> str:
    """What compiling the preset for an H100 predicts, without having run on one.

    `in_step` and `tokens` are the tokens of a step and of the run.
    """
    for predicted in json.loads(RATES.read_text())["predicted"]:
        if predicted["preset"] == config.preset:
            rate = predicted["tokens_per_s"] / share
            source = f"{predicted['source']}{by_flops(share)}"
            step = f"{1e3 * in_step / rate:,.0f} ms a step"
            hours = f"{tokens / rate / 3600:.2f} h at {rate:,.0f} tokens/s"
            return f"{step}, {hours}: a prediction, not measured ({source})"
    return f"unknown: {config.preset} was not compiled for one"
