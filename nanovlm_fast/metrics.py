"""What a run reports: speed as the field counts it, and the log."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovlm_fast.config import VLMConfig

# FLOP/s of dense bfloat16 products from NVIDIA's data sheets, by the whole name that the driver gives: what begins
# alike (H100 PCIe and NVL, a MIG slice) is slower
PEAK_FLOPS = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of matrix products of `dtype`, or None where there is none to hold a run against."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device))


def step_flops(
    config: VLMConfig, n_images: int, n_tokens: int, n_labels: int, n_pairs: int, frozen: Collection[str] = ()
) -> int:
    """Model FLOPs of forward and backward: matrix products and attention of the useful work, 2 a multiply-add.

    n_images are encoded once each, all n_tokens (image tokens among them, padding not) go through all language layers,
    n_labels of them through the head; n_pairs is what `PackedBatch` counts. Work that an implementation does besides
    (padding, logits nobody asked for, recomputation), or finds a way to leave out, does not change the number. Norms,
    activations and other pointwise work are not counted. `frozen` names the parts of the model that are not trained
    (vision_encoder, MP, decoder): their weights take no gradients, and neither do inputs that only they lead to; the
    pixels never do. The convention is that of PaLM (Chowdhery et al., 2022, appendix B).
    """
    vision, projector, language = (part not in frozen for part in ("vision_encoder", "MP", "decoder"))
    c, patches, kv = config.vit_hidden_dim, config.grid**2, config.lm_n_kv_heads * config.head_dim
    embedding = 3 * config.vit_patch_size**2 * c
    blocks = config.vit_n_blocks * (4 * c * c + 2 * c * config.vit_inter_dim)
    pairs = config.vit_n_blocks * 2 * patches * c  # q k^T and the weights times v, a patch
    total = n_images * patches * ((1 + vision) * embedding + (1 + 2 * vision) * (blocks + pairs))

    shuffled = c * config.mp_pixel_shuffle_factor**2
    total += n_images * config.image_tokens * (1 + vision + projector) * shuffled * config.lm_hidden_dim

    c = config.lm_hidden_dim
    layers = config.lm_n_blocks * (2 * c * c + 2 * c * kv + 3 * c * config.lm_inter_dim)
    total += (2 + language) * (n_tokens * layers + n_labels * c * config.lm_vocab_size)
    total += 3 * n_pairs * config.lm_n_blocks * 2 * c
    return 2 * total


class Meter:
    """Counts between two log lines. Tokens are nanoVLM's: text and image tokens of real documents, never padding.

    Time is wall-clock with the wait for data in it; `wait` is that share. `peak` is the device's FLOP/s (`peak_flops`);
    with it there is an `mfu`, the share of it that model FLOPs took (`step_flops`; `frozen` as there).
    """

    def __init__(self, config: VLMConfig, peak: float | None = None, frozen: Collection[str] = ()) -> None:
        self.config, self.peak, self.frozen = config, peak, frozen
        self.reset()

    def reset(self) -> None:
        self.counts = {"tokens": 0, "labels": 0, "images": 0, "questions": 0}
        self.flops, self.capacity, self.since = 0, 0, time.perf_counter()

    def add(self, packed: Any) -> None:
        """Count a PackedBatch."""
        added = (packed.n_tokens, packed.n_labels, packed.n_images, packed.n_documents)
        for name, more in zip(self.counts, added, strict=True):
            self.counts[name] += more
        if packed.n_labels:  # a batch without them is not trained on
            sizes = packed.n_images, packed.n_tokens, packed.n_labels, packed.n_pairs
            self.flops += step_flops(self.config, *sizes, self.frozen)
        self.capacity += packed.input_ids.numel()

    def read(self, waited: float) -> dict[str, float]:
        """Rates since the last reading, `waited` seconds of which the device had no batch; and start again."""
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        values = {f"{name}_per_s": count / elapsed for name, count in self.counts.items()}
        values["tflops_per_s"] = self.flops / elapsed / 1e12
        if self.peak:
            values["mfu"] = self.flops / elapsed / self.peak
        values |= {"data_wait": waited / elapsed, "packing": self.counts["tokens"] / max(self.capacity, 1)}
        self.reset()
        return values


class StepStats:
    """Loss and gradient norm of the steps, added up on the device and read a logging interval later: nobody waits."""

    def __init__(self, device: torch.device, loss_sum: float = 0.0, labels: int = 0):
        self.loss_sum = torch.tensor(loss_sum, dtype=torch.float64, device=device)
        self.norm = torch.zeros((), dtype=torch.float64, device=device)
        self.bad_step = torch.zeros((), dtype=torch.float64, device=device)  # the first whose loss is not finite
        self.labels = labels

    def add(self, step: int, loss_sum: Tensor, labels: int, norm: Tensor | None = None) -> None:
        """Count a step: its summed loss, a scalar on the device, over so many labels; the norm of its gradient."""
        self.loss_sum += loss_sum
        self.labels += labels
        self.bad_step.copy_(torch.where(loss_sum.isfinite() | (self.bad_step > 0), self.bad_step, step))
        if norm is not None:
            self.norm.copy_(norm)

    def take(self) -> Callable[[], dict[str, float]]:
        """Start the copy to the host and start again; the result, called later, gives loss, grad_norm and bad_step."""
        labels, self.labels = max(self.labels, 1), 0
        values = torch.stack([self.loss_sum, self.norm, self.bad_step])
        host = torch.empty(3, dtype=values.dtype, pin_memory=values.is_cuda).copy_(values, non_blocking=True)
        there = torch.cuda.Event() if values.is_cuda else None
        if there:
            there.record()
        self.loss_sum.zero_()

        def read() -> dict[str, float]:
            if there:
                there.synchronize()
            loss_sum, norm, bad_step = host.tolist()
            return {"loss": loss_sum / labels, "grad_norm": norm, "bad_step": int(bad_step)}

        return read


class MetricsLog:
    """metrics.jsonl: one JSON object a line. Opening it at a step drops the lines after that step (a resume)."""

    def __init__(self, run: Path, step: int = 0):
        self.path = run / "metrics.jsonl"
        if self.path.exists():
            kept = [json.dumps(line) + "\n" for line in read_metrics(run) if line["step"] <= step]
            temporary = run / ".metrics.jsonl"
            temporary.write_text("".join(kept))
            os.replace(temporary, self.path)
        self.file = self.path.open("a", buffering=1)

    def write(self, values: dict[str, Any]) -> None:
        self.file.write(json.dumps(values) + "\n")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that was cut off by a crash is left out."""
    lines = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def summary_table(rows: dict[str, Any]) -> str:
    """Names and values in two aligned columns."""
    width = max(len(name) for name in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())
