"""Exporting checkpoints: to a folder that transformers, nanoVLM or llama.cpp loads.

    python -m nanovlm_fast.export --checkpoint RUN --to transformers --out FOLDER
    python -m nanovlm_fast.export --checkpoint RUN --merge --to transformers --out FOLDER

What they have in common is here; `weights/to_transformers.py`, `weights/to_nanovlm.py` and
`weights/to_gguf.py` write the files.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError

from nanovlm_fast.command import Parser, add_model_options, reports_errors
from nanovlm_fast.data.text import is_hub_name
from nanovlm_fast.files import read_json
from nanovlm_fast.paths import at_home
from nanovlm_fast.weights.adapter import is_adapter
from nanovlm_fast.weights.card import model_card
from nanovlm_fast.weights.folder import resolve
from nanovlm_fast.weights.hub import push_to_hub
from nanovlm_fast.weights.pretrained import load_pretrained
from nanovlm_fast.weights.to_gguf import to_gguf
from nanovlm_fast.weights.to_nanovlm import to_nanovlm
from nanovlm_fast.weights.to_transformers import to_transformers

TARGETS = ("transformers", "nanovlm", "gguf")


def export(
    checkpoint: Path | str | None,
    target: str,
    out: Path,
    name: str = "",
    lm_tokenizer: str = "",
    merge: bool = False,
) -> Path:
    """Write a checkpoint in the layout of `target`, with a model card, and return `out`.

    The folder appears as a whole or not at all.

    Args:
        name: what the folder will be loaded by (default: its path). nanoVLM loads a tokenizer of
            the model's own by it.
        lm_tokenizer: a tokenizer to use instead of the checkpoint's.
        merge: whether an adapter may be merged into its base. The layouts have no place for it
            by itself.

    Raises:
        ValueError: if `out` holds files, if `target` cannot express the model, or for an adapter
            that is not to be merged.
        OSError: if the folder cannot be written; and whatever `load_pretrained` raises.
    """
    place = out.resolve()
    # Replacing it would leave the shell in a deleted folder.
    if place == Path.cwd():
        raise ValueError(f"--out '{out}' is the folder that you are in: name a new one")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty: --out names another folder")
    folder = resolve(checkpoint)
    if is_adapter(folder) and not merge:
        raise ValueError(
            f"{folder} holds an adapter: --merge writes its base with the adapter merged into it"
        )
    model, tokenizer = load_pretrained(folder, lm_tokenizer=lm_tokenizer)
    model.eval()
    loaded_by = name or str(place)
    # The model's tokenizer is written into the folder, so the old path of it means nothing there.
    if not is_hub_name(model.config.lm_tokenizer):
        model.config = dataclasses.replace(model.config, lm_tokenizer=loaded_by)
    # Beside `out` and not in /tmp: a rename must stay within one file system.
    temporary = place.with_name(f".{place.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        if target == "transformers":
            to_transformers(temporary, model, tokenizer)
        elif target == "gguf":
            to_gguf(temporary, model, tokenizer)
        else:
            to_nanovlm(temporary, model, tokenizer, loaded_by)
        card = model_card(folder, target, model, name or place.name)
        (temporary / "README.md").write_text(card)
        os.replace(temporary, place)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"{out} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def names_a_place(folder: Path) -> bool:
    """Return whether a folder in nanoVLM's layout names its tokenizer by a path."""
    return Path(read_json(folder / "config.json")["lm_tokenizer"]).is_absolute()


def make_parser() -> Parser:
    """Return the parser of `python -m nanovlm_fast.export`."""
    parser = Parser(
        prog="python -m nanovlm_fast.export",
        description="Write a checkpoint for transformers, nanoVLM or llama.cpp (gguf).",
    )
    add_model_options(parser, device=False)
    parser.add_argument("--to", required=True, choices=TARGETS, help="what is to load it")
    parser.add_argument("--out", required=True, type=at_home, help="folder to write, new or empty")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="merge an adapter (--lora-rank) into its base; needed for a checkpoint that holds one",
    )
    parser.add_argument(
        "--push", default="", metavar="OWNER/NAME", help="also upload it to the Hugging Face hub"
    )
    parser.add_argument(
        "--private", action="store_true", help="make the repository of --push private"
    )
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    """Write the folder, upload it with --push, and say where it is."""
    args = make_parser().parse_args(argv)
    out = export(args.checkpoint, args.to, args.out, args.push, args.lm_tokenizer, merge=args.merge)
    print(f"written: {out}")
    if args.to == "nanovlm" and names_a_place(out):
        print(
            "nanoVLM loads the tokenizer from this path, which is lm_tokenizer in config.json: "
            "if you move the folder, change it there; --push writes the hub's name"
        )
    if args.to == "gguf":
        print(
            "llama.cpp's own image prompt has tokens that this model was not trained with: how to "
            "show it images is in README.md"
        )
    if args.push:
        print(f"uploaded: {push_to_hub(args.out, args.push, args.private)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
