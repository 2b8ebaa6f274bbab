"""One optimizer step on the same questions: the padded reference against the packed model.

    python -m bench.train_step --preset tiny --data easy_vqa

Both start from the same weights and see the same images and questions: the reference as nanoVLM v0.1 trains, a padded
row a question with its own copy of the image; ours packed, an image encoded once for all its questions. Variants run
in turn in one process. No time is reported unless losses and gradients agree.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from bench.results import write
from bench.timing import interleave, summary
from nanovlm_fast import reference
from nanovlm_fast.config import VLMConfig, preset
from nanovlm_fast.data.sources import load_source, texts
from nanovlm_fast.data.stream import SampleLoader, measure_budget
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.device import pick_device
from nanovlm_fast.model import VisionLanguageModel
from nanovlm_fast.packing import Packer, Sample, pack, pad

VARIANTS = ("reference", "packed")


def load_samples(args: argparse.Namespace) -> tuple[VLMConfig, list[Sample], object]:
    """One packed batch worth of examples with all their questions, and the budget they fill."""
    model, train = preset(args.preset)
    train = dataclasses.replace(
        train, data=args.data, tokens_per_batch=args.tokens, questions_per_image=0, augment="none"
    )
    source = load_source(args.data, "train")
    tokenizer = Tokenizer.train(texts(source, model.prompt), model.lm_vocab_size)
    text = TextProcessor(tokenizer, model.prompt, model.image_tokens, "independent")
    load = SampleLoader(source, model, train, text)
    budget = measure_budget(load, train)
    packer = Packer(budget)
    for index in range(min(train.look_ahead, len(source))):
        packer.add(load(index))
    return model, packer.next(), budget


class Step:
    """Forward, backward and AdamW update of one variant, and what they answer for."""

    def __init__(self, variant: str, args: argparse.Namespace):
        self.config, self.samples, budget = load_samples(args)
        self.variant, self.device = variant, torch.device(args.device)
        torch.manual_seed(0)
        packed = VisionLanguageModel(self.config)
        config = self.config
        for weight in (p for name, p in packed.named_parameters() if name.endswith("weight")):
            if not weight.any():  # branches that start at zero would hide the gradients behind them
                nn.init.normal_(weight, std=0.02)
        if variant == "packed":
            self.model = packed.to(self.device)
            self.batch = pack(self.samples, budget, config.image_tokens, config.vit_img_size).to(self.device).trimmed()
        else:
            self.model = reference.VisionLanguageModel(config)
            self.model.load_state_dict(packed.reference_state_dict())
            self.model.to(self.device)
            longest = max(int((d.image_rows < 0).sum()) for s in self.samples for d in s.documents)
            self.batch = pad(self.samples, max(config.lm_max_length, longest))
            pixels = self.batch.images.float() / 255  # v0.1 hands float images to the step
            self.pixels = ((pixels - config.image_mean) / config.image_std).to(self.device)
            self.rows = [
                t.to(self.device) for t in (self.batch.input_ids, self.batch.attention_mask, self.batch.targets)
            ]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def loss(self) -> torch.Tensor:
        if self.variant == "packed":
            return self.model(self.batch) / self.batch.n_labels
        input_ids, mask, targets = self.rows
        return self.model(input_ids, self.pixels, mask, targets)[1]

    def gradients(self) -> tuple[float, dict[str, torch.Tensor]]:
        """The loss, and every gradient under the reference's names."""
        loss = self.loss()
        loss.backward()
        grads = {name: p.grad for name, p in self.model.named_parameters()}
        if self.variant == "packed":
            grads = self.model.by_reference_name(grads)
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item(), grads

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def parity(steps: dict[str, Step], tolerance: float) -> dict[str, float | bool]:
    """Relative difference of the losses, and the largest one of any gradient."""
    (expected, theirs), (loss, ours) = steps["reference"].gradients(), steps["packed"].gradients()
    worst = max(((ours[n] - g).norm() / g.norm().clamp(min=1e-12)).item() for n, g in theirs.items())
    difference = abs(loss - expected) / abs(expected)
    return {"loss": difference, "gradient": worst, "passed": max(difference, worst) <= tolerance}


def _peak(variant: str, args: argparse.Namespace, queue) -> None:
    torch.set_num_threads(args.threads or torch.get_num_threads())
    step = Step(variant, args)
    before = _resident("VmRSS")
    with contextlib.suppress(OSError):  # start the high-water mark anew, where the kernel lets us
        Path("/proc/self/clear_refs").write_text("5")
    step()
    step()
    queue.put((_resident("VmHWM") - before) / 2**10)


def _resident(field: str) -> int:
    """KiB, from this process's status (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0])


def peak_memory(variant: str, args: argparse.Namespace, step: Callable[[], None]) -> float:
    """MiB that two steps add: of the device on a GPU, of a fresh process on a CPU."""
    if torch.device(args.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(variant, args, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"measuring the memory of {variant} failed with exit code {process.exitcode}")
    return queue.get()


def compare(args: argparse.Namespace) -> dict:
    """Parity, then times and memory of both variants."""
    steps = {variant: Step(variant, args) for variant in VARIANTS}
    agreement = parity(steps, args.tolerance)
    samples = steps["packed"].samples
    questions, tokens = sum(len(s.documents) for s in samples), sum(s.tokens for s in samples)
    result = {
        "preset": args.preset,
        "data": args.data,
        "work": {"images": len(samples), "questions": questions, "tokens": tokens},
        "parity": agreement,
        "variants": {},
    }
    if not agreement["passed"]:
        return result
    with tqdm(total=(args.repeats + 2) * len(steps), desc="steps", leave=False) as bar:
        seconds = interleave(steps, args.repeats, warmup=2, progress=bar.update)
    for variant in VARIANTS:
        times = summary(seconds[variant])
        result["variants"][variant] = {
            **times,
            "seconds": seconds[variant],
            "questions_per_s": questions / times["median"],
            "tokens_per_s": tokens / times["median"],
            "peak_mib": peak_memory(variant, args, steps[variant]),
        }
    result["speedup"] = result["variants"]["reference"]["median"] / result["variants"]["packed"]["median"]
    return result


def table(result: dict) -> str:
    lines = [f"{'':12} {'step ms':>16} {'questions/s':>12} {'tokens/s':>10} {'peak MiB':>9}"]
    for name, row in result["variants"].items():
        spread = f"{row['median'] * 1e3:.0f} ({row['lower_quartile'] * 1e3:.0f}-{row['upper_quartile'] * 1e3:.0f})"
        rates = f"{row['questions_per_s']:>12,.0f} {row['tokens_per_s']:>10,.0f}"
        lines.append(f"{name:12} {spread:>16} {rates} {row['peak_mib']:>9,.0f}")
    agreement = result["parity"]
    lines.append(f"parity: loss {agreement['loss']:.1e}, worst gradient {agreement['gradient']:.1e} (relative)")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--data", default="easy_vqa")
    parser.add_argument("--tokens", type=int, default=5120, help="token budget of the packed batch")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="relative, on the loss and every gradient (float32)"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder of the result files (default: bench/results)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    try:
        args.device = str(pick_device(args.device))
        result = compare(args)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(result))
    if not result["parity"]["passed"]:
        print("error: the variants do not compute the same step; no time is reported", file=sys.stderr)
        return 1
    print(f"packed answers {result['speedup']:.1f} times as many questions a second")
    print(f"written: {write('train_step', torch.device(args.device), result, args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
