"""Conversations with tiles, through huggingface/nanoVLM's own `main` and through ours.

Both sides get the same weights (a small random model, written by `export --to nanovlm`), pictures
and turns. Token ids, labels and pixels are made by each side's own code. Logits, loss and gradients
are compared on our tiles, which are bytes: the tile of the whole picture is rounded there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.peers.main_process import NEW
from nanovlm_fast.config import CHATML, VLMConfig
from nanovlm_fast.data.chat import END, START, make_text
from nanovlm_fast.data.images import grid_of
from nanovlm_fast.data.samples import make_sample
from nanovlm_fast.data.sources.example import Example
from nanovlm_fast.data.text import EOS, TextProcessor, Tokenizer, Turn
from nanovlm_fast.generate import generate
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import PackedBatch, pack
from nanovlm_fast.packing.documents import IGNORE, Sample
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.presets import position_tokens
from nanovlm_fast.ranges import TokenNames
from nanovlm_fast.weights.to_nanovlm import to_nanovlm

PROJECT = Path(__file__).resolve().parents[2]
NEEDED = ("data/datasets.py", "data/advanced_datasets.py", "data/custom_transforms.py")
TOLERANCE = 1e-5  # relative, of logits, loss and every gradient in float32
HALF_A_STEP = 0.5 / 255 + 1e-6  # the tile of the whole picture is rounded to bytes
TURN = ("What is in the picture?", "A red circle on a blue ground, and two cats.")
TURNS = [TURN, ("How many?\n", "Two."), ("Where?  Say it in French: où?", "À gauche.")]


@dataclass(frozen=True)
class Case:
    """A conversation: the sizes of its pictures, and its turns."""

    name: str
    sizes: tuple[tuple[int, int], ...]
    turns: tuple[Turn, ...] = (TURN,)


CASES = (
    Case("no image", ()),
    Case("one tile", ((30, 20),)),
    Case("a 3 x 4 grid", ((128, 96),)),
    Case("two images", ((120, 61), (31, 32))),
    Case("three turns", ((90, 128),), tuple(TURNS)),
)
CONFIG = VLMConfig(
    vit_img_size=32,
    vit_patch_size=8,
    vit_hidden_dim=48,
    vit_inter_dim=96,
    vit_n_heads=3,
    vit_n_blocks=2,
    lm_hidden_dim=48,
    lm_inter_dim=80,
    lm_n_heads=6,
    lm_n_kv_heads=2,
    lm_n_blocks=2,
    lm_vocab_size=320 + 66,
    lm_max_position_embeddings=2048,
    lm_tokenizer="train",
    mp_pixel_shuffle_factor=2,
    max_img_size=128,
    vlm_extra_tokens=TokenNames(position_tokens(8)),
    lm_chat_template=CHATML,
)


def has_conversations(checkout: Path) -> bool:
    """Whether the checkout is of a release with tiles, and has the files that are needed."""
    return all((checkout / file).is_file() for file in NEEDED)


def small_model(config: VLMConfig) -> tuple[VisionLanguageModel, Tokenizer]:
    """A random model whose answers are far from uniform, and a tokenizer with its tokens."""
    said = [text for turn in TURNS for text in turn]
    size = config.lm_vocab_size - len(config.vlm_extra_tokens)
    tokenizer = Tokenizer.train(["user\n", "assistant\n", *said] * 3, size, (EOS, START, END))
    tokenizer.reserve(list(config.vlm_extra_tokens.values()))
    torch.manual_seed(0)
    model = VisionLanguageModel(config)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=1.5 * weight[0].numel() ** -0.5)
        elif "bias" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model, tokenizer


def compare(checkout: Path) -> dict[str, dict[str, float]]:
    """Differences by case, and of the pack. Raises ValueError if one is over what is allowed.

    Once with pictures that keep their size and once with pictures that are enlarged to the most
    tiles, as the models on the hub take them; and text alone with a model of one extra token, as
    450M's, whose pictures today's main no longer takes.
    """
    plain = compare_model(checkout, CONFIG, CASES)
    enlarged = dataclasses.replace(CONFIG, resize_to_max_side_len=True)
    more = compare_model(checkout, enlarged, CASES[3:])
    one_token = dataclasses.replace(
        CONFIG,
        max_img_size=0,
        vlm_extra_tokens=TokenNames({"image_token": "<|image|>"}),
        lm_vocab_size=CONFIG.lm_vocab_size - 65,
    )
    text = compare_model(checkout, one_token, CASES[:1])
    named = {f"{name}, enlarged": found for name, found in more.items()}
    return plain | named | {"no image, one extra token": text[CASES[0].name]}


def compare_model(
    checkout: Path, config: VLMConfig, cases: tuple[Case, ...]
) -> dict[str, dict[str, float]]:
    """`compare` with one model."""
    model, tokenizer = small_model(config)
    text = make_text(tokenizer, config, "chat")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = [
            make_case(folder, number, case, text, config) for number, case in enumerate(cases)
        ]
        to_nanovlm(folder / "model", model, tokenizer)
        save_file(
            {str(i): torch.from_numpy(s.images) for i, s in enumerate(samples)},
            folder / "tiles.safetensors",
        )
        run_theirs(checkout, folder)
        theirs = json.loads((folder / "theirs.json").read_text())
        result = {}
        for number, (case, sample) in enumerate(zip(cases, samples, strict=True)):
            stored = load_file(folder / f"theirs-{number}.safetensors")
            check_sample(case, sample, stored)
            check_reply(case, sample, (model, tokenizer, text), theirs["cases"][number]["reply"])
            mine = step(model, batch_of([sample]))
            result[case.name] = differences(mine, stored, theirs["cases"][number]["loss"])
            result[case.name]["pixels"] = pixels_off(sample, stored["pixels"])
        stored = load_file(folder / "theirs-pack.safetensors")
        leaking = step(model, leaky(batch_of(samples)))
        isolated = step(model, batch_of(samples))
        result["a pack, leaking as theirs"] = differences(leaking, stored, theirs["pack"]["loss"])
        off = abs(isolated["loss"].item() / theirs["pack"]["loss"] - 1)
    for name, case_result in result.items():
        worst = max(case_result[what] for what in ("logits", "loss", "gradient"))
        if not worst <= TOLERANCE or not case_result.get("pixels", 0.0) <= HALF_A_STEP:
            raise ValueError(f"nanoVLM and ours differ on {name}: {case_result}")
    result["a pack, isolated as ours"] = {"loss": off}
    return result


def make_case(
    folder: Path, number: int, case: Case, text: TextProcessor, config: VLMConfig
) -> Sample:
    """Write the case's pictures and its entry for the other process; return our sample of it."""
    rng = np.random.default_rng(number)
    files = []
    for place, (width, height) in enumerate(case.sizes):
        # Smooth, as photographs are: a resize of noise would hide errors of half a pixel.
        small = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        files.append(f"{number}-{place}.png")
        picture.save(folder / files[-1])
    entries = folder / "cases.json"
    known = json.loads(entries.read_text()) if entries.exists() else []
    grids = [grid_of(*size, config) for size in case.sizes]
    entry = {"images": files, "turns": case.turns, "grids": grids}
    entries.write_text(json.dumps([*known, entry]))
    example = Example(case.name, [folder / file for file in files], list(case.turns))
    return make_sample(example, config, text)


