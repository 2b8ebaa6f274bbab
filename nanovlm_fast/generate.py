"""Generation: prompts of mixed length in one packed prefill, then one token a step from a KV cache.

python -m nanovlm_fast.generate --checkpoint RUN --image FILE --prompt TEXT
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanovlm_fast.command import Parser, reports_errors, utf8
from nanovlm_fast.data.images import load_image
from nanovlm_fast.data.text import TextProcessor
from nanovlm_fast.device import pick_device
from nanovlm_fast.model.attention import Attention, padded_slots
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import PackedBatch, pack
from nanovlm_fast.packing.documents import Document, Sample
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.paths import at_home
from nanovlm_fast.ranges import SEED, Range
from nanovlm_fast.weights.folder import load_pretrained

TEMPERATURE, TOP_K, TOP_P = Range(float), Range(int), Range(float, most=1)


class KVCache:
    """Keys and values of every layer, one row per prompt: (n_prompts, n_kv_heads, room, head_dim).

    `room` is the most positions that a prompt takes together with its reply.
    """

    def __init__(self, prompts: PackedBatch, n_prompts: int, room: int, attend: Attention):
        self.prompts = prompts
        self.n_prompts = n_prompts
        self.room = room
        self.attend = attend
        self.lengths = prompts.cu_seqlens.diff()[:n_prompts].long()  # tokens already in the cache
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend inside each prompt and keep its keys and values, with room for the tokens to come."""
        cu_seqlens, max_seqlen = self.prompts.cu_seqlens, self.prompts.max_seqlen
        slots = padded_slots(cu_seqlens, max_seqlen, len(k))
        for cache, new in ((self.keys, k), (self.values, v)):
            rows = new.new_zeros(self.n_prompts * max_seqlen, *new.shape[1:]).index_copy(
                0, slots, new
            )
            rows = rows.view(self.n_prompts, max_seqlen, *new.shape[1:]).transpose(1, 2)
            cache.append(F.pad(rows, (0, 0, 0, self.room - max_seqlen)))
        return self.attend(q, k, v, cu_seqlens, max_seqlen, True)

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One new token a prompt: q (B, n_heads, D), k and v (B, n_kv_heads, D)."""
        row = torch.arange(len(q), device=q.device)
        self.keys[layer][row, :, self.lengths] = k
        self.values[layer][row, :, self.lengths] = v
        seen = torch.arange(self.keys[layer].shape[2], device=q.device) <= self.lengths[:, None]
        out = F.scaled_dot_product_attention(
            q[:, :, None],
            self.keys[layer],
            self.values[layer],
            attn_mask=seen[:, None, None],
            enable_gqa=True,
        )
        return out[:, :, 0]


def prefill(
    model: VisionLanguageModel, images: Tensor, prompts: Sequence[Document], room: int
) -> tuple[KVCache, Tensor]:
    """The prompts' cache, and the hidden states (n_prompts, C) that choose their next tokens."""
    longest = max(len(prompt) for prompt in prompts)
    sample = Sample("prompts", np.zeros((0, 3, *images.shape[2:]), np.uint8), list(prompts))
    budget = Budget(sample.tokens, len(prompts), 0, sample.labels, longest)
    config = model.config
    batch = pack([sample], budget, config.image_tokens, config.vit_img_size).to(images.device)
    cache = KVCache(batch, len(prompts), room, model.ops.attention)
    x = model.embed(batch.input_ids, batch.image_rows, images)
    last = batch.cu_seqlens[1 : len(prompts) + 1].long() - 1
    return cache, model.decoder(model.ops, x, batch.position_ids, cache.prefill, last)


def decode(model: VisionLanguageModel, cache: KVCache, tokens: Tensor, counts: Tensor) -> Tensor:
    """The hidden states (n_prompts, C) after one more token per prompt.

    `counts` is 1 where the token is part of the reply. Where it is 0 the reply has ended and nobody
    reads what comes out; its row stays where it is, or it would run past the model's positions.
    """
    x = model.decoder.token_embedding(tokens)
    hidden = model.decoder(model.ops, x, cache.lengths.int(), cache.decode)
    cache.lengths = cache.lengths + counts
    return hidden


