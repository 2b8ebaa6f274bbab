"""Generation: the cache changes nothing, prompts of a batch do not see each other, sampling keeps its promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import random_document
from kernel_checks import DEVICE

from nanovlm_fast import reference
from nanovlm_fast.generate import choose, generate
from nanovlm_fast.model import VisionLanguageModel
from nanovlm_fast.ops import choose_ops
from nanovlm_fast.packing import Document

EOS = 0


@pytest.fixture
def model(small_config) -> VisionLanguageModel:
    model = VisionLanguageModel(small_config).eval()
    for parameter in model.parameters():  # far from uniform: a wrong key or position changes the argmax
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def prompts_and_images(config, lengths=(3, 9, 1, 20, 5)) -> tuple[list[Document], torch.Tensor]:
    """One text-only prompt, the others on one image each or, the fourth, on two."""
    rng = np.random.default_rng(1)
    prompts, shown = [], 0
    for i, length in enumerate(lengths):
        n_images = {1: 0, 3: 2}.get(i, 1)
        prompt = random_document(rng, config, n_images, length)
        prompt.image_rows[prompt.image_rows >= 0] += shown * config.image_tokens
        shown += n_images
        prompts.append(prompt)
    return prompts, torch.from_numpy(rng.integers(0, 256, (shown, 3, 32, 32)).astype(np.uint8))


def without_cache(model: VisionLanguageModel, prompt: Document, images: torch.Tensor, steps: int) -> list[int]:
    """Greedy, the whole sequence through the padded reference for every token."""
    config = model.config
    plain = reference.VisionLanguageModel(config)
    plain.load_state_dict(model.reference_state_dict())
    rows = prompt.image_rows[prompt.image_rows >= 0]
    pixels = (images[np.unique(rows // config.image_tokens)].float() / 255 - config.image_mean) / config.image_std
    ids = prompt.input_ids[prompt.image_rows < 0].tolist()
    reply: list[int] = []
    with torch.no_grad():
        for _ in range(steps):
            logits, _ = plain(torch.tensor([ids + reply]), pixels[None] if len(rows) else None)
            token = int(logits[0, -1].argmax())
            if token == EOS:
                break
            reply.append(token)
    return reply


def test_the_cache_gives_the_tokens_of_the_whole_sequence(model):
    prompts, images = prompts_and_images(model.config)
    replies = generate(model, images, prompts, EOS, max_new_tokens=12)
    expected = [without_cache(model, prompt, images, 12) for prompt in prompts]
    assert replies == expected
    assert len({tuple(reply) for reply in replies}) > 2


def test_with_kernels_it_says_the_same(model):
    prompts, images = prompts_and_images(model.config)
    plain = generate(model, images, prompts, EOS, max_new_tokens=5)
    model.ops = choose_ops("all")
    model, images = model.to(DEVICE), images.to(DEVICE)
    assert generate(model, images, prompts, EOS, max_new_tokens=5) == plain


def test_a_prompt_is_answered_alike_alone_and_in_a_batch(model):
    prompts, images = prompts_and_images(model.config)
    together = generate(model, images, prompts, EOS, max_new_tokens=6)
    assert [generate(model, images, [prompt], EOS, max_new_tokens=6)[0] for prompt in prompts] == together


def test_it_runs_under_autocast(model):
    """As the training loop evaluates on a GPU: bfloat16 products, float32 weights."""
    prompts, images = prompts_and_images(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        replies = generate(model, images, prompts, -1, max_new_tokens=3)
    assert [len(reply) for reply in replies] == [3] * len(prompts)


def test_it_stops_at_end_of_sequence_and_goes_on_for_the_others(model):
    prompts, images = prompts_and_images(model.config)
    free = generate(model, images, prompts, -1, max_new_tokens=10)
    eos = free[0][4]
    stopped = generate(model, images, prompts, eos, max_new_tokens=10)
    assert stopped[0] == free[0][: free[0].index(eos)]
    for ours, theirs in zip(stopped, free, strict=True):
        assert ours == (theirs[: theirs.index(eos)] if eos in theirs else theirs)


def test_no_prompts_no_tokens_and_too_long(model):
    prompts, images = prompts_and_images(model.config)
    assert generate(model, images, [], EOS) == []
    assert generate(model, images, prompts, EOS, max_new_tokens=0) == [[]] * len(prompts)
    with pytest.raises(ValueError, match="512 positions"):
        generate(model, images, prompts, EOS, max_new_tokens=600)


def test_sampling_is_reproducible_and_filtered():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]).repeat(2000, 1)

    def seen(**options) -> set[int]:
        settings = dict(temperature=1.0, top_k=0, top_p=1.0, generator=torch.Generator().manual_seed(3)) | options
        return set(choose(logits, **settings).tolist())

    assert seen(temperature=0.0) == {0}
    assert seen() == {0, 1, 2, 3, 4}
    assert seen(top_k=2) == {0, 1}
    assert seen(top_p=0.5) == {0}  # the likeliest token holds 64%
    assert seen(top_p=0.7) == {0, 1}
    assert seen(temperature=0.01) == {0}
    shares = choose(logits, 1.0, 0, 1.0, torch.Generator().manual_seed(0)).bincount(minlength=5) / len(logits)
    assert torch.allclose(shares, logits[0].softmax(-1), atol=0.04)
