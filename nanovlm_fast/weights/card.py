"""Model cards: the README.md of an exported checkpoint.

A card says how the model is loaded, how pictures must be read for it, what its run measured, and
with which options it was trained.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from nanovlm_fast.config import TrainConfig, VLMConfig, fields_of
from nanovlm_fast.data.chat import END, START
from nanovlm_fast.data.images import to_rgb
from nanovlm_fast.data.places import without_path
from nanovlm_fast.data.text import is_hub_name
from nanovlm_fast.files import read_json
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.weights.folder import fields_to_store
from nanovlm_fast.weights.tiled_usage import cut, image_string


def measured(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return result.json and config.json of the run that ended with `checkpoint`.

    Otherwise two empty dicts: the results belong to the run's last step, and no other checkpoint of
    it (such as the best) may claim them.
    """
    run = checkpoint.resolve().parent.parent
    try:
        result = read_json(run / "result.json")
        if read_json(checkpoint / "state.json").get("step") == result.get("step"):
            return result, read_json(run / "config.json")
    except FileNotFoundError:
        pass
    return {}, {}


# Options that say nothing about the model, or that may hold a path of the machine.
HIDDEN_OPTIONS = frozenset(
    {
        "out",
        "resume",
        "overwrite",
        "device",
        "wandb",
        "wandb_project",
        "vision",
        "language",
        "start_from",
    }
)

# How the model is used, per target. `usage` replaces the words in capitals. A test runs the code of
# both, and TO_RGB is the source of `to_rgb` itself, so that a card cannot go out of date.
TRANSFORMERS_USAGE = """```python
import numpy as np
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor


TO_RGB


model = AutoModelForImageTextToText.from_pretrained("FOLDER")
processor = AutoProcessor.from_pretrained("FOLDER")
image = to_rgb(Image.open("picture.png"))
inputs = processor(text="PROMPT", images=image, return_tensors="pt")
reply = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(reply, skip_special_tokens=True))
```

`to_rgb` is how pictures were read in training. Without it the processor sees other pixels in a
picture that is turned by an EXIF tag, has transparency, or has 16 or 32 bits per pixel.

In training, special tokens that a question spells out (`<|endoftext|>`) were text. The processor
takes them for control tokens; pass `split_special_tokens=True` for a question that may hold some,
and put the image token before it yourself."""

TILES_USAGE = """```python
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoTokenizer


TO_RGB


CUT


IMAGE_STRING


model = AutoModelForImageTextToText.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
names = NAMES
pictures = [to_rgb(Image.open(file)) for file in ["picture.png"]]
shown = [cut(picture, SIZES) for picture in pictures]
text = image_string([grid for _, grid in shown], names, TOKENS) + "What is it?"
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": text}],
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="pt",
)
pixels = torch.cat([tiles for tiles, _ in shown])[None]
reply = model.generate(**inputs, pixel_values=pixels)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(reply, skip_special_tokens=True))
```

transformers has no processor that cuts pictures as this model was trained to read them, so the
functions above do it. Text alone needs no `pixel_values`. A question that holds special tokens
(`<|im_end|>`) would forge them: leave such text out."""

NANOVLM_USAGE = """```python
from models.vision_language_model import VisionLanguageModel  # github.com/huggingface/nanoVLM, TAG

model = VisionLanguageModel.from_pretrained("FOLDER")
```

TOKENIZER

nanovlm_fast loads it with `--checkpoint FOLDER`, and trains it further with
`train.py --start-from FOLDER`.

nanoVLM reads pictures with `convert("RGB")`. For this model's training, transparency was
composited onto white, pictures were turned upright by their EXIF tag, and 16 bits of grey were
scaled to 8. `to_rgb(Image.open(file))` in place of `convert("RGB")` does the same.

```python
import numpy as np
from PIL import Image, ImageOps


TO_RGB
```"""

GGUF_USAGE = """```bash
llama-server -m FOLDER/model.gguf                                # text only
llama-quantize FOLDER/model.gguf FOLDER/model-q8.gguf Q8_0
```

`model.gguf` is the language model with its tokenizer and chat template, `mmproj.gguf` the vision
tower with the projector, which llama.cpp calls idefics3. Both are in float32.

llama.cpp's own prompt for images (`llama-mtmd-cli`, `--mmproj`) is SmolVLM's and cannot be changed:
it puts tokens around images that this model does not have, shows a picture as a whole after its
tiles, and resizes it in another way. This model was trained on

```text
SHOWN
```

where `[TILE]` stands for the TOKENS embeddings that `mmproj.gguf` gives for one of `pixels`:

```python
import math

import numpy as np
import torch
from PIL import Image, ImageOps


TO_RGB


CUT


tiles, grid = cut(to_rgb(Image.open("picture.png")), SIZES)
pixels = (tiles - 1 / 255 - MEAN) / STD
```

A program that calls llama.cpp's library decodes the text before a tile, then the embeddings."""


