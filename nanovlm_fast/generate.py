"""Generation: one packed prefill of prompts of any length, then a token per step from a KV cache.

    python -m nanovlm_fast.generate --checkpoint RUN --image FILE --prompt TEXT

Shapes: B prompts, T packed tokens of all prompts, D head size, C channels, V vocabulary.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanovlm_fast.command import Parser, add_model_options, reports_errors, utf8
from nanovlm_fast.data.chat import make_text
from nanovlm_fast.data.samples import load_tiles
from nanovlm_fast.device import leave_busy_cores, make_current, pick_device
from nanovlm_fast.model.attention import Attention, padded_slots
from nanovlm_fast.model.packed import Rotate, VisionLanguageModel
from nanovlm_fast.packing.batch import PackedBatch, pack
from nanovlm_fast.packing.documents import Document, Sample
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.paths import at_home
from nanovlm_fast.ranges import SEED, Range
from nanovlm_fast.weights.pretrained import load_pretrained

TEMPERATURE = Range(float)
TOP_K = Range(int)
TOP_P = Range(float, most=1)


class KVCache:
    """Keys and values of every layer, one row per prompt: (B, n_kv_heads, room, D).

    `room` is the largest number of positions that a prompt and its reply take together. The cache
    is allocated in that size once: growing it would copy it at every step.
    """

    def __init__(self, prompts: PackedBatch, n_prompts: int, room: int, attend: Attention):
        self.prompts = prompts
        self.n_prompts = n_prompts
        self.room = room
        self.attend = attend
        self.lengths = prompts.cu_seqlens.diff()[:n_prompts].long()  # tokens already in the cache
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def prefill(self, layer: int, qkv: Tensor, rotate: Rotate) -> Tensor:
        """Attend inside each prompt, and store its keys and values with room for its reply.

        qkv (T, (n_heads + 2 n_kv_heads) D), not rotated yet -> (T, n_heads D).
        """
        q, k, v = rotate(qkv)
        cu_seqlens = self.prompts.cu_seqlens
        max_seqlen = self.prompts.max_seqlen
        slots = padded_slots(cu_seqlens, max_seqlen, len(k))
        for cache, new in ((self.keys, k), (self.values, v)):
            empty = new.new_zeros(self.n_prompts * max_seqlen, *new.shape[1:])
            rows = empty.index_copy(0, slots, new)
            rows = rows.view(self.n_prompts, max_seqlen, *new.shape[1:]).transpose(1, 2)
            cache.append(F.pad(rows, (0, 0, 0, self.room - max_seqlen)))
        return self.attend(q, k, v, cu_seqlens, max_seqlen, True).flatten(1)

    def decode(self, layer: int, qkv: Tensor, rotate: Rotate) -> Tensor:
        """Attend from one new token per prompt to all tokens before it and to itself.

        qkv (B, (n_heads + 2 n_kv_heads) D), not rotated yet -> (B, n_heads D).
        """
        q, k, v = rotate(qkv)
        row = torch.arange(len(q), device=q.device)
        self.keys[layer][row, :, self.lengths] = k
        self.values[layer][row, :, self.lengths] = v
        # <=, because the new token at position `lengths` has just been stored. What lies behind it
        # is zeros, or left from a reply that has ended.
        seen = torch.arange(self.keys[layer].shape[2], device=q.device) <= self.lengths[:, None]
        out = F.scaled_dot_product_attention(
            q[:, :, None],
            self.keys[layer],
            self.values[layer],
            attn_mask=seen[:, None, None],
            enable_gqa=True,
        )
        return out[:, :, 0].flatten(1)


def prefill(
    model: VisionLanguageModel, images: Tensor, prompts: Sequence[Document], room: int
) -> tuple[KVCache, Tensor]:
    """Return the prompts' cache and the hidden states (B, C) that choose their next tokens."""
    longest = max(len(prompt) for prompt in prompts)
    sample = Sample("prompts", np.zeros((0, 3, *images.shape[2:]), np.uint8), list(prompts))
    budget = Budget(sample.tokens, len(prompts), 0, sample.labels, longest)
    config = model.config
    batch = pack([sample], budget, config.image_tokens, config.vit_img_size).to(images.device)
    cache = KVCache(batch, len(prompts), room, model.ops.attention)
    x, _ = model.embed(batch.input_ids, batch.image_rows, images)
    # Only each prompt's last token passes the last MLP and the head.
    last = batch.cu_seqlens[1 : len(prompts) + 1].long() - 1
    return cache, model.decoder(model.ops, x, batch.position_ids, cache.prefill, last)


def decode(model: VisionLanguageModel, cache: KVCache, tokens: Tensor, counts: Tensor) -> Tensor:
    """Return the hidden states (B, C) after one more token per prompt.

    `counts` (B,) is 1 where the token is part of the reply. Where it is 0 the reply has ended and
    the result is not used. Such a row's length stays the same; otherwise it would run past the
    model's positions while longer replies go on.
    """
    x = model.decoder.token_embedding(tokens)
    hidden = model.decoder(model.ops, x, cache.lengths.int(), cache.decode)
    cache.lengths = cache.lengths + counts
    return hidden


