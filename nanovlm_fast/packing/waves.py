"""How well a token budget fills a GPU.

A matrix product is cut into tiles of its result, one per streaming multiprocessor (SM) at a time. A
product of 486 tiles on the 132 SMs of an H100 takes four rounds, *waves*, as one of 528 does, and
leaves SMs idle in the last one. So the number of rows, which is the token budget, should make whole
waves where the products are small: in the language model, whose narrowest have 576 columns.

This is arithmetic, not a measurement: cuBLAS chooses tiles by rules of its own, and 128 x 192 is a
guess that divides every width of the 222M model.
"""

from __future__ import annotations

import math

from nanovlm_fast.config import VLMConfig

TILE = (128, 192)  # rows and columns
SMS = 132  # of an H100 SXM


def waves(rows: int, columns: int, sms: int = SMS) -> float:
    """Waves of tiles of a product with a result of (rows, columns); 3.2 take the time of 4."""
    return math.ceil(rows / TILE[0]) * math.ceil(columns / TILE[1]) / sms


def wave_fill(tokens: int, config: VLMConfig, sms: int = SMS) -> float:
    """The share of the SMs' time in a language layer's products that works on real rows.

    Counts the products of the forward pass and of the gradients of their inputs. The gradients of
    weights have no tokens in their result.
    """
    width = config.lm_hidden_dim
    heads = (config.lm_n_heads + 2 * config.lm_n_kv_heads) * config.head_dim
    mlp = config.lm_inter_dim
    # Columns of the result, and what is summed over.
    forward = [(heads, width), (width, width), (2 * mlp, width), (width, mlp)]
    backward = [(inner, columns) for columns, inner in forward]
    busy = 0.0
    taken = 0.0
    for columns, inner in forward + backward:
        busy += tokens / TILE[0] * math.ceil(columns / TILE[1]) * inner
        taken += math.ceil(waves(tokens, columns, sms)) * sms * inner
    return busy / taken
