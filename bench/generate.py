"""Greedy generation on the same weights: ours, the padded reference, and transformers.

    python -m bench.generate                     nanoVLM's model; on a CPU two layers of each tower
    python -m bench.generate --batches 1,256

A batch of size n is n images with one prompt each, whose lengths are drawn like The Cauldron's.

- `ours` is nanovlm_fast's generate: a packed prefill and a KV cache.
- `reference` runs the whole padded sequence for every token, without a cache, as nanoVLM v0.1.
- `transformers` is LlamaForCausalLM with our language weights and its own KV cache. It gets the
  embeddings of left-padded prompts, with images encoded by our tower.

All three compute in the dtype of evaluation. No end of sequence stops a reply, so all generate the
same number of tokens. Weights are random unless --checkpoint names some.

A variant is timed only if every token of its replies is the float32 reference's greedy choice,
given the variant's own previous tokens. In bfloat16, rounding decides close calls: there the logits
of a reply's tokens may on average be below the largest logit by twice what rounding moves the
reference's own logits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bench.harness.passes import in_a_line
from bench.harness.results import write
from bench.harness.tables import Rows, lined_up
from bench.harness.timing import interleave, summary
from bench.subjects.workload import cauldron_like, load_work
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.config import VLMConfig
from nanovlm_fast.device import autocast_to, make_current, pick_device, pick_dtype
from nanovlm_fast.generate import generate
from nanovlm_fast.model import reference
from nanovlm_fast.model.ops import choose_ops
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import pack, pad
from nanovlm_fast.packing.documents import IGNORE, Document, Sample
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.ranges import Range
from nanovlm_fast.weights.names import LANGUAGE_FIELDS, language_names
from nanovlm_fast.weights.pretrained import load_pretrained

SLACK = 1e-3  # how far below the largest logit float32 may choose, in standard deviations of logits
NEVER = -1  # an end-of-sequence id that no model produces


class Models:
    """One set of weights in three implementations."""

    def __init__(
        self, config: VLMConfig, device: torch.device, dtype: torch.dtype, checkpoint: str = ""
    ):
        self.device = device
        self.dtype = dtype
        self.autocast = autocast_to(dtype, device)
        torch.manual_seed(0)  # the result file does not hold the weights, so they are reproducible
        ours: VisionLanguageModel
        if checkpoint:
            ours = load_pretrained(checkpoint)[0]
        else:
            ours = far_from_uniform(VisionLanguageModel(config))
        self.config = ours.config
        ours.ops = choose_ops("auto", device, "auto", dtype)
        state = ours.reference_state_dict()
        self.ours = ours.to(device).eval()
        self.padded = reference.VisionLanguageModel(self.config)
        self.padded.load_state_dict(state)
        self.padded.to(device).eval()
        self.llama = llama(self.config, state).to(device).eval()


def far_from_uniform(model: VisionLanguageModel) -> VisionLanguageModel:
    """Draw weights wider than at initialisation.

    With nearly uniform attention a wrong key or position would not change the generated tokens.
    """
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=2 * weight[0].numel() ** -0.5)
    return model


def llama(config: VLMConfig, state: dict[str, Tensor]) -> Any:
    """transformers' LlamaForCausalLM with the language weights of a reference's state dict."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    sizes = {theirs: getattr(config, ours) for ours, theirs in LANGUAGE_FIELDS.items()}
    rope: Any = {"rope_type": "default", "rope_theta": config.lm_re_base}
    model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope))
    language = language_names(config.lm_n_blocks)
    names = {f"decoder.{ours}": f"model.{theirs}" for ours, theirs in language.items()}
    names["decoder.head.weight"] = "lm_head.weight"
    model.load_state_dict({theirs: state[ours] for ours, theirs in names.items()})
    # No eos, and a pad token only so that generate does not warn about a missing one.
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model


class Prompts:
    """`batch` prompts with one image each: packed, and as left-padded rows of text."""

    def __init__(self, models: Models, batch: int):
        config = models.config
        device = models.device
        samples = [without_answer(sample) for sample in cauldron_like(config, batch)]
        self.batch = batch
        rows = pad(samples, max(len(s.documents[0]) for s in samples) - config.image_tokens)
        self.input_ids = rows.input_ids.to(device)
        self.mask = rows.attention_mask.to(device)
        self.pixels = reference.normalise(rows.images[:, 0], config).to(device)
        self.images = rows.images[:, 0].to(device)
        self.longest = max(sample.tokens for sample in samples)
        budget = Budget(sum(s.tokens for s in samples), batch, batch, 0, self.longest)
        self.packed = pack(samples, budget, config.image_tokens, config.vit_img_size).to(device)
        # Where packed tokens go in rows that are padded on the left, as generation needs them.
        lengths = [sample.tokens for sample in samples]
        right = [torch.arange(self.longest - n, self.longest) for n in lengths]
        self.right = torch.cat(right).to(device)
        self.row = torch.arange(batch).repeat_interleave(torch.tensor(lengths)).to(device)
        self.documents = []
        for i, (document,) in enumerate(sample.documents for sample in samples):
            # `generate` gets all images at once, so rows count on from image to image.
            rows_shown = document.image_rows + i * config.image_tokens
            shown = np.where(document.image_rows >= 0, rows_shown, -1)
            self.documents.append(Document(document.input_ids, shown, document.labels))