def run_theirs(checkout: Path, folder: Path) -> None:
    """Run the other process. Raises ValueError with its last line if it fails."""
    call = "import sys; from bench.peers.main_process import run; run(*sys.argv[1:])"
    command = [sys.executable, "-c", call, str(checkout.resolve()), str(folder)]
    paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ValueError(f"nanoVLM's conversations: {lines[-1]}")


def check_sample(case: Case, sample: Sample, stored: dict[str, Tensor]) -> None:
    """Raise ValueError unless both sides made the same token ids and labels."""
    (document,) = sample.documents
    for what, mine in (("ids", document.input_ids), ("labels", document.labels)):
        if not np.array_equal(mine, stored[what].numpy()):
            raise ValueError(f"nanoVLM and ours have other {what} for {case.name}")


def check_reply(
    case: Case,
    sample: Sample,
    side: tuple[VisionLanguageModel, Tokenizer, TextProcessor],
    theirs: list[int],
) -> None:
    """Raise ValueError unless both models say the same to the first turn, greedily."""
    model, tokenizer, text = side
    grids = [grid_of(*size, model.config) for size in case.sizes]
    prompt = text.document([(case.turns[0][0], "")], grids)
    tiles = torch.from_numpy(sample.images)
    (said,) = generate(model, tiles, [prompt], tokenizer.eos_id, max_new_tokens=NEW)
    if said != theirs:
        raise ValueError(f"nanoVLM says {theirs} and ours {said} for {case.name}")


