"""What the page draws: the model's attention, and where it lies on the pictures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from nanovlm_fast.chat.answer import Answerer
from nanovlm_fast.chat.attention import attention_to_images, on_pictures, with_reply
from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data.images import split_image
from nanovlm_fast.data.samples import load_tiles
from nanovlm_fast.model import reference
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.documents import Document
from tests.support.pictures import encoded, photograph
from tests.support.samples import SMALL, random_document
from tests.support.tiles import TILES, load_generation, token_names


def by_the_reference(
    model: VisionLanguageModel, images: torch.Tensor, document: Document, positions: list[int]
) -> torch.Tensor:
    """(layers, R, I): softmax(q k) of the padded reference, whose layers give the same output."""
    plain = reference.VisionLanguageModel(model.config)
    plain.load_state_dict(model.reference_state_dict())
    layers = []

    def look(attn: reference.LanguageAttention, given: tuple, output: torch.Tensor) -> None:
        x, cos, sin, mask = given
        shape = (1, x.shape[1], -1, attn.head_dim)
        parts = [proj(x).view(shape).transpose(1, 2) for proj in (attn.q_proj, attn.k_proj)]
        q, k = (reference.rotate(part, cos, sin) for part in parts)
        v = attn.v_proj(x).view(shape).transpose(1, 2)
        k, v = (part.repeat_interleave(attn.n_heads // attn.n_kv_heads, 1) for part in (k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(attn.head_dim)
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        attended = (weights @ v).transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)
        torch.testing.assert_close(attn.out_proj(attended), output)
        layers.append(weights[0].mean(0))

    for block in plain.decoder.blocks:
        block.attn.register_forward_hook(look)
    rows = torch.from_numpy(document.image_rows)[None].long()
    pixels = reference.normalise(images, model.config)
    with torch.no_grad():
        plain(torch.from_numpy(document.input_ids)[None], pixels, None, None, rows)
    shown = torch.from_numpy(np.nonzero(document.image_rows >= 0)[0])
    return torch.stack(layers)[:, positions][:, :, shown]


def test_it_is_the_attention_of_the_reference(tmp_path):
    """A conversation about two pictures of several tiles, and the reply to it."""
    model, tokenizer = load_generation(tmp_path, "460M-8k, not enlarged")
    answerer = Answerer(model, tokenizer, torch.device("cpu"), 8, (4, True))
    pictures = [encoded(photograph(70, 40), "PNG"), encoded(photograph(30, 90), "PNG")]
    tiles, grids = load_tiles(pictures, model.config)
    assert len(set(grids)) == 2 and len(tiles) > 6
    turns = [("a red cat", "two dogs"), ("what is it?", "")]
    document, positions = with_reply(answerer.text.document(turns, grids), [5, 70, 91, 7])
    assert len(positions) == 4 and document.input_ids[-3:].tolist() == [5, 70, 91]
    images = torch.from_numpy(tiles)
    found = attention_to_images(model, images, document, positions)
    expected = by_the_reference(model, images, document, positions)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert found.std() > 1e-3, "not all the same"
    for maps in (found.mean(1), found.mean(0)):
        drawn = on_pictures(maps.numpy(), grids, model.config)
        total = sum(one.sum((1, 2)) for one in drawn)
        assert (total <= 1 + 1e-5).all() and (total > 0.01).all()
        np.testing.assert_allclose(total, maps.sum(-1), rtol=1e-5)


def test_it_is_that_of_a_model_without_tiles(small_config):
    model = VisionLanguageModel(small_config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    rng = np.random.default_rng(0)
    prompt = random_document(rng, small_config, 1, 6)
    images = torch.from_numpy(rng.integers(0, 256, (1, 3, 32, 32)).astype(np.uint8))
    for reply, count in (([], 1), ([3], 1), ([3, 4], 2)):
        document, positions = with_reply(prompt, reply)
        assert len(positions) == count and positions[0] == len(prompt) - 1
        found = attention_to_images(model, images, document, positions)
        assert found.shape == (3, count, small_config.image_tokens)
        expected = by_the_reference(model, images, document, positions)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


CUT = VLMConfig(
    **{
        **SMALL,
        "lm_vocab_size": 400,
        "vit_img_size": 64,
        **{name: TILES[name] for name in ("vlm_extra_tokens", "resize_to_max_side_len")},
        "max_img_size": 256,
        "lm_chat_template": "x",
    }
)


@pytest.mark.parametrize("size", [(256, 128), (128, 256), (192, 256)])
@pytest.mark.parametrize("whole_too", [True, False], ids=["and whole", "tiles alone"])
def test_a_planted_token_lights_up_its_rectangle(size, whole_too):
    """The token is found by drawing: a white rectangle on black, cut as a picture is."""
    names = token_names()
    if not whole_too:
        del names["global_image_token"]
    config = VLMConfig(**{**vars(CUT), "vlm_extra_tokens": names})
    cell = config.vit_patch_size * config.mp_pixel_shuffle_factor
    width, height = size
    rng = np.random.default_rng(width)
    for _ in range(6):
        x = int(rng.integers(width // cell))
        y = int(rng.integers(height // cell))
        picture = Image.new("RGB", size)
        picture.paste("white", (x * cell, y * cell, (x + 1) * cell, (y + 1) * cell))
        tiles, grid = split_image(picture, config)
        several = tiles[1:] if whole_too else tiles
        weights = np.zeros(len(tiles) * config.image_tokens)
        weights[whole_too * config.image_tokens + token_of(several, cell)] = 0.7
        (drawn,) = on_pictures(weights, [grid], config)
        expected = np.zeros((height // cell, width // cell))
        expected[y, x] = 0.7
        np.testing.assert_array_equal(drawn, expected)


def token_of(tiles: np.ndarray, cell: int) -> int:
    """The token under the white pixels: tiles one after the other, in each row by row."""
    side = tiles.shape[-1] // cell
    ((tile, row, column),) = {
        (tile, row // cell, column // cell)
        for tile, row, column in np.argwhere(tiles.min(1) == 255).tolist()
    }
    return (tile * side + row) * side + column


def test_a_token_of_the_whole_picture_is_divided_among_what_it_covers():
    side = CUT.grid // CUT.mp_pixel_shuffle_factor
    weights = np.zeros((2, 9 * CUT.image_tokens))
    weights[1, 1 * side + 2] = 0.8  # second row, third column of the tile that shows all
    (drawn,) = on_pictures(weights, [(2, 4)], CUT)
    assert drawn.shape == (2, 2 * side, 4 * side) and not drawn[0].any()
    rows, columns = np.nonzero(drawn[1])
    assert (min(rows), max(rows), min(columns), max(columns)) == (2, 3, 8, 11)
    np.testing.assert_allclose(drawn[1][drawn[1] > 0], 0.1)


@pytest.mark.parametrize("name", ["packed", "reference"])
def test_tokens_come_row_by_row(small_config, name):
    """What `on_pictures` takes for granted: each token merges neighbouring patches of its place."""
    config = small_config
    factor = config.mp_pixel_shuffle_factor
    model = {"packed": VisionLanguageModel, "reference": reference.VisionLanguageModel}[name](
        config
    )
    for row in range(config.grid):
        for column in range(config.grid):
            x = torch.zeros(1, config.grid**2, config.vit_hidden_dim)
            x[0, row * config.grid + column] = 1
            out = model.MP(model.ops, x) if name == "packed" else model.MP(x)[0]
            (lit,) = torch.nonzero(out.abs().sum(-1)).flatten().tolist()
            assert lit == row // factor * (config.grid // factor) + column // factor
