"""The process that runs huggingface/nanoVLM's `main` on conversations, from a checkout.

`run(CHECKOUT, FOLDER)` is called in a process of its own, because the checkout's modules are named
`models` and `data`. FOLDER holds `model/`, written by `export --to nanovlm`, and `cases.json`: for
each case its turns and the files of its pictures; `tiles.safetensors` has our tiles. Written are
`theirs.json` and, for each case, `theirs-N.safetensors`. All that is compared comes from the
checkout's own classes:

| from | what |
| --- | --- |
| `models.vision_language_model` | `VisionLanguageModel.from_pretrained` |
| `data.processors` | `get_tokenizer`, `get_image_processor` |
| `data.datasets` | `VQADataset`: image strings, token ids, labels |
| `data.advanced_datasets` | `ConstantLengthDataset`: how a pack is put together |
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

NEW = 12  # tokens of a reply


def run(checkout: str, place: str) -> None:
    """Write what the checkout makes of the cases in the folder `place`."""
    with contextlib.redirect_stdout(io.StringIO()):  # the checkout's code prints
        _run(checkout, Path(place))


def _run(checkout: str, folder: Path) -> None:
    sys.path.insert(0, checkout)
    torch.set_num_threads(1)
    models = importlib.import_module("models.vision_language_model")
    processors = importlib.import_module("data.processors")
    datasets = importlib.import_module("data.datasets")
    model = models.VisionLanguageModel.from_pretrained(str(folder / "model"))
    config = model.cfg
    tokenizer = processors.get_tokenizer(
        config.lm_tokenizer, config.vlm_extra_tokens, config.lm_chat_template
    )
    as_transformers_4(tokenizer)
    images = processors.get_image_processor(
        config.max_img_size, config.vit_img_size, config.resize_to_max_side_len
    )
    maker = datasets.VQADataset([], tokenizer, images, config.mp_image_token_length)
    tiles = load_file(folder / "tiles.safetensors")
    found = []
    samples = []
    for number, case in enumerate(json.loads((folder / "cases.json").read_text())):
        sample = maker._process_data(item_of(folder, case))
        pixels = tiles[str(number)].float() / 255
        outcome, tensors = step(model, sample, pixels)
        outcome["reply"] = reply(model, tokenizer, maker, case, pixels)
        tensors["pixels"] = torch.cat(sample["images"]) if sample["images"] else torch.zeros(0)
        save_file(tensors, folder / f"theirs-{number}.safetensors")
        found.append(outcome)
        samples.append({**sample, "pixels": pixels})
    several = [sample["pixels"] for sample in samples if len(sample["pixels"])]
    shown = torch.cat(several) if several else torch.zeros(0)
    outcome, tensors = step(model, packed(tokenizer, maker, samples), shown)
    save_file(tensors, folder / "theirs-pack.safetensors")
    (folder / "theirs.json").write_text(json.dumps({"cases": found, "pack": outcome}))


def as_transformers_4(tokenizer: Any) -> None:
    """Make `apply_chat_template` return ids, as it did when the checkout's code was written.

    Since transformers 5 it returns a dict unless told otherwise, whose length that code would take
    for the number of tokens.
    """
    original = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = functools.partial(original, return_dict=False)


def item_of(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """A row of FineVision's schema."""
    return {
        "images": [Image.open(folder / file).convert("RGB") for file in case["images"]],
        "texts": [{"user": user, "assistant": reply} for user, reply in case["turns"]],
    }


def step(
    model: torch.nn.Module, sample: dict[str, Any], pixels: Tensor
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Loss, and logits at labelled positions, ids, labels and every gradient, of one row."""
    model.zero_grad(set_to_none=True)
    ids = sample["input_ids"][None]
    labels = sample["labels"][None]
    mask = sample["attention_mask"][None]
    shown = [pixels] if len(pixels) else []
    logits, loss = model(ids, shown, attention_mask=mask, targets=labels)
    loss.backward()
    tensors = {
        f"grad:{name}": torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in model.named_parameters()
    }
    labelled = labels[0] != -100
    tensors |= {"logits": logits[0][labelled].detach(), "ids": ids[0], "labels": labels[0]}
    return {"loss": loss.item()}, {name: t.contiguous().clone() for name, t in tensors.items()}


def reply(
    model: Any, tokenizer: Any, maker: Any, case: dict[str, Any], pixels: Tensor
) -> list[int]:
    """What the model says to the first turn, greedily: NEW tokens at most, without the end."""
    messages = maker._get_messages(
        {"texts": [{"user": case["turns"][0][0], "assistant": ""}]}, case["grids"]
    )
    ids = tokenizer.apply_chat_template(messages[:1], tokenize=True, add_generation_prompt=True)
    shown = [pixels] if len(pixels) else []
    said = model.generate(torch.tensor([ids]), shown, max_new_tokens=NEW, greedy=True)[0].tolist()
    end = tokenizer.eos_token_id
    return said[: said.index(end)] if end in said else said


def packed(tokenizer: Any, maker: Any, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """All samples in one pack, each with a pad token behind it, as its producer puts them there."""
    advanced = importlib.import_module("data.advanced_datasets")
    rows = []
    pads = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
    for sample in samples:
        ended = {name: torch.cat([sample[name], torch.tensor([pad])]) for name, pad in pads.items()}
        rows.append({**ended, "images": sample["images"]})
    length = sum(len(row["input_ids"]) for row in rows)
    packer = advanced.ConstantLengthDataset(maker, seq_length=length)
    pack = packer._pack_one_group(range(len(rows)), rows, length)
    return dict(zip(("input_ids", "labels", "attention_mask", "images"), pack, strict=True))
