"""The work that benches draw for models with tiles, and that both sides of a step compute it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from bench.peer import pack_of
from bench.subjects.variants import Judge, Packed, Padded, Recipe, Workbench
from bench.subjects.workload import Work, default_data, finevision_like
from nanovlm_fast.config import VLMConfig, fields_of
from nanovlm_fast.packing.documents import IGNORE
from nanovlm_fast.presets import preset
from tests.support.tiles import GENERATIONS

CONFIG = VLMConfig(**fields_of(VLMConfig, GENERATIONS["230M-8k"]))


def test_conversations_have_the_means_of_finevision():
    config, _ = preset("nanovlm-460m")
    samples = finevision_like(config, 2000, blank=True)
    tiles = np.array([len(sample.images) for sample in samples])
    lengths = np.array([sample.tokens for sample in samples])
    labels = np.array([sample.labels for sample in samples])
    # 0.72 images of 12.6 tiles: 640 x 480 gives 13, a square 17, 2 : 1 gives 9
    assert tiles.mean() == pytest.approx(0.72 * 13.2, rel=0.05)
    assert labels.mean() == pytest.approx(417 + 4 * 3.75, rel=0.15)
    assert (lengths >= 65 * tiles).all() and lengths.max() <= 8192
    assert all(sample.images.strides == (0, 0, 0, 0) for sample in samples[:50])


def test_it_is_deterministic_and_its_image_tokens_stand_among_the_text():
    one, again = (finevision_like(CONFIG, 30, seed=4) for _ in range(2))
    base = CONFIG.lm_vocab_size - len(CONFIG.vlm_extra_tokens)
    for sample, same in zip(one, again, strict=True):
        document = sample.documents[0]
        assert np.array_equal(sample.images, same.images)
        assert np.array_equal(document.input_ids, same.documents[0].input_ids)
        shown = document.image_rows >= 0
        assert shown.sum() == len(sample.images) * CONFIG.image_tokens
        assert (document.input_ids[shown] == base).all()
        real = document.labels != IGNORE
        assert (
            np.array_equal(document.labels[real], document.input_ids[1:][real[:-1]])
            and not (real & shown).any()
        )
    with pytest.raises(ValueError, match="which this model does not take"):
        finevision_like(VLMConfig(), 1)


def test_every_preset_has_data_that_needs_no_network():
    assert default_data("tiny") == "easy_vqa"
    assert default_data("nanovlm-222m") == "cauldron_like"
    assert default_data("nanovlm-230m") == "finevision_like"


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(packing=False, labelled_head=False)])
def test_our_step_on_tiles_is_the_reference_s(recipe):
    config = dataclasses.replace(CONFIG, lm_max_position_embeddings=8192)
    samples = finevision_like(config, 5, seed=1)
    assert len({len(sample.images) for sample in samples}) > 1
    bench = Workbench(Work(config, samples), torch.device("cpu"), torch.float32)
    padded = Padded(bench)
    judge = Judge(padded, torch.float32, tolerance=1e-4)
    assert judge(Packed(bench, recipe))["passed"]
    loss, _ = padded.gradients()  # all rows at once, padded, against one row at a time
    assert loss == pytest.approx(judge.loss, rel=1e-5)


def test_several_questions_share_an_image_here_and_bring_their_own_to_main():
    (sample,) = finevision_like(CONFIG, 1, seed=2, questions=8)
    assert len(sample.documents) == 8 and len(sample.images) > 1
    work = Work(CONFIG, [sample])
    rows = pack_of(work)
    assert rows["input_ids"].shape == (1, work.counts["tokens"] + 8)
    assert (rows["attention_mask"] == 0).sum() == 8
    assert (rows["targets"] >= 0).sum() == work.counts["labels"]
    assert rows["pixels"].shape[0] == 8 * len(sample.images) == 8 * work.counts["images"]
    shown = (rows["input_ids"] == rows["image_token"]).sum()
    assert shown == rows["pixels"].shape[0] * CONFIG.image_tokens


def test_a_document_fits_the_models_positions():
    small = dataclasses.replace(CONFIG, lm_max_position_embeddings=140)
    lengths = [sample.tokens for sample in finevision_like(small, 40, seed=3, questions=1)]
    assert max(lengths) <= 140