def without_answer(sample: Sample) -> Sample:
    """The sample with its question alone."""
    (document,) = sample.documents
    end = int(np.argmax(document.labels != IGNORE)) + 1
    labels = np.full(end, IGNORE, np.int64)
    question = Document(document.input_ids[:end], document.image_rows[:end], labels)
    return Sample(sample.name, sample.images, [question])


# ---- the variants: (models, prompts, new tokens) -> (batch, new tokens)


def by_ours(models: Models, prompts: Prompts, new: int) -> Tensor:
    return torch.tensor(generate(models.ours, prompts.images, prompts.documents, NEVER, new))


@torch.inference_mode()
def by_reference(models: Models, prompts: Prompts, new: int) -> Tensor:
    model = models.padded
    tokens = []
    x, valid = start_of(model, prompts)
    for _ in range(new):
        token = model.decoder.head(model.decoder(x, valid)[:, -1]).argmax(-1, keepdim=True)
        tokens.append(token)
        x = torch.cat([x, model.decoder.token_embedding(token)], dim=1)
        valid = torch.cat([valid, valid.new_ones(prompts.batch, 1)], dim=1)
    return torch.cat(tokens, dim=1).cpu()


@torch.inference_mode()
def by_transformers(models: Models, prompts: Prompts, new: int) -> Tensor:
    packed = prompts.packed
    batch = prompts.batch
    embedded, _ = models.ours.embed(packed.input_ids, packed.image_rows, packed.images)
    rows = embedded.new_zeros(batch, prompts.longest, embedded.shape[1])
    mask = packed.input_ids.new_zeros(batch, prompts.longest)
    rows[prompts.row, prompts.right] = embedded
    mask[prompts.row, prompts.right] = 1
    return models.llama.generate(inputs_embeds=rows, attention_mask=mask, max_new_tokens=new).cpu()


VARIANTS: dict[str, Callable[[Models, Prompts, int], Tensor]] = {
    "reference": by_reference,
    "transformers": by_transformers,
    "ours": by_ours,
}


