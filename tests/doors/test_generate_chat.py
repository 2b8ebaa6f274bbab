"""generate with models that read conversations and tiles, against the padded reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from nanovlm_fast import generate as generating
from nanovlm_fast.data.images import split_image
from nanovlm_fast.model import reference
from nanovlm_fast.weights.pretrained import load_pretrained
from tests.support.tiles import write_generation

NEW = 6


def picture(file: Path, width: int, height: int) -> Path:
    rng = np.random.default_rng(width)
    small = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    small.resize((width, height), Image.Resampling.BICUBIC).save(file)
    return file


def image_string(grids: list[tuple[int, int]], names: dict[str, str]) -> str:
    """As nanoVLM's main writes it, for models with a global token, and as 450M has it without."""
    said = ""
    for number, (rows, columns) in enumerate(grids):
        said += f"<image: {number}>" if len(grids) > 1 else ""
        if "global_image_token" not in names:
            said += names["image_token"] * 4
            continue
        said += names["global_image_token"] + names["image_token"] * 4
        if (rows, columns) != (1, 1):
            for row in range(1, rows + 1):
                for column in range(1, columns + 1):
                    said += names[f"r{row}c{column}"] + names["image_token"] * 4
    return said


def by_the_reference(folder: Path, files: list[Path], question: str) -> str:
    """The greedy reply, by the padded reference and transformers' tokenizer and template."""
    model, _ = load_pretrained(folder / "model")
    config = model.config
    plain = reference.VisionLanguageModel(config)
    plain.load_state_dict(model.reference_state_dict())
    theirs = AutoTokenizer.from_pretrained(
        folder / "tokenizer",
        extra_special_tokens=dict(config.vlm_extra_tokens),
        chat_template=config.lm_chat_template,
    )
    cut = [split_image(file, config) for file in files]
    content = image_string([grid for _, grid in cut], config.vlm_extra_tokens) + question
    ids = theirs.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=False
    )
    pixels = torch.from_numpy(np.concatenate([tiles for tiles, _ in cut])).float() / 255
    image_id = theirs.convert_tokens_to_ids(config.vlm_extra_tokens["image_token"])
    reply: list[int] = []
    with torch.no_grad():
        for _ in range(NEW):
            row = torch.tensor([ids + reply])
            shown = row == image_id
            rows = torch.where(shown, shown.cumsum(1) - 1, -1)
            assert int(shown.sum()) == len(pixels) * config.image_tokens
            logits, _ = plain(row, pixels, None, None, rows)
            token = int(logits[0, -1].argmax())
            if token == theirs.eos_token_id:
                break
            reply.append(token)
    return theirs.decode(reply, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("230M-8k", [(128, 96)]),
        ("460M-8k, not enlarged", [(30, 20), (64, 120)]),
        ("450M", [(128, 96), (40, 40)]),
    ],
)
def test_the_command_says_what_the_reference_says(tmp_path, capsys, name, sizes):
    write_generation(tmp_path, name)
    files = [picture(tmp_path / f"{i}.png", *size) for i, size in enumerate(sizes)]
    options = ["--checkpoint", str(tmp_path / "model"), "--max-new-tokens", str(NEW)]
    for file in files:
        options += ["--image", str(file)]
    question = "what is it?"
    assert generating.main([*options, "--prompt", question, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said == by_the_reference(tmp_path, files, question) + "\n"


def test_a_broken_picture_is_one_line(tmp_path, capsys):
    write_generation(tmp_path, "230M-8k")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    options = ["--checkpoint", str(tmp_path / "model"), "--image", str(tmp_path / "broken.png")]
    assert generating.main([*options, "--prompt", "what?"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "broken.png" in error
