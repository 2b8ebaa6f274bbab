"""Our side of the conversations that bench.peer compares with nanoVLM's main.

Without its checkout the padded reference takes its place, with image tokens where they stand.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench import peer
from bench.peers import conversations
from bench.peers.conversations import CASES, CONFIG, batch_of, differences, leaky, make_case, step
from nanovlm_fast.data.chat import make_text
from nanovlm_fast.model import reference
from nanovlm_fast.packing.batch import pad_whole
from nanovlm_fast.packing.documents import IGNORE, Sample


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Our model, the reference with its weights, and our sample of each case."""
    model, tokenizer = conversations.small_model(CONFIG)
    plain = reference.VisionLanguageModel(CONFIG)
    plain.load_state_dict(model.reference_state_dict())
    text = make_text(tokenizer, CONFIG, "chat")
    folder = tmp_path_factory.mktemp("cases")
    samples = [make_case(folder, i, case, text, CONFIG) for i, case in enumerate(CASES)]
    return model, plain, samples


def outcome(plain: reference.VisionLanguageModel, logits, targets) -> dict[str, torch.Tensor]:
    """What `step` returns, of the reference's logits (S, V) and targets (S,)."""
    plain.zero_grad()
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE)
    loss.backward()
    grads = {
        f"grad:{name}": torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in plain.named_parameters()
    }
    return {"loss": loss.detach(), "logits": logits[targets != IGNORE].detach(), **grads}


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_each_conversation_is_what_the_reference_makes_of_it(sides, number):
    model, plain, samples = sides
    sample = samples[number]
    counts = {"no image": 0, "one tile": 1, "a 3 x 4 grid": 13, "two images": 14, "three turns": 13}
    assert len(sample.images) == counts[CASES[number].name]
    rows = pad_whole([(sample, sample.documents[0])])
    pixels = reference.normalise(rows.images, CONFIG) if len(rows.images) else None
    logits, _ = plain(rows.input_ids, pixels, rows.attention_mask, None, rows.image_rows)
    theirs = outcome(plain, logits[0], rows.targets[0])
    found = differences(step(model, batch_of([sample])), theirs, theirs["loss"].item())
    assert max(found.values()) < conversations.TOLERANCE, found


def packed_by_main(plain: reference.VisionLanguageModel, samples: list[Sample]) -> tuple:
    """Logits (S, V) and targets (S,) of a pack in which samples see each other.

    A pad token stands behind each, which nothing attends to and which counts as a position.
    """
    ids, rows, targets, real, shown = [], [], [], [], 0
    for sample in samples:
        (document,) = sample.documents
        own = document.image_rows.astype(np.int64)
        ids += [*document.input_ids, 2]
        rows += [*np.where(own >= 0, own + shown, -1), -1]
        targets += [*document.labels, IGNORE]
        real += [True] * len(document) + [False]
        shown += int((own >= 0).sum())
    images = torch.from_numpy(np.concatenate([sample.images for sample in samples]))
    tokens = plain.MP(plain.vision_encoder(reference.normalise(images, CONFIG))).flatten(0, 1)
    image_rows = torch.tensor(rows)
    x = plain.decoder.token_embedding(torch.tensor(ids))
    x = torch.where(image_rows[:, None] >= 0, tokens[image_rows.clamp(min=0)], x)[None]
    cos, sin = plain.decoder.rotary_embd(torch.arange(len(ids))[None])
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril() & torch.tensor(real)
    mask |= torch.eye(len(ids), dtype=torch.bool)
    for block in plain.decoder.blocks:
        x = block(x, cos, sin, mask[None, None])
    return plain.decoder.head(plain.decoder.norm(x))[0], torch.tensor(targets)


def test_the_leaky_pack_is_that_of_main_and_ours_is_not(sides):
    model, plain, samples = sides
    theirs = outcome(plain, *packed_by_main(plain, samples))
    batch = batch_of(samples)
    leaking = differences(step(model, leaky(batch)), theirs, theirs["loss"].item())
    isolated = differences(step(model, batch), theirs, theirs["loss"].item())
    assert max(leaking.values()) < conversations.TOLERANCE, leaking
    assert min(isolated.values()) > 1e-3, isolated


def test_a_difference_is_found(sides):
    model, _, samples = sides
    mine = step(model, batch_of(samples[2:3]))
    for name in ("logits", "grad:MP.proj.weight"):
        changed = {**mine, name: mine[name] * 1.0001}
        found = differences(mine, changed, mine["loss"].item())
        assert max(found.values()) > conversations.TOLERANCE
    with pytest.raises(ValueError, match="not of the same weights"):
        differences(mine, {**mine, "grad:other": mine["loss"]}, 1.0)


def test_a_checkout_without_tiles_or_that_breaks_is_one_line(tmp_path, capsys):
    for file in ("models/config.py", "models/vision_language_model.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("")
    options = ["--nanovlm", str(tmp_path), "--conversations"]
    assert peer.main(options) == 1
    assert "is of a release without tiles" in capsys.readouterr().err
    for file in conversations.NEEDED:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("")
    (tmp_path / "models/vision_language_model.py").write_text("raise ImportError('no torchvision')")
    assert peer.main(options) == 1
    error = capsys.readouterr().err
    assert "nanoVLM's conversations: ImportError: no torchvision" in error
    assert error.count("\n") == 1