@torch.inference_mode()
def generate(  # noqa: PLR0913  # the options of sampling, as people know them; by keyword
    model: VisionLanguageModel,
    images: Tensor,
    prompts: Sequence[Document],
    eos_id: int,
    max_new_tokens: int | Sequence[int] = 20,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    on_token: Callable[[int, int], None] = lambda prompt, token: None,
) -> list[list[int]]:
    """Continue each prompt until the end of sequence.

    With greedy decoding or a generator per prompt, a reply does not depend on the prompts that
    share its batch, except for the last bits of the logits: matrix products of other sizes round
    differently.

    Args:
        images: (N, 3, H, W) uint8, encoded once. The `image_rows` of all prompts index the image
            tokens of all N together.
        max_new_tokens: one limit for all prompts, or one for each.
        temperature: 0 is greedy.
        top_k: sample only from so many of the likeliest tokens; 0: from all.
        top_p: of these, only from the fewest that hold this share of the probability.
        generator: random numbers for all prompts together, or one for each (`generator_of`).
        on_token: called with the number of a prompt and a new token of its reply, as soon as it is
            chosen. What it raises ends the generation.

    Returns:
        The new tokens of each prompt, without the end of sequence.

    Raises:
        ValueError: for a prompt whose reply may exceed the model's positions, and for options
            outside their range.
    """
    TEMPERATURE.read("temperature", temperature)
    TOP_K.read("top_k", top_k)
    TOP_P.read("top_p", top_p)
    if isinstance(max_new_tokens, int):
        max_new_tokens = [max_new_tokens] * len(prompts)
    asked = [i for i, limit in enumerate(max_new_tokens) if limit > 0]
    replies: list[list[int]] = [[] for _ in prompts]
    if not asked:
        return replies
    room = check_room(model, prompts, max_new_tokens)
    if not (generator is None or isinstance(generator, torch.Generator)):
        generator = [generator[i] for i in asked]
    cache, hidden = prefill(model, images, [prompts[i] for i in asked], room)
    running = [True] * len(asked)
    while True:
        token = choose(model.decoder.head(hidden), temperature, top_k, top_p, generator)
        # One transfer from the device per step; a look at each element would be one per prompt.
        for row, (i, value) in enumerate(zip(asked, token.tolist(), strict=True)):
            if running[row] and value != eos_id:
                replies[i].append(value)
                on_token(i, value)
            running[row] &= value != eos_id and len(replies[i]) < max_new_tokens[i]
        if not any(running):
            return replies
        # Ended rows are computed further: dropping them would change the shapes at every step.
        hidden = decode(model, cache, token, torch.tensor(running, device=token.device).long())


def check_room(
    model: VisionLanguageModel, prompts: Sequence[Document], max_new_tokens: Sequence[int]
) -> int:
    """Return the most positions that a prompt and its reply take, of prompts that get a reply.

    Raises ValueError if the model does not have as many.
    """
    positions = model.config.lm_max_position_embeddings
    longest = 0
    for i, (prompt, new) in enumerate(zip(prompts, max_new_tokens, strict=True)):
        end = len(prompt) + new if new > 0 else 0
        if end > positions:
            raise ValueError(
                f"prompt {i + 1} of {len(prompt)} tokens and {new} new ones are over the model's "
                f"{positions} positions"
            )
        longest = max(longest, end)
    return longest


def choose(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Tensor:
    """Choose one token per row: (B, V) logits -> (B,)."""
    if temperature <= 0:
        return logits.argmax(-1)
    # The largest logit becomes 0, so that dividing by a tiny temperature leaves it finite.
    logits = logits.float() - logits.max(dim=-1, keepdim=True).values.float()
    logits = logits / max(temperature, torch.finfo(torch.float32).tiny)
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # of the likelier tokens
        # `before > 0`: the likeliest token stays, even with top_p = 0.
        ordered = ordered.masked_fill((before >= top_p) & (before > 0), float("-inf"))
        logits = torch.full_like(logits, float("-inf")).scatter(-1, order, ordered)
    probabilities = logits.softmax(-1)
    if generator is None or isinstance(generator, torch.Generator):
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    drawn = zip(probabilities, generator, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=own) for row, own in drawn])


def generator_of(device: torch.device, *numbers: int) -> torch.Generator:
    """Return a generator seeded by `numbers`: a random seed, and which prompt it is for.

    Hashed, so that any two tuples of numbers give unrelated streams; seed + prompt would repeat
    them. Seven bytes always fit the signed 64-bit integer that `manual_seed` takes.
    """
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def make_parser() -> Parser:
    """Return the parser of `python -m nanovlm_fast.generate`."""
    parser = Parser(
        prog="python -m nanovlm_fast.generate", description="Ask a model about an image."
    )
    add_model_options(parser)
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        help="image file; repeat for several images per prompt",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        required=True,
        type=utf8,
        help="question; repeat for several, each about all images",
    )
    parser.add_argument(
        "--max-new-tokens", type=Range(int), default=20, help="longest reply, in tokens"
    )
    parser.add_argument("--temperature", type=TEMPERATURE, default=0.0, help="0 is greedy")
    parser.add_argument(
        "--top-k", type=TOP_K, default=0, help="sample from the K likeliest tokens; 0: from all"
    )
    parser.add_argument(
        "--top-p",
        type=TOP_P,
        default=1.0,
        help="sample from the fewest tokens that hold this share of the probability",
    )
    parser.add_argument("--seed", type=SEED, default=0, help="random seed of sampling")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    """Print the reply to each prompt."""
    args = make_parser().parse_args(argv)
    device = make_current(pick_device(args.device))
    leave_busy_cores(device)
    model, tokenizer = load_pretrained(args.checkpoint, device, args.lm_tokenizer)
    tiles, grids = load_tiles([at_home(file) for file in args.image], model.config)
    text = make_text(tokenizer, model.config, "independent")
    prompts = [text.document([(prompt, "")], grids) for prompt in args.prompt]
    replies = generate(
        model.eval(),
        torch.from_numpy(tiles).to(device),
        prompts,
        tokenizer.eos_id,
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        generator=[generator_of(device, args.seed, i) for i in range(len(prompts))],
    )
    for prompt, reply in zip(args.prompt, replies, strict=True):
        answer = tokenizer.decode(reply).strip()
        print(f"{prompt} {answer}" if len(args.prompt) > 1 else answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
