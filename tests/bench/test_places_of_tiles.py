"""The benches of tiles: batches are full, ranks are even, and a plain run still reports both."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench.pages.readme import overview
from bench.pages.sections import suites_page
from bench.subjects.workload import finevision_like
from bench.tiles import balance
from nanovlm_fast.data.budget import useful_share, with_best_images
from nanovlm_fast.packing.documents import Document, Sample
from nanovlm_fast.packing.packer import Budget, Packer
from nanovlm_fast.presets import preset


def test_batches_of_tiles_are_full_and_ranks_even(tmp_path, capsys):
    options = ["--steps", "4", "--ranks", "4", "--out", str(tmp_path)]
    assert balance.main(options) == 0
    (file,) = tmp_path.glob("*/balance.json")
    result = json.loads(file.read_text())
    assert result["filled"]["images"] >= 0.97 and result["filled"]["tokens"] > 0.85
    assert result["slowest_over_mean"]["most"] <= 0.03 and result["left_out"] < 0.01
    assert "of them empty" in capsys.readouterr().out
    assert balance.main(["--preset", "tiny", "--out", str(tmp_path)]) == 1


def sample(number: int, images: int, tokens: int) -> Sample:
    ids = np.zeros(tokens, np.int64)
    document = Document(ids, np.full(tokens, -1, np.int32), ids)
    zeros = np.broadcast_to(np.zeros((), np.uint8), (images, 3, 8, 8))
    return Sample(f"{number}", zeros, [document], key=number)


def test_no_sample_waits_for_ever_and_none_is_lost():
    rng = np.random.default_rng(0)
    packer = Packer(Budget(tokens=2000, documents=40, images=30, labels=2000, max_seqlen=2000))
    waiting = [
        sample(number, int(rng.choice([0, 5, 9, 13, 17])), int(rng.integers(50, 400)))
        for number in range(400)
    ]
    taken: list[int] = []
    while waiting or packer.buffer:
        while waiting and len(packer.buffer) < 24:
            packer.buffer.append(waiting.pop(0))
        oldest = packer.buffer[0].key
        batch = packer.next()
        assert batch[0].key == oldest, "the oldest is always taken"
        assert sum(len(one.images) for one in batch) <= 30
        assert sum(one.tokens for one in batch) <= 2000
        taken += [one.key for one in batch]
    assert sorted(taken) == list(range(400))


def test_samples_of_one_image_are_packed_as_ever():
    """The knapsack is for several images: committed results rest on the order of the others."""
    rng = np.random.default_rng(0)
    samples = [sample(i, int(rng.integers(2)), int(rng.integers(50, 400))) for i in range(60)]
    budget = Budget(tokens=1000, documents=20, images=8, labels=1000, max_seqlen=500)
    packer = Packer(budget)
    packer.buffer = list(samples)
    by_hand: list[int] = []
    tokens = images = 0
    for place in range(60):
        one = samples[place]
        if tokens + one.tokens > 1000 or images + len(one.images) > 8:
            break
        by_hand.append(place)
        tokens, images = tokens + one.tokens, images + len(one.images)
    for place in sorted(range(len(by_hand), 60), key=lambda i: -samples[i].tokens):
        one = samples[place]
        if tokens + one.tokens <= 1000 and images + len(one.images) <= 8:
            by_hand.append(place)
            tokens, images = tokens + one.tokens, images + len(one.images)
    assert [one.key for one in packer.next()] == by_hand


def test_places_for_tiles_are_fewer_than_the_average_needs():
    model, train = preset("nanovlm-460m")
    samples = finevision_like(model, 1000, blank=True)
    plain = Budget.measure(samples, train.tokens_per_batch, 8192, 128)
    best = with_best_images(plain, samples, train.look_ahead, image_cost=300.0)
    shares = [useful_share(one, samples, train.look_ahead, 300.0) for one in (plain, best)]
    assert best.images < plain.images and shares[1] > shares[0] + 0.005
    assert best.images >= max(len(one.images) for one in samples)


@pytest.mark.slow
def test_the_run_with_tiles_and_the_run_without_are_both_reported(tmp_path, capfd):
    from bench.tiles import legible

    short = "--epochs 0.002 --val-samples 1 --data synthetic:256 --curriculum= --max-steps 2"
    sizes = "--vit-hidden-dim 32 --vit-n-blocks 1 --lm-hidden-dim 32 --lm-n-blocks 1"
    assert legible.main(["--out", str(tmp_path), "--", *short.split(), *sizes.split()]) == 0
    (file,) = tmp_path.glob("*/tiny_split.json")
    result = json.loads(file.read_text())
    assert result["tiles"]["questions"] == result["square"]["questions"] > 0
    assert "canvases seen as" in capfd.readouterr().out
    assert len(list(file.parent.glob("tiny_split_*_samples.png"))) == 2
    page = suites_page(tmp_path)
    assert "### tiny_split" in page and page.count("_samples.png)") == 2
    assert f"in tiles **{result['tiles']['sees']:.1%}** · squashed" in overview(tmp_path)
