"""Generation: the cache, the independence of prompts in a batch, and sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.generate import choose, decode, generate, generator_of, prefill
from nanovlm_fast.model import reference
from nanovlm_fast.model.ops import choose_ops
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.documents import Document
from tests.support.kernel_checks import DEVICE
from tests.support.samples import SMALL, random_document

EOS = 0


@pytest.fixture
def model(small_config) -> VisionLanguageModel:
    model = VisionLanguageModel(small_config).eval()
    for (
        parameter
    ) in model.parameters():  # far from uniform: a wrong key or position changes the argmax
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def prompts_and_images(config, lengths=(3, 9, 1, 20, 5)) -> tuple[list[Document], torch.Tensor]:
    """One prompt of text alone; the others have one image each, and the fourth has two."""
    rng = np.random.default_rng(1)
    prompts, shown = [], 0
    for i, length in enumerate(lengths):
        n_images = {1: 0, 3: 2}.get(i, 1)
        prompt = random_document(rng, config, n_images, length)
        prompt.image_rows[prompt.image_rows >= 0] += shown * config.image_tokens
        shown += n_images
        prompts.append(prompt)
    return prompts, torch.from_numpy(rng.integers(0, 256, (shown, 3, 32, 32)).astype(np.uint8))


def without_cache(
    model: VisionLanguageModel, prompt: Document, images: torch.Tensor, steps: int
) -> list[int]:
    """Greedy decoding that runs the whole sequence through the padded reference for every token."""
    config = model.config
    plain = reference.VisionLanguageModel(config)
    plain.load_state_dict(model.reference_state_dict())
    rows = prompt.image_rows[prompt.image_rows >= 0]
    pixels = (
        images[np.unique(rows // config.image_tokens)].float() / 255 - config.image_mean
    ) / config.image_std
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


def test_tokens_are_told_as_they_come(model):
    prompts, images = prompts_and_images(model.config)
    told: list[list[int]] = [[] for _ in prompts]
    replies = generate(
        model, images, prompts, EOS, 6, on_token=lambda prompt, token: told[prompt].append(token)
    )
    assert told == replies and any(replies)
    seen = []

    def leave(_: int, token: int) -> None:
        seen.append(token)
        if len(seen) == 3:
            raise ConnectionError

    with pytest.raises(ConnectionError):
        generate(model, images, prompts[:1], EOS, 400, on_token=leave)
    assert len(seen) == 3


def test_with_kernels_it_says_the_same(model):
    prompts, images = prompts_and_images(model.config)
    plain = generate(model, images, prompts, EOS, max_new_tokens=5)
    model.ops = choose_ops("all")
    model, images = model.to(DEVICE), images.to(DEVICE)
    assert generate(model, images, prompts, EOS, max_new_tokens=5) == plain


def test_a_prompt_is_answered_alike_alone_and_in_a_batch(model):
    prompts, images = prompts_and_images(model.config)
    together = generate(model, images, prompts, EOS, max_new_tokens=6)
    assert [
        generate(model, images, [prompt], EOS, max_new_tokens=6)[0] for prompt in prompts
    ] == together


def replies_in_groups(model, images, prompts, limits, groups, **options) -> list[list[int]]:
    """The reply to every prompt, where the prompts of a group are asked in one batch."""
    replies: list[list[int]] = [[] for _ in prompts]
    generators = options.pop("generators", None)
    for group in groups:
        asked = [prompts[i] for i in group]
        if generators:
            options["generator"] = [generators[i] for i in group]
        said = generate(model, images, asked, EOS, [limits[i] for i in group], **options)
        for i, reply in zip(group, said, strict=True):
            replies[i] = reply
    return replies


def closest_call(model, prompt: Document, images, reply: list[int]) -> float:
    """The smallest lead of a reply's token in the logits of one forward pass over all of it."""
    config = model.config
    whole = reference.VisionLanguageModel(config)
    whole.load_state_dict(model.reference_state_dict())
    rows = prompt.image_rows[prompt.image_rows >= 0]
    shown = images[np.unique(rows // config.image_tokens)].float() / 255
    pixels = (shown - config.image_mean) / config.image_std
    text = torch.tensor([[*prompt.input_ids[prompt.image_rows < 0].tolist(), *reply[:-1]]])
    with torch.no_grad():
        logits = whole(text, pixels[None] if len(rows) else None)[0][0, -len(reply) :]
    assert logits.argmax(-1).tolist() == reply
    first, second = logits.topk(2).values.unbind(-1)
    return (first - second).min().item()


def test_a_reply_does_not_depend_on_what_shares_its_batch(model):
    """Any grouping gives the same replies, also beside a prompt with room for few tokens."""
    positions = model.config.lm_max_position_embeddings
    lengths = (3, 9, 1, 20, 5, positions - 4 - 8, 2, 12)
    prompts, images = prompts_and_images(model.config, lengths)
    limits = [min(12 + 3 * i, positions - len(prompt)) for i, prompt in enumerate(prompts)]
    everybody = range(len(prompts))
    alone = replies_in_groups(model, images, prompts, limits, [[i] for i in everybody])
    ended = [len(reply) < limit for reply, limit in zip(alone, limits, strict=True)]
    assert limits[5] == len(alone[5]) == 8 and 0 < sum(ended) < 4, "both kinds of end"
    leads = [closest_call(model, prompts[i], images, alone[i]) for i in everybody]
    assert min(leads) > 0.001, "no close call: rounding, which a batch changes, cannot turn a token"
    drawn = None
    rng = np.random.default_rng(0)
    for _ in range(6):
        cuts = np.sort(rng.choice(np.arange(1, 8), int(rng.integers(0, 5)), replace=False))
        groups = [group.tolist() for group in np.split(rng.permutation(8), cuts)]
        assert replies_in_groups(model, images, prompts, limits, groups) == alone, groups
        own = [generator_of(images.device, 3, i) for i in everybody]
        sampling = dict(temperature=2.0, generators=own)
        said = replies_in_groups(model, images, prompts, limits, groups, **sampling)
        drawn = drawn or said
        assert said == drawn and said != alone, groups


def test_the_cache_gives_the_logits_of_one_whole_forward():
    """16 rows over 1,000 positions: prompts of mixed lengths, then one token at a time."""
    rows, positions = 16, 1000
    config = VLMConfig(**{**SMALL, "lm_max_position_embeddings": positions, "lm_n_blocks": 2})
    model = VisionLanguageModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    plain = reference.VisionLanguageModel(config)
    plain.load_state_dict(model.reference_state_dict())
    ids = torch.randint(0, config.lm_vocab_size, (rows, positions))
    lengths = torch.linspace(1, 60, rows).long()
    prompts = []
    for row, length in zip(ids, lengths, strict=True):
        prompt = random_document(np.random.default_rng(0), config, 0, int(length))
        prompt.input_ids[:] = row[:length]
        prompts.append(prompt)
    every = torch.arange(rows)
    logits = torch.full((rows, positions, config.lm_vocab_size), float("nan"))
    with torch.inference_mode():
        whole, _ = plain(ids, None)
        no_images = torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
        cache, hidden = prefill(model, no_images, prompts, positions)
        logits[every, cache.lengths - 1] = model.decoder.head(hidden)
        for _ in range(positions - 1):
            at = cache.lengths  # a row that is done stays at its last position
            hidden = decode(model, cache, ids[every, at], (at < positions - 1).long())
            logits[every, at] = model.decoder.head(hidden)
    chosen_by = torch.arange(positions) >= lengths[:, None] - 1
    apart = (logits - whole)[chosen_by].abs().max() / whole.abs().max()
    assert apart < 1e-5 and chosen_by.sum() > 15_000


def test_it_runs_under_autocast(model):
    """The training loop evaluates like this on a GPU: bfloat16 products, float32 weights."""
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
    with pytest.raises(ValueError, match="prompt 2 of 9 tokens and 504 new ones are over"):
        generate(model, images, prompts, EOS, [1, 504, 1, 1, 1])
    full, _ = prompts_and_images(model.config, (3, 512))
    alone = generate(model, images, full[:1], -1, 2)
    assert generate(model, images, full, -1, [2, 0]) == [*alone, []]


def test_sampling_is_reproducible_and_filtered():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]).repeat(2000, 1)

    def seen(**options) -> set[int]:
        settings = (
            dict(temperature=1.0, top_k=0, top_p=1.0, generator=torch.Generator().manual_seed(3))
            | options
        )
        return set(choose(logits, **settings).tolist())

    assert seen(temperature=0.0) == {0}
    assert seen() == {0, 1, 2, 3, 4}
    assert seen(top_k=2) == {0, 1}
    assert seen(top_p=0.5) == {0}  # the likeliest token holds 64%
    assert seen(top_p=0.7) == {0, 1}
    assert seen(temperature=0.01) == {0}
    shares = choose(logits, 1.0, 0, 1.0, torch.Generator().manual_seed(0)).bincount(
        minlength=5
    ) / len(logits)
    assert torch.allclose(shares, logits[0].softmax(-1), atol=0.04)
