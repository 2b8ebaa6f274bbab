"""Model cards."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from nanovlm_fast.config import TrainConfig, fields_of
from nanovlm_fast.data.images import to_rgb
from nanovlm_fast.data.text import is_hub_name
from nanovlm_fast.files import read_json
from nanovlm_fast.paths import without_path


def measured(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(result.json, config.json) of the run that `checkpoint` is the end of, or two empty dicts.

    The numbers are those of the run's last step; another of its checkpoints has none.
    """
    run = checkpoint.resolve().parent.parent
    try:
        result = read_json(run / "result.json")
        if read_json(checkpoint / "state.json").get("step") == result.get("step"):
            return result, read_json(run / "config.json")
    except FileNotFoundError:
        pass
    return {}, {}


NOT_FOR_CARDS = frozenset(
    "out resume overwrite device wandb wandb_project vision language start_from".split()
)

# Between the marks stands code: the test of the cards runs it
TRANSFORMERS = """```python
import numpy as np
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor


TO_RGB


model, processor = (auto.from_pretrained("FOLDER") for auto in (AutoModelForImageTextToText, AutoProcessor))
image = to_rgb(Image.open("picture.png"))
inputs = processor(text="PROMPT", images=image, return_tensors="pt")
print(processor.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

`to_rgb` is how pictures were read in training. The processor alone, given a picture that is turned
by an EXIF tag or holds 16 or 32 bits a pixel, sees another one."""

NANOVLM = """```python
from models.vision_language_model import VisionLanguageModel  # github.com/huggingface/nanoVLM, v0.1

model = VisionLanguageModel.from_pretrained("FOLDER")
```

TOKENIZER

nanovlm_fast takes it as `--checkpoint FOLDER`, or as `train.py --start-from FOLDER`.

nanoVLM reads pictures with `convert("RGB")`. In training transparency was composited onto white,
pictures were turned upright by their EXIF tag, and 16 bits of grey were scaled:
`to_rgb(Image.open(file))` in its place does that.

```python
import numpy as np
from PIL import Image, ImageOps


TO_RGB
```"""


def usage(target: str, config: Any, name: str) -> str:
    """How a model that is loaded by `name` is used from the library that it was exported for."""
    text = {"transformers": TRANSFORMERS, "nanovlm": NANOVLM}[target]
    if Path(config.lm_tokenizer).is_absolute():
        tokenizer = (
            "nanoVLM loads the tokenizer by `lm_tokenizer` in `config.json`, which is the folder "
            "that this was written to. Moved elsewhere, write the new place there."
        )
    else:
        name_there = f"`{config.lm_tokenizer}`"
        tokenizer = f"nanoVLM loads the tokenizer by its name in `config.json`, {name_there}."
    prompt = "<image>" + config.prompt.format(question="What is it?")
    for mark, said in (
        ("TO_RGB", inspect.getsource(to_rgb).strip()),
        ("TOKENIZER", tokenizer),
        ("FOLDER", name),
        ('"PROMPT"', json.dumps(prompt, ensure_ascii=False)),
    ):
        text = text.replace(mark, said)
    return text


def model_card(checkpoint: Path, target: str, model: Any, name: str) -> str:
    """README.md of an exported checkpoint: what it is, how to load it, and the numbers its run measured."""
    from huggingface_hub import EvalResult, ModelCardData

    result, run = measured(checkpoint)
    config = model.config
    size = f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters"
    lines = [
        f"# {Path(name).name}",
        "",
        f"A vision-language model of nanoVLM's architecture, {size}, trained with",
    ]
    lines += ["nanovlm_fast.", "", usage(target, config, name), ""]
    evals = []
    if result.get("seeing", {}).get("questions"):  # or nothing was asked, or could be
        data = without_path(run["data"])
        split = f"{result['split']} of {data}"
        lines += [
            f"## Measured at the end of the run, {split}",
            "",
            "| | exact match by generation |",
            "| --- | --- |",
        ]
        for sight, what in (("seeing", "with the images"), ("blind", "every image painted grey")):
            score = result[sight]
            lines.append(
                f"| {what} | {score['accuracy']:.1%} of {score['questions']:,} questions |"
            )
        lines += [
            "",
            f"{result['step']:,} optimizer steps, {result['seconds'] / 60:.1f} minutes of training.",
            "",
        ]
        options = {
            name: value
            for name, value in fields_of(TrainConfig, run).items()
            if name not in NOT_FOR_CARDS
        }
        options |= {
            name: without_path(options[name]) for name in ("data", "eval") if name in options
        }
        lines += ["## Options of the run", "", "```json", json.dumps(options, indent=2), "```", ""]
        score = dict(
            metric_type="accuracy",
            metric_name="exact match",
            metric_value=result["seeing"]["accuracy"],
        )
        evals.append(
            EvalResult("visual-question-answering", dataset_type=data, dataset_name=split, **score)
        )
    sizes = dict(vars(config))
    if not is_hub_name(config.lm_tokenizer):
        del sizes["lm_tokenizer"]
    lines += ["## Sizes", "", "```json", json.dumps(sizes, indent=2), "```", ""]
    head = dict(
        library_name=target,
        pipeline_tag="image-text-to-text",
        tags=["vision-language", "nanovlm_fast"],
    )
    data_of_card = ModelCardData(**head, model_name=Path(name).name, eval_results=evals or None)
    return f"---\n{data_of_card.to_yaml()}\n---\n\n" + "\n".join(lines)