def start_of(model: reference.VisionLanguageModel, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Embeddings of the padded prompts (B, S, C), image first, and which are real tokens (B, S)."""
    images = model.MP(model.vision_encoder(prompts.pixels))
    x = torch.cat([images, model.decoder.token_embedding(prompts.input_ids)], dim=1)
    return x, torch.cat([prompts.mask.new_ones(images.shape[:2]), prompts.mask], dim=1).bool()


# ---- the gate


class Gate:
    """Checks whether replies are greedy: the float32 reference reads them."""

    def __init__(self, models: Models, prompts: Prompts, new: int):
        self.models = models
        self.prompts = prompts
        with models.autocast():
            self.expected = by_reference(models, prompts, new)
            rounded = self.logits(self.expected)
        exact = self.exact_logits(self.expected)
        # Twice what rounding alone moves the logits; nothing where the dtype is float32.
        self.allowed = (2 * (rounded - exact).abs().mean() / exact.std()).item() + SLACK

    @torch.inference_mode()
    def logits(self, replies: Tensor) -> Tensor:
        """(B, new, V): the logits from which each token of the replies was chosen."""
        model = self.models.padded
        replies = replies.to(self.models.device)
        x, valid = start_of(model, self.prompts)
        x = torch.cat([x, model.decoder.token_embedding(replies[:, :-1])], dim=1)
        valid = torch.cat([valid, valid.new_ones(replies[:, :-1].shape)], dim=1)
        return model.decoder.head(model.decoder(x, valid)[:, -replies.shape[1] :]).float()

    def exact_logits(self, replies: Tensor) -> Tensor:
        # The caller computes under autocast; the judge must not.
        with torch.autocast(self.models.device.type, enabled=False):
            return self.logits(replies)

    def __call__(self, replies: Tensor) -> dict[str, float | bool]:
        """How far the worst reply is below the largest logits, and whether that passes.

        The unit is the standard deviation of the logits.
        """
        if replies.shape != self.expected.shape:
            missed = float("inf")
            same = 0.0
        else:
            logits = self.exact_logits(replies)
            chosen = logits.gather(-1, replies.to(logits.device)[..., None])[..., 0]
            # Per reply the mean over its tokens: a wrong cache misses everywhere, rounding rarely.
            missed = ((logits.amax(-1) - chosen).mean(1).max() / logits.std()).item()
            same = (replies == self.expected).float().mean().item()
        return {
            "missed_by": missed,
            "allowed": self.allowed,
            "same_tokens": same,
            "passed": missed <= self.allowed,
        }


def measure(models: Models, batch: int, new: int, repeats: int, progress: Callable) -> dict:
    """The rows of one batch size: {'error': why}, or times to the first and to all tokens."""
    prompts = Prompts(models, batch)
    gate = Gate(models, prompts, new)
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[int, dict[str, Callable]] = {1: {}, new: {}}
    with models.autocast():
        for name, variant in VARIANTS.items():
            progress()
            try:
                parity = gate(variant(models, prompts, new))
            except Exception as error:  # a variant that cannot run is a row of the table
                rows[name] = {"error": in_a_line(error)}
                continue
            rows[name] = {"parity": parity}
            if not parity["passed"]:
                rows[name]["error"] = (
                    f"misses the reference's largest logits by {parity['missed_by']:.1e} standard "
                    f"deviations, allowed {parity['allowed']:.1e}"
                )
                continue
            for tokens, some in calls.items():
                some[name] = lambda v=variant, n=tokens: v(models, prompts, n)
        seconds = {tokens: interleave(some, repeats) for tokens, some in calls.items()}
    for name, row in rows.items():
        if "error" not in row:
            first, whole = (summary(seconds[tokens][name]) for tokens in (1, new))
            row |= {"first_token": first, "all_tokens": whole, "seconds": seconds[new][name]}
            row["tokens_per_s"] = batch * new / whole["median"]
            # Without the prefill; at toy sizes the difference drowns in the noise of both times.
            decoding = whole["median"] - first["median"]
            enough = decoding > 0.05 * whole["median"]
            row["decode_tokens_per_s"] = batch * (new - 1) / decoding if enough else None
    return {"longest_prompt": prompts.longest, "new_tokens": new, "variants": rows}


def table(batches: dict[str, dict]) -> str:
    head = ("batch", "variant", "first token ms", "all tokens ms", "tokens/s", "decoding")
    rows: Rows = [(*head, "same tokens")]
    for batch, result in batches.items():
        for name, row in result["variants"].items():
            if "error" in row:
                rows.append((batch, name, row["error"]))
                continue
            times = (f"{row[part]['median'] * 1e3:,.1f}" for part in ("first_token", "all_tokens"))
            decoding = f"{row['decode_tokens_per_s']:,.0f}" if row["decode_tokens_per_s"] else "-"
            rates = (f"{row['tokens_per_s']:,.0f}", decoding)
            rows.append((batch, name, *times, *rates, f"{row['parity']['same_tokens']:.1%}"))
    return lined_up(rows, left=(0, 1))


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.generate", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer batches, tokens and repeats; on a CPU preset tiny",
    )
    parser.add_argument("--preset", default="", help="default: nanovlm-222m")
    parser.add_argument(
        "--layers",
        type=Range(int, least=-1),
        default=-1,
        help="of each tower; 0: the preset's, as on a GPU; CPU: 2",
    )
    parser.add_argument(
        "--checkpoint", default="", help="weights, as for nanovlm_fast.generate; default: random"
    )
    parser.add_argument(
        "--batches",
        type=Range(int, least=1).several,
        help="numbers of prompts, comma-separated; default: 1,8,64; on a CPU 1,8",
    )
    parser.add_argument(
        "--new-tokens",
        type=Range(int),
        default=0,
        help="0: 64 on a GPU, 16 on a CPU, 8 with --quick",
    )
    parser.add_argument("--repeats", type=Range(int), default=0, help="0: 10, with --quick 3")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    args = make_parser().parse_args(argv)
    args.device = make_current(pick_device(args.device))
    on_gpu = args.device.type == "cuda"
    args.preset = args.preset or ("tiny" if args.quick and not on_gpu else "nanovlm-222m")
    args.batches = args.batches or ([1, 8] if args.quick or not on_gpu else [1, 8, 64])
    args.layers = args.layers if args.layers >= 0 else 0 if on_gpu else 2
    args.new_tokens = args.new_tokens or (8 if args.quick else 64 if on_gpu else 16)
    args.repeats = args.repeats or (3 if args.quick else 10)
    if args.new_tokens < 2:
        raise ValueError("--new-tokens must be at least 2: the first is the prefill's")
    return args


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    config = load_work(args.preset, "cauldron_like", 1, args.layers).config
    models = Models(config, args.device, pick_dtype(args.dtype, args.device), args.checkpoint)
    batches: dict[str, dict] = {}
    result = {
        "preset": args.preset,
        "layers": args.layers,
        "checkpoint": args.checkpoint,
        "batches": batches,
        "dtype": str(models.dtype).removeprefix("torch."),
        "operations": str(models.ours.ops),
    }
    with tqdm(total=len(args.batches) * len(VARIANTS), desc="variants", leave=False) as bar:
        for batch in args.batches:
            rows = measure(models, batch, args.new_tokens, args.repeats, bar.update)
            batches[str(batch)] = rows
            # After every batch, so that a run that dies later keeps what it has.
            file = write("generate", args.device, result, args.out)
    print(table(batches))
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