def shown(config: VLMConfig) -> str:
    """Return the prompt that shows a model one picture, of two tiles if it cuts pictures."""
    question = "What is it?"
    if not config.lm_chat_template:
        return f"[TILE]{config.prompt.format(question=question)}"
    names = {**config.vlm_extra_tokens, "image_token": "[TILE]"}
    images = image_string([(1, 2) if config.max_img_size else (1, 1)], names, 1)
    return f"{START}user\n{images}{question}{END}\n{START}assistant\n"


def usage(target: str, config: VLMConfig, name: str) -> str:
    """Return how a model that is loaded by `name` is used from the library of `target`."""
    texts = {"transformers": TRANSFORMERS_USAGE, "nanovlm": NANOVLM_USAGE, "gguf": GGUF_USAGE}
    text = texts[target]
    if target == "transformers" and config.vlm_extra_tokens:
        text = TILES_USAGE
    if Path(config.lm_tokenizer).is_absolute():
        tokenizer = (
            "nanoVLM loads the tokenizer by `lm_tokenizer` in `config.json`, which is the folder "
            "that this was written to. If the folder moves, write its new place there."
        )
    else:
        name_there = f"`{config.lm_tokenizer}`"
        tokenizer = f"nanoVLM loads the tokenizer by its name in `config.json`, {name_there}."
    prompt = "<image>" + config.prompt.format(question="What is it?")
    sizes = config.vit_img_size, config.max_img_size, config.resize_to_max_side_len
    replacements = {
        # First: the sources below may hold any of the words that follow.
        "SIZES": ", ".join(map(str, (*sizes, config.has_global_tile))),
        "TOKENS)": f"{config.image_tokens})",
        "TOKENS embeddings": f"{config.image_tokens} embeddings",
        "MEAN) / STD": f"{config.image_mean}) / {config.image_std}",
        "NAMES": json.dumps(dict(config.vlm_extra_tokens), ensure_ascii=False, indent=4),
        "CUT": inspect.getsource(cut).strip(),
        "IMAGE_STRING": inspect.getsource(image_string).strip(),
        "TO_RGB": inspect.getsource(to_rgb).strip(),
        "TOKENIZER": tokenizer,
        "TAG": "main" if config.vlm_extra_tokens else "v0.1",
        "FOLDER": name,
        # Last, as a prompt may contain any of the words above.
        '"PROMPT"': json.dumps(prompt, ensure_ascii=False),
        "SHOWN\n": f"{shown(config)}\n",
    }
    for mark, replacement in replacements.items():
        text = text.replace(mark, replacement)
    return text


def model_card(checkpoint: Path, target: str, model: VisionLanguageModel, name: str) -> str:
    """Return the README.md of an exported checkpoint."""
    from huggingface_hub import EvalResult, ModelCardData

    result, run = measured(checkpoint)
    config = model.config
    count = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"# {Path(name).name}",
        "",
        f"A vision-language model of nanoVLM's architecture, {count:,} parameters, trained with",
        "nanovlm_fast.",
        "",
        usage(target, config, name),
        "",
    ]
    evals = None
    # Without a question there is no score: the run had no final evaluation, or nothing in its split
    # could be asked.
    if result.get("seeing", {}).get("questions"):
        data = without_path(run["data"])
        split = f"{result['split']} of {data}"
        lines += [*_measured_lines(result, split), *_options_lines(run)]
        score = EvalResult(
            "visual-question-answering",
            dataset_type=data,
            dataset_name=split,
            metric_type="accuracy",
            metric_name="exact match",
            metric_value=result["seeing"]["accuracy"],
        )
        evals = [score]
    sizes = fields_to_store(config)
    if not is_hub_name(config.lm_tokenizer):
        del sizes["lm_tokenizer"]  # a path of this machine
    lines += ["## Sizes", "", "```json", json.dumps(sizes, indent=2), "```", ""]
    head = ModelCardData(
        library_name={"gguf": "llama.cpp"}.get(target, target),
        pipeline_tag="image-text-to-text",
        tags=["vision-language", "nanovlm_fast"],
        model_name=Path(name).name,
        eval_results=evals,
    )
    return f"---\n{head.to_yaml()}\n---\n\n" + "\n".join(lines)


def _measured_lines(result: dict[str, Any], split: str) -> list[str]:
    lines = [
        f"## Measured at the end of the run, {split}",
        "",
        "| | exact match by generation |",
        "| --- | --- |",
    ]
    for sight, what in (("seeing", "with the images"), ("blind", "every image painted grey")):
        score = result[sight]
        lines.append(f"| {what} | {score['accuracy']:.1%} of {score['questions']:,} questions |")
    minutes = result["seconds"] / 60
    lines += ["", f"{result['step']:,} optimizer steps, {minutes:.1f} minutes of training.", ""]
    return lines


def _options_lines(run: dict[str, Any]) -> list[str]:
    options = fields_of(TrainConfig, run)
    for name in HIDDEN_OPTIONS & options.keys():
        del options[name]
    for name in ("data", "eval"):
        if name in options:
            options[name] = without_path(options[name])
    return ["## Options of the run", "", "```json", json.dumps(options, indent=2), "```", ""]
