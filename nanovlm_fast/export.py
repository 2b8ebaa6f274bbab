"""Checkpoints for others: a folder that transformers loads without remote code, or one that nanoVLM v0.1 loads.

    python -m nanovlm_fast.export --checkpoint RUN --to transformers --out FOLDER

transformers' SmolVLM architecture (Marafioti et al., 2025) is the same function: SigLIP tower, pixel shuffle, linear
projector, Llama decoder. Its own processor puts tokens around an image that this model never saw; the one exported
here repeats `<image>` and nothing else. Two things are transformers' own: an image of zeros is taken for padding (where
`image_mean` is 0, a plain black picture beside others in one batch is not seen), and with torchvision installed it is
torchvision that resizes, one level of 255 off in about a thousandth of the pixels.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError

from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.data.text import is_hub_name
from nanovlm_fast.files import read_json
from nanovlm_fast.paths import at_home
from nanovlm_fast.weights.card import model_card
from nanovlm_fast.weights.folder import load_pretrained, resolve
from nanovlm_fast.weights.hub import push_to_hub
from nanovlm_fast.weights.to_nanovlm import to_nanovlm
from nanovlm_fast.weights.to_transformers import (
    to_transformers,
)

# ---- the command
TARGETS = ("transformers", "nanovlm")


def export(
    checkpoint: Path | str | None,
    target: str,
    out: Path,
    name: str = "",
    lm_tokenizer: str = "",
) -> Path:
    """Write the checkpoint in the layout of `target` with a model card; returns `out`, which appears whole or not.

    `name` is what it will be loaded by (default: `out`): nanoVLM loads a tokenizer of the model's own by it.
    `lm_tokenizer` is taken instead of the checkpoint's tokenizer.
    Raises ValueError if `out` holds files or the target cannot express the model, and what `load_pretrained` raises.
    """
    place = out.resolve()
    if place == Path.cwd():
        raise ValueError(f"--out '{out}' is the folder that you are in: name a new one")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty: --out names another folder")
    folder = resolve(checkpoint)
    model, tokenizer = load_pretrained(folder, lm_tokenizer=lm_tokenizer)
    model.eval()
    loaded_by = name or str(place)
    if not is_hub_name(model.config.lm_tokenizer):
        model.config = dataclasses.replace(model.config, lm_tokenizer=loaded_by)
    temporary = place.with_name(f".{place.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        if target == "transformers":
            to_transformers(temporary, model, tokenizer)
        else:
            to_nanovlm(temporary, model, tokenizer, loaded_by)
        card = model_card(folder, target, model, name or place.name)
        (temporary / "README.md").write_text(card)
        os.replace(temporary, place)
    except SafetensorError as error:  # a full disk among others
        raise OSError(f"{out} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def names_a_place(folder: Path) -> bool:
    """Whether a folder in nanoVLM's layout names a place on this machine for its tokenizer."""
    return Path(read_json(folder / "config.json")["lm_tokenizer"]).is_absolute()


def make_parser() -> Parser:
    parser = Parser(prog="python -m nanovlm_fast.export", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", help="run, RUN/best, model folder or hub name; default: the latest run"
    )
    parser.add_argument("--to", required=True, choices=TARGETS)
    parser.add_argument("--out", required=True, type=at_home, help="folder to write")
    parser.add_argument(
        "--push", default="", metavar="OWNER/NAME", help="upload it to the Hugging Face hub too"
    )
    parser.add_argument(
        "--private", action="store_true", help="the repository that --push makes is private"
    )
    parser.add_argument("--lm-tokenizer", default="", help="hub name or folder; default: its own")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    out = export(args.checkpoint, args.to, args.out, args.push, args.lm_tokenizer)
    print(f"written: {out}")
    if args.to == "nanovlm" and names_a_place(out):
        print(
            "nanoVLM looks for the tokenizer here, by lm_tokenizer in config.json: once it has "
            "moved, write the new place there; --push writes the hub's name"
        )
    if args.push:
        print(f"uploaded: {push_to_hub(args.out, args.push, args.private)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