@torch.inference_mode()
def generate(
    model: VisionLanguageModel,
    images: Tensor,
    prompts: Sequence[Document],
    eos_id: int,
    max_new_tokens: int | Sequence[int] = 20,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> list[list[int]]:
    """Continue each prompt until end of sequence; returns the new tokens without it.

    images (N, 3, H, W) uint8 are encoded once; a prompt's `image_rows` index their image tokens,
    all N together. `max_new_tokens` is one limit for all prompts or one for each. temperature 0 is
    greedy; otherwise sampling, from the `top_k` likeliest tokens (0: all) and of them the fewest
    that hold `top_p` of the probability. `generator` is one for all, or one per prompt
    (`generator_of`).

    With greedy decoding or a generator per prompt, a reply does not depend on the prompts that
    share its batch, but for the last bits of the logits: products of other sizes round
    differently. Raises ValueError for a prompt whose reply may pass the model's positions, and for
    options out of their range.
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
    ends = [len(prompts[i]) + max_new_tokens[i] for i in asked]
    positions = model.config.lm_max_position_embeddings
    for i, end in zip(asked, ends, strict=True):
        if end > positions:
            long, new = len(prompts[i]), max_new_tokens[i]
            what = f"prompt {i + 1} of {long} tokens and {new} new ones are over"
            raise ValueError(f"{what} the model's {positions} positions")
    if not (generator is None or isinstance(generator, torch.Generator)):
        generator = [generator[i] for i in asked]
    cache, hidden = prefill(model, images, [prompts[i] for i in asked], max(ends))
    running = [True] * len(asked)
    while True:
        token = choose(model.decoder.head(hidden), temperature, top_k, top_p, generator)
        for row, (i, value) in enumerate(zip(asked, token.tolist(), strict=True)):
            if running[row] and value != eos_id:
                replies[i].append(value)
            running[row] &= value != eos_id and len(replies[i]) < max_new_tokens[i]
        if not any(running):
            return replies
        hidden = decode(model, cache, token, torch.tensor(running, device=token.device).long())


def choose(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Tensor:
    """(B, V) logits -> (B,) tokens."""
    if temperature <= 0:
        return logits.argmax(-1)
    # the largest logit becomes 0, so that dividing by a tiny temperature leaves it finite
    logits = logits.float() - logits.max(dim=-1, keepdim=True).values.float()
    logits = logits / max(temperature, torch.finfo(torch.float32).tiny)
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(
            -1
        )  # probability ahead of each token
        ordered = ordered.masked_fill((before >= top_p) & (before > 0), float("-inf"))
        logits = torch.full_like(logits, float("-inf")).scatter(-1, order, ordered)
    probabilities = logits.softmax(-1)
    if generator is None or isinstance(generator, torch.Generator):
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    drawn = zip(probabilities, generator, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=own) for row, own in drawn])


def generator_of(device: torch.device, *numbers: int) -> torch.Generator:
    """Random numbers of their own for these numbers: a seed, and which prompt it is."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m nanovlm_fast.generate", description="Ask a model about an image."
    )
    parser.add_argument(
        "--checkpoint",
        help="run (its newest checkpoint), RUN/best, folder, or hub name; default: the latest run",
    )
    parser.add_argument(
        "--image", action="append", default=[], help="image file; repeat for several in one prompt"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        required=True,
        type=utf8,
        help="question; repeat for a batch on the images",
    )
    parser.add_argument("--max-new-tokens", type=Range(int), default=20)
    parser.add_argument("--temperature", type=TEMPERATURE, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=TOP_K, default=0)
    parser.add_argument("--top-p", type=TOP_P, default=1.0)
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--lm-tokenizer", default="", help="hub name or folder; default: its own")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    device = pick_device(args.device)
    model, tokenizer = load_pretrained(args.checkpoint, device, args.lm_tokenizer)
    size = model.config.vit_img_size
    images = [load_image(at_home(file), size) for file in args.image]
    text = TextProcessor(tokenizer, model.config.prompt, model.config.image_tokens)
    prompts = [text.document([(prompt, "")], len(images)) for prompt in args.prompt]
    stacked = np.stack(images) if images else np.zeros((0, 3, size, size), np.uint8)
    replies = generate(
        model.eval(),
        torch.from_numpy(stacked).to(device),
        prompts,
        tokenizer.eos_id,
        args.max_new_tokens,
        args.temperature,
        args.top_k,
        args.top_p,
        [generator_of(device, args.seed, i) for i in range(len(prompts))],
    )
    for prompt, reply in zip(args.prompt, replies, strict=True):
        answer = tokenizer.decode(reply).strip()
        print(f"{prompt} {answer}" if len(args.prompt) > 1 else answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