def pixels_off(sample: Sample, theirs: Tensor) -> float:
    """The largest difference of a pixel in [0, 1]."""
    if not len(theirs):
        return 0.0
    return float((torch.from_numpy(sample.images).float() / 255 - theirs).abs().max())


def batch_of(samples: list[Sample]) -> PackedBatch:
    tokens = sum(sample.tokens for sample in samples)
    return pack(samples, Budget.measure(samples, tokens), CONFIG.image_tokens, CONFIG.vit_img_size)


def leaky(batch: PackedBatch) -> PackedBatch:
    """The batch as nanoVLM packs it: one document, positions that count a pad token after each.

    That token itself is left out: nothing attends to it, and it carries no label.
    """
    batch = batch.trimmed()
    starts = batch.cu_seqlens[:-1].long()
    lengths = batch.cu_seqlens.diff().long()
    pads = torch.repeat_interleave(torch.arange(len(starts)), lengths)
    return dataclasses.replace(
        batch,
        position_ids=(torch.arange(batch.n_tokens) + pads).int(),
        cu_seqlens=torch.tensor([0, batch.n_tokens], dtype=torch.int32),
        max_seqlen=batch.n_tokens,
    )


def step(model: VisionLanguageModel, batch: PackedBatch) -> dict[str, Tensor]:
    """Mean loss, logits at labelled positions, and every gradient by the reference's name."""
    batch = batch.trimmed() if batch.n_documents > 1 else batch
    model.zero_grad(set_to_none=True)
    real = batch.labels != IGNORE
    with torch.no_grad():
        logits = model.logits(batch)[real]
    loss = model(batch) / int(real.sum())
    loss.backward()
    grads: dict[str, Any] = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in model.named_parameters()
    }
    named = model.by_reference_name(grads)
    return {"loss": loss.detach(), "logits": logits} | {f"grad:{n}": g for n, g in named.items()}


def differences(
    mine: dict[str, Tensor], theirs: dict[str, Tensor], loss: float
) -> dict[str, float]:
    """Relative differences of logits (to the largest), loss and the worst gradient."""
    names = {name for name in theirs if name.startswith("grad:")}
    if names != {name for name in mine if name.startswith("grad:")}:
        raise ValueError("nanoVLM's gradients are not of the same weights")
    largest = max(theirs[name].norm().item() for name in names)
    worst = 0.0
    for name in names:
        size = max(theirs[name].norm().item(), 1e-6 * largest)  # of a tower without an image: zero
        worst = max(worst, (mine[name] - theirs[name]).norm().item() / size)
    off = (mine["logits"] - theirs["logits"]).abs().max() / theirs["logits"].abs().max()
    relative_loss = abs(mine["loss"].item() / loss - 1)
    return {"logits": off.item(), "loss": relative_loss, "gradient": worst}


def table(result: dict[str, dict[str, float]]) -> str:
    """The differences, one line per case."""
    lines = []
    for name, found in result.items():
        said = ", ".join(f"{what} {value:.1e}" for what, value in found.items())
        lines.append(f"  {name}: {said}")
    head = "conversations, same ids and labels; relative differences in float32, pixels in [0, 1]:"
    return "\n".join([head, *lines])
