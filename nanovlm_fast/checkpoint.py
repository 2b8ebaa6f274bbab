"""Checkpoints: a model folder with nanoVLM's weight names, and beside it what a run needs to continue exactly.

    RUN/checkpoints/step-000500/   config.json model.safetensors tokenizer.json tokenizer_config.json
                                   optimizer.safetensors state.json
    RUN/last, RUN/best             links to two of them

A checkpoint is written to a temporary folder and renamed: a folder named step-* is complete. No pickle anywhere.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanovlm_fast.config import VLMConfig, fields_of, latest_run
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.hub import WEIGHTS, fetch
from nanovlm_fast.model import VisionLanguageModel

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def save_pretrained(folder: Path, model: VisionLanguageModel, tokenizer: Tokenizer | None = None) -> None:
    """Write config.json, model.safetensors (nanoVLM's keys; tied weights once) and the tokenizer into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.reference_state_dict()
    if model.config.lm_tie_weights:
        del state["decoder.head.weight"]
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, folder / "model.safetensors"
    )
    values = {**model.extra_config, **dataclasses.asdict(model.config)}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder)


def load_pretrained(
    checkpoint: Path | str | None = None, device: str | torch.device = "cpu"
) -> tuple[VisionLanguageModel, Tokenizer]:
    """Model and tokenizer of a checkpoint folder, a run folder (its last checkpoint), or the latest run.

    Raises FileNotFoundError if there is nothing there and ValueError, naming the file or the weights, if it is damaged
    or does not fit its configuration.
    """
    folder = resolve(checkpoint)
    model = load_model(folder)
    name = model.config.lm_tokenizer
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").exists() else Tokenizer.from_hub(name)
    return model.to(device), tokenizer


def load_model(folder: Path) -> VisionLanguageModel:
    """The model of a folder that `resolve` gave, on the CPU. Raises what `load_pretrained` raises."""
    config, extra = read_config(folder)
    if extra:
        warnings.warn(f"{folder / 'config.json'}: fields not used here: {', '.join(sorted(extra))}", stacklevel=3)
    try:
        model = VisionLanguageModel(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is not a model configuration: {error}") from error
    model.extra_config = extra
    model.load_reference_state_dict(load_tensors(folder / "model.safetensors"))
    return model


def read_config(folder: Path) -> tuple[VLMConfig, dict[str, Any]]:
    """Model configuration of a checkpoint folder, and the entries of its config.json that are no fields of it.

    Raises ValueError if the file is damaged, or asks for a model that differs from the one here.
    """
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text())
        extra = {name: value for name, value in values.items() if name not in fields_of(VLMConfig, values)}
        config = VLMConfig(**fields_of(VLMConfig, values)).validate()
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a model configuration: {error}") from error
    for name, same in (("vit_cls_flag", False), ("lm_attn_scaling", 1.0)):  # nanoVLM's, at what the model here does
        if extra.get(name, same) != same:
            raise ValueError(f"{file}: {name} = {extra[name]}, only {same} is supported")
    return config, extra


def resolve(checkpoint: Path | str | None) -> Path:
    """The folder that holds model.safetensors: `checkpoint` itself, the newest checkpoint of a run, or a hub name's.

    None is the latest run. Raises FileNotFoundError naming what was looked for, OSError if the hub did not give it,
    and ValueError for weights that are a pickle: reading one can run any code.
    """
    folder = Path(checkpoint) if checkpoint is not None else latest_run()
    if isinstance(checkpoint, str) and not folder.exists() and not folder.parent.is_dir():
        folder = fetch(checkpoint, *WEIGHTS)
    if (folder / "model.safetensors").exists():
        return folder
    if newest := newest_checkpoint(folder):
        return newest
    for file in sorted([folder, *folder.glob("*")]):
        if file.suffix in PICKLES and file.is_file():
            raise ValueError(f"{file}: pickles are not read, only safetensors: a checkpoint has a model.safetensors")
    raise FileNotFoundError(f"{folder}: neither a checkpoint (model.safetensors) nor a run that holds one")


def newest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None."""
    return max((run / "checkpoints").glob("step-*"), key=lambda folder: int(folder.name[5:]), default=None)


def save_checkpoint(
    run: Path,
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    optimizers: list[torch.optim.Optimizer],
    state: dict[str, Any],
) -> Path:
    """Write the checkpoint of `state['step']` and point RUN/last, and if state['best_step'] says so RUN/best, at it.

    `state` is anything JSON can hold. Older checkpoints are removed, except the best. Returns the new folder.
    """
    root = run / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".tmp-*"):
        shutil.rmtree(leftover)
    target = root / f"step-{state['step']:06d}"
    temporary = root / f".tmp-{target.name}"
    save_pretrained(temporary, model, tokenizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {
        f"{names[parameter]}.{slot}": tensor
        for optimizer in optimizers
        for parameter, slots in optimizer.state.items()
        for slot, tensor in slots.items()
    }
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary / "optimizer.safetensors"
    )
    (temporary / "state.json").write_text(json.dumps(state) + "\n")
    for file in temporary.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if target.exists():
        # this step again: only the state may have changed, and the folder must not be gone for a moment
        os.replace(temporary / "state.json", target / "state.json")
        shutil.rmtree(temporary)
    else:
        os.replace(temporary, target)
    _link(run / "last", target)
    best = root / f"step-{state['best_step']:06d}" if state.get("best_step") is not None else None
    if best == target:
        _link(run / "best", target)
    for folder in root.glob("step-*"):
        if folder not in (target, best):
            shutil.rmtree(folder)
    return target


def load_checkpoint(
    folder: Path, model: VisionLanguageModel, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Restore model, optimizer and random state in place; returns the `state` that was saved with them."""
    _, model.extra_config = read_config(folder)
    model.load_reference_state_dict(load_tensors(folder / "model.safetensors"))
    tensors = load_tensors(folder / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop("rng.cpu"))
    cuda_rng = tensors.pop("rng.cuda", None)
    if cuda_rng is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda_rng)
    slots: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, slot = name.rsplit(".", 1)
        slots.setdefault(parameter, {})[slot] = tensor
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:  # by name: a part that was frozen or freed since keeps the others' in place
        parameters = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        state = {i: slots[name] for i, name in enumerate(parameters) if name in slots}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((folder / "state.json").read_text())


def load_tensors(file: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose names are `wanted`. Raises an error naming the file if it is damaged."""
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: the checkpoint is not complete")
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys() if wanted(name)}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _link(link: Path, target: Path) -> None:
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.relative_to(link.parent))
    os.replace(temporary, link)
