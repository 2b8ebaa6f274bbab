"""Model FLOPs against PyTorch's own count of the reference, and what the meter makes of them."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.model import reference
from nanovlm_fast.model.flops import flops_by_part, peak_flops, step_flops
from nanovlm_fast.packing.batch import PackedBatch, pack
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.presets import preset
from nanovlm_fast.reporting.metrics import Meter
from tests.support.samples import SMALL, random_sample

CONFIGS = {
    "small": VLMConfig(**SMALL),
    "small, untied": VLMConfig(**{**SMALL, "lm_tie_weights": False}),
    "tiny": preset("tiny")[0],
    "one layer of 222m": dataclasses.replace(
        preset("nanovlm-222m")[0], vit_n_blocks=1, lm_n_blocks=1
    ),
}
PARTS = ("vision_encoder", "MP", "decoder")


def counted(config: VLMConfig, text: int, frozen: tuple[str, ...] = ()) -> int:
    """FLOPs that PyTorch counts in one document of the reference, forward and backward."""
    model = reference.VisionLanguageModel(config)
    for part in frozen:
        getattr(model, part).requires_grad_(False)
    ids = torch.randint(config.lm_vocab_size, (1, text))
    images = torch.rand(1, 3, config.vit_img_size, config.vit_img_size)
    # Attention as two products: the fused backward computes the first again, which is not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, images, targets=ids)[1].backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", CONFIGS)
def test_step_flops_is_what_pytorch_counts_in_the_reference(name):
    config, text = CONFIGS[name], 11
    tokens = config.image_tokens + text
    # The reference computes the whole square of queries and keys, and the head at every position.
    assert step_flops(config, 1, tokens, text, tokens**2) == counted(config, text)


@pytest.mark.parametrize("frozen", [*((part,) for part in PARTS), PARTS[:2], PARTS[1:], PARTS[::2]])
def test_frozen_parts_leave_out_the_gradients_that_nobody_needs(frozen):
    config, text = CONFIGS["small"], 7
    tokens = config.image_tokens + text
    assert step_flops(config, 1, tokens, text, tokens**2, frozen) == counted(config, text, frozen)


def test_a_nanovlm_sample_costs_159_gflop():
    """49 image and 32 text tokens, 12 labelled: tower 105, language model 52, head 2."""
    config, tokens = preset("nanovlm-222m")[0], 49 + 32
    pairs = tokens * (tokens + 1) // 2
    vision, head = step_flops(config, 1, 0, 0, 0), step_flops(config, 0, 0, 12, 0)
    language = step_flops(config, 0, tokens, 0, pairs)
    assert [vision / 1e9, language / 1e9, head / 1e9] == pytest.approx([105, 52, 2], rel=0.025)
    assert (
        step_flops(config, 1, tokens, 12, pairs)
        == vision + language + head
        == pytest.approx(159e9, rel=0.005)
    )


def test_a_tile_of_512_pixels_costs_213_gflop_forward():
    """A fifth of it is attention over 1,024 patches; the projector's matrix has 12,288 columns."""
    config, _ = preset("nanovlm-460m")
    everything = ("vision_encoder", "MP", "decoder")
    parts = flops_by_part(config, 1, 65, 0, 65 * 66 // 2, everything)
    attention = config.vit_n_blocks * 2 * 2 * config.grid**4 * config.vit_hidden_dim
    assert parts["vision_encoder"] == pytest.approx(213e9, rel=0.01)
    assert attention / parts["vision_encoder"] == pytest.approx(1 / 5, rel=0.1)
    assert parts["MP"] == 2 * 64 * 12_288 * 960


def packed_batch(config: VLMConfig, trimmed: bool = False) -> PackedBatch:
    rng = np.random.default_rng(0)
    samples = [
        random_sample(rng, config, n_images, n) for n_images, n in ((1, 1), (1, 4), (0, 2), (2, 3))
    ]
    batch = pack(samples, Budget(400, 40, 6, 200, 64), config.image_tokens, config.vit_img_size)
    return batch.trimmed() if trimmed else batch


@pytest.mark.parametrize("trimmed", [False, True])
def test_n_pairs_counts_what_the_mask_lets_through(small_config, trimmed):
    batch = packed_batch(small_config, trimmed)
    token = torch.arange(batch.n_tokens)
    document = torch.searchsorted(batch.cu_seqlens, token, right=True)
    allowed = (document[:, None] == document) & (token[:, None] >= token)
    assert batch.n_documents == 10 and batch.n_pairs == int(allowed.sum()) > batch.n_tokens


def read_after(meter: Meter, seconds: float, waited: float = 0.0) -> dict[str, float]:
    """A reading of the meter, as if what it counted had taken `seconds`."""
    meter.since = time.perf_counter() - seconds
    return meter.read(waited)


def test_the_meter_adds_up_and_divides_by_wall_clock(small_config):
    batch = packed_batch(small_config)
    flops = step_flops(small_config, batch.n_images, batch.n_tokens, batch.n_labels, batch.n_pairs)
    meter = Meter(small_config, peak=1e9)
    for _ in range(2):
        meter.add(batch)
    speed = read_after(meter, 100.0, waited=20.0)
    assert speed.keys() == {
        "tokens_per_s", "labels_per_s", "images_per_s", "questions_per_s", "tflops_per_s", "mfu",
        "data_wait", "packing", "image_fill", "label_fill"
    }  # fmt: skip
    expected = {
        "tokens_per_s": 2 * batch.n_tokens / 100,
        "labels_per_s": 2 * batch.n_labels / 100,
        "images_per_s": 2 * batch.n_images / 100,
        "questions_per_s": 2 * batch.n_documents / 100,
        "tflops_per_s": 2 * flops / 100 / 1e12,
        "mfu": 2 * flops / 100 / 1e9,
        "data_wait": 0.2,
        "packing": batch.n_tokens / 400,
        "image_fill": batch.n_images / len(batch.images),
        "label_fill": batch.n_labels / len(batch.labels),
    }
    assert speed == pytest.approx(expected, rel=1e-3)
    assert read_after(meter, 1.0)["mfu"] == 0, "a reading starts again"


def test_what_is_not_trained_costs_nothing(small_config):
    batch = packed_batch(small_config)
    whole, frozen = Meter(small_config), Meter(small_config, frozen=("vision_encoder",))
    for meter in (whole, frozen):
        meter.add(batch)
        meter.add(dataclasses.replace(batch, n_labels=0))  # the training loop skips it
    assert whole.flops == step_flops(
        small_config, batch.n_images, batch.n_tokens, batch.n_labels, batch.n_pairs
    )
    assert frozen.flops < whole.flops


def test_no_peak_no_mfu(small_config, monkeypatch):
    assert "mfu" not in Meter(small_config).read(0.0)
    gpu, names = (
        torch.device("cuda"),
        iter(["NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]),
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    assert (
        peak_flops(torch.device("cpu"), torch.bfloat16) is None
        and peak_flops(gpu, torch.float32) is None
    )
    assert peak_flops(gpu, torch.bfloat16) == 989e12 and peak_flops(gpu, torch.bfloat16) is None
