"""How much of its attention a reply gives to each part of the pictures.

The weights are those of plain attention, softmax(q k / sqrt(D)), computed from the queries and keys
of one forward pass over prompt and reply.

Shapes: T tokens, R of them that are asked for, I image tokens of all pictures, D head size. A
picture of r x c tiles, with k x k tokens per tile, has a map of (r k, c k).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data.images import Grid, tiles_of
from nanovlm_fast.model.packed import Rotate, VisionLanguageModel
from nanovlm_fast.packing.documents import IGNORE, Document


def with_reply(prompt: Document, reply: Sequence[int]) -> tuple[Document, list[int]]:
    """Return prompt and reply as one document, and the position that chose each token of the reply.

    The last token is left out, as it chose none that was kept. The last position of the prompt
    chose the first token; it alone is returned for an empty reply.
    """
    read = np.array(reply[:-1], np.int64)
    document = Document(
        np.concatenate([prompt.input_ids, read]),
        np.concatenate([prompt.image_rows, np.full(len(read), -1, np.int32)]),
        np.full(len(prompt) + len(read), IGNORE, np.int64),
    )
    return document, list(range(len(prompt) - 1, len(document)))


@torch.inference_mode()
def attention_to_images(
    model: VisionLanguageModel, images: Tensor, document: Document, positions: Sequence[int]
) -> Tensor:
    """Return (layers, R, I): the share of attention that positions give to each image token.

    Averaged over heads, in float32. What is missing to a sum of 1 over I goes to text.

    Args:
        images: (N, 3, H, W) uint8, the tiles that the document's `image_rows` index.
        positions: R positions in the document.
    """
    device = images.device
    rows = torch.tensor(positions, device=device)
    image_rows = torch.from_numpy(document.image_rows).to(device)
    shown = torch.from_numpy(np.nonzero(document.image_rows >= 0)[0]).to(device)
    shown = shown[image_rows[shown].argsort()]
    length = len(document)
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=device)
    layers: list[Tensor] = []

    def attend(layer: int, qkv: Tensor, rotate: Rotate) -> Tensor:
        q, k, v = rotate(qkv)
        layers.append(attention_weights(q[rows], k, rows)[:, :, shown].mean(0))
        return model.ops.attention(q, k, v, cu_seqlens, length, True).flatten(1)

    ids = torch.from_numpy(document.input_ids).to(device)
    x, _ = model.embed(ids, image_rows, images)
    position_ids = torch.arange(length, dtype=torch.int32, device=device)
    model.decoder(model.ops, x, position_ids, attend, rows)
    return torch.stack(layers)


def attention_weights(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Return (n_heads, R, T) causal attention of the positions `rows` (R,), in float32.

    q (R, n_heads, D) are theirs, k (T, n_kv_heads, D) those of all positions; both are rotated.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("rhd,thd->hrt", q.float(), k.float()) / math.sqrt(q.shape[-1])
    later = torch.arange(len(k), device=k.device) > rows[:, None]
    return scores.masked_fill(later, float("-inf")).softmax(-1)


def on_pictures(weights: np.ndarray, grids: Sequence[Grid], config: VLMConfig) -> list[np.ndarray]:
    """Lay (..., I) weights of image tokens over the pictures: (..., r k, c k) for each.

    Every picture is stretched to its tiles, so a map covers it from edge to edge. A token of the
    tile that shows the whole picture covers r x c places of the map and is divided among them, so
    sums stay what they were.
    """
    side = config.grid // config.mp_pixel_shuffle_factor
    weights = weights.reshape(*weights.shape[:-1], -1, side, side)  # (..., tiles, k, k)
    maps = []
    first = 0
    for rows, columns in grids:
        count = tiles_of((rows, columns), config)
        tiles = weights[..., first : first + count, :, :]
        first += count
        cut = tiles[..., count - rows * columns :, :, :]
        laid = cut.reshape(*cut.shape[:-3], rows, columns, side, side).swapaxes(-3, -2)
        laid = laid.reshape(*cut.shape[:-3], rows * side, columns * side)
        if count > rows * columns:
            whole = tiles[..., 0, :, :] / (rows * columns)
            laid = laid + whole.repeat(rows, axis=-2).repeat(columns, axis=-1)
        maps.append(laid)
    return maps
