"""Checkpoints: a model folder with nanoVLM's weight names, and beside it what a run needs to continue exactly.

    RUN/checkpoints/step-000500/   config.json model.safetensors tokenizer.json tokenizer_config.json
                                   optimizer.safetensors state.json
    RUN/last, RUN/best             links to two of them

A checkpoint is written to a temporary folder and renamed: a folder named step-* is complete. No pickle anywhere: that
is why torch.distributed.checkpoint, whose own format is one, gives no format here. A checkpoint knows nothing of how
many ranks wrote it, or whether they held parts of the state.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanovlm_fast.config import VLMConfig, check_types, fields_of, latest_run, read_json
from nanovlm_fast.data.images import printable
from nanovlm_fast.data.text import Tokenizer, is_hub_name
from nanovlm_fast.distributed import World, as_shard_of, whole
from nanovlm_fast.hub import WEIGHTS, fetch
from nanovlm_fast.model import VisionLanguageModel
from nanovlm_fast.runs import REPLACED, replaced, standing

OPTIMIZER = "optimizer.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Fields of nanoVLM v0.1's VLMConfig that ours has not. Those that decide what a model computes have
# one value that is supported here; the others say where it came from
SUPPORTED = {
    "vit_dropout": 0.0,
    "vit_cls_flag": False,
    "lm_dropout": 0.0,
    "lm_attn_scaling": 1.0,
    "lm_use_tokens": False,
}
ORIGIN = (
    "vit_model_type",
    "lm_model_type",
    "lm_eos_token_id",
    "vlm_load_backbone_weights",
    "vlm_checkpoint_path",
)
V01_FIELDS = {*SUPPORTED, *ORIGIN}
# Fields that came after v0.1, with image tokens among the text: same keys, another function
LATER = tuple(
    "mp_image_token_length vlm_extra_tokens lm_chat_template lm_base_vocab_size "
    "extra_token_amount max_img_size resize_to_max_side_len".split()
)
KNOWN = {*V01_FIELDS, "hf_repo_name"}  # the latter came a week after v0.1 and changes nothing


def save_pretrained(folder: Path, model: VisionLanguageModel, tokenizer: Tokenizer | None = None) -> None:
    """Write config.json, model.safetensors (nanoVLM's keys; tied weights once), the tokenizer.

    Without a tokenizer the folder loads with one that is named then (`load_pretrained`).
    """
    write_pretrained(folder, model, model.state_dict(), tokenizer)


def write_pretrained(
    folder: Path, model: VisionLanguageModel, weights: dict[str, Tensor], tokenizer: Tokenizer | None = None
) -> None:
    """`save_pretrained` of other `weights` than the model's own, under the names of its state dict."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.by_reference_name(weights)
    if model.config.lm_tie_weights:
        state.pop("decoder.head.weight", None)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, folder / "model.safetensors"
    )
    values = {**model.extra_config, **dataclasses.asdict(model.config)}
    if not is_hub_name(model.config.lm_tokenizer):  # a path means nothing once a folder has moved
        own = tokenizer is not None or model.config.lm_tokenizer == "train"
        values["lm_tokenizer"] = "train" if own else str(Path(model.config.lm_tokenizer).resolve())
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder)


def load_pretrained(
    checkpoint: Path | str | None = None, device: str | torch.device = "cpu", lm_tokenizer: str = ""
) -> tuple[VisionLanguageModel, Tokenizer]:
    """Model and tokenizer of a checkpoint folder, a run folder (its last checkpoint), or the latest run.

    The tokenizer is `lm_tokenizer` (hub name or folder), or else the folder's own, or else the one
    that its config.json names.
    Raises FileNotFoundError if there is nothing there and ValueError, naming the file or the weights, if it is damaged
    or does not fit its configuration.
    """
    folder = resolve(checkpoint)
    model = load_model(folder)
    if lm_tokenizer:
        tokenizer = Tokenizer.from_hub(lm_tokenizer)
        model.config = dataclasses.replace(model.config, lm_tokenizer=lm_tokenizer)
    else:
        tokenizer = tokenizer_of(folder, model.config.lm_tokenizer)
    if len(tokenizer) > model.config.lm_vocab_size:
        raise ValueError(f"{folder}: its tokenizer has {len(tokenizer)} ids, the model {model.config.lm_vocab_size}")
    return model.to(device), tokenizer


def tokenizer_of(folder: Path, name: str) -> Tokenizer:
    """The tokenizer in `folder`, or the one that its config.json calls `name`."""
    if (folder / "tokenizer.json").exists():
        return Tokenizer.load(folder)
    if not is_hub_name(name) and not os.path.isdir(os.path.expanduser(name)):
        raise FileNotFoundError(
            f"{folder} was saved without its tokenizer (no tokenizer.json; lm_tokenizer in "
            f"config.json is {name!r}): --lm-tokenizer takes a hub name or a folder that has it"
        )
    return Tokenizer.from_hub(name)


def load_model(folder: Path) -> VisionLanguageModel:
    """The model of a folder that `resolve` gave, on the CPU. Raises what `load_pretrained` raises."""
    config, extra = read_config(folder)
    check_sizes(folder, config)
    model = VisionLanguageModel(config)
    model.extra_config = extra
    model.load_reference_state_dict(load_tensors(folder / "model.safetensors"))
    return model


def check_sizes(folder: Path, config: VLMConfig) -> None:
    """Raise ValueError unless the weights in `folder` are those of `config`, before memory is taken for the model.

    A few bytes of config.json can ask for terabytes; the header of the weights cannot promise more than the file has.
    """
    file = folder / "model.safetensors"
    stored, blocks = stored_shapes(file), config.vit_n_blocks + config.lm_n_blocks
    if blocks > len(stored):
        raise ValueError(f"{folder / 'config.json'} asks for {blocks} blocks, {file} holds {len(stored)} tensors")
    try:
        with torch.device("meta"):
            model = VisionLanguageModel(config)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{folder / 'config.json'} is not a model configuration: {error}") from error
    try:
        model.load_reference_state_dict(stored)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_config(folder: Path) -> tuple[VLMConfig, dict[str, Any]]:
    """Model configuration of a checkpoint folder, and the entries of its config.json that are no fields of it.

    Raises ValueError if the file is damaged, or asks for a model that differs from the one here.
    Warns of entries that nanoVLM v0.1 has not either.
    """
    file = folder / "config.json"
    values = read_json(file)
    if later := [name for name in LATER if name in values]:
        raise ValueError(
            f"{file}: a checkpoint of a nanoVLM newer than v0.1 (it has {', '.join(later)}), with "
            "another text format and other image tokens: only v0.1's are supported"
        )
    if "model_type" in values and "vit_hidden_dim" not in values:
        kind = printable(repr(values["model_type"]))
        raise ValueError(
            f"{file}: a configuration of transformers (model_type {kind}): only nanoVLM's layout "
            "is read, which the checkpoint that it was exported from has"
        )
    try:
        check_types(VLMConfig, fields_of(VLMConfig, values))
        extra = {name: value for name, value in values.items() if name not in fields_of(VLMConfig, values)}
        config = VLMConfig(**fields_of(VLMConfig, values)).validate()
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{file} is not a model configuration: {error}") from error
    for name, same in SUPPORTED.items():
        if extra.get(name, same) != same:
            value = printable(repr(extra[name]))
            raise ValueError(f"{file}: {name} = {value}, only {same} is supported")
    if unknown := sorted(extra.keys() - KNOWN):
        names = printable(", ".join(unknown))
        warnings.warn(f"{file}: fields not used here: {names}", stacklevel=3)
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
    if newest := newest_checkpoint(standing(folder)):
        return newest
    for file in sorted([folder, *folder.glob("*")]):
        if file.suffix in PICKLES and file.is_file():
            raise ValueError(f"{file}: pickles are not read, only safetensors: a checkpoint has a model.safetensors")
    raise FileNotFoundError(f"{folder}: neither a checkpoint (model.safetensors) nor a run that holds one")


def newest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None."""
    return max(checkpoints_of(run), key=step_of, default=None)


def newest_state(run: Path, world: World) -> tuple[Path | None, dict[str, Any] | None]:
    """The newest checkpoint, as the first rank sees the shared folder, and its state; or None."""
    newest = newest_checkpoint(run)
    found = world.gather(str(newest) if newest else None)[0]
    return (Path(found), read_state(Path(found))) if found else (None, None)


def checkpoints_of(run: Path) -> list[Path]:
    """All complete checkpoints, in no order."""
    return [folder for folder in (run / "checkpoints").glob("step-*") if folder.name[5:].isdecimal()]


def step_of(folder: Path) -> int:
    return int(folder.name[5:])


class Checkpointer:
    """Writes checkpoints of a run in the background: the loop waits only while the state is copied to the host.

    Not even for that on a GPU: the copies are queued behind the step, into page-locked memory that is kept for the
    next time. `first` is False for ranks that only lend their part of the state; `saved` is the step of the checkpoint
    that the run goes on from.
    """

    def __init__(self, run: Path, tokenizer: Tokenizer, keep: int = 1, first: bool = True, saved: int | None = None):
        self.run, self.tokenizer, self.keep, self.first, self.saved = run, tokenizer, keep, first, saved
        self.host: dict[str, Tensor] = {}  # the copies, by name
        self.copied: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}  # of the step that was saved last
        self.writer: threading.Thread | None = None
        self.error: Exception | None = None

    def save(
        self,
        model: VisionLanguageModel,
        optimizers: list[torch.optim.Optimizer],
        state: dict[str, Any],
        late: Callable[[], dict[str, Any]] = dict,
        advice: str = "",
    ) -> None:
        """Begin to write the checkpoint of `state['step']`; raises what the one before it met (see `wait`).

        `state` is anything JSON can hold; what `late()` returns, once the device is there, becomes a part of it.
        `advice` ends the error that weights which are not finite raise.
        """
        self.wait()
        text, again, self.saved = json.dumps(state), self.saved == state["step"], state["step"]
        if not again:  # or only the state may have changed
            weights, others = tensors_of(model, optimizers)
            self.copied = self._copies(weights), self._copies(others)
        if not self.first:
            return
        copied = torch.cuda.Event() if torch.cuda.is_available() else None
        if copied:
            copied.record()

        def write() -> None:
            try:
                if copied:
                    copied.synchronize()
                write_checkpoint(
                    self.run, model, self.tokenizer, *self.copied, {**json.loads(text), **late()}, self.keep, advice
                )
            except Exception as error:  # the loop's to raise
                self.error = error

        self.writer = threading.Thread(target=write, name="checkpoint")
        self.writer.start()

    def wait(self) -> None:
        """Until the checkpoint that was begun is written. Raises OSError or ValueError if it could not be."""
        if self.writer:
            self.writer.join()
            self.writer = None
        if error := self.error:
            self.error = None
            raise error

    def _copies(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in tensors.items():
            tensor = whole(tensor.detach())  # all ranks
            if self.first:
                if name not in self.host:
                    self.host[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                copies[name] = self.host[name].copy_(tensor, non_blocking=True)
        return copies


def save_checkpoint(
    run: Path,
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    optimizers: list[torch.optim.Optimizer],
    state: dict[str, Any],
    keep: int = 1,
) -> Path:
    """Write the checkpoint of `state['step']` and point RUN/last, and if state['best_step'] says so RUN/best, at it.

    `state` is anything JSON can hold. Of older checkpoints `keep` - 1 and the best are kept. Returns the new folder.
    Raises OSError, naming the newest checkpoint there is, if it cannot be written, and ValueError for weights that are
    not finite.
    """
    return write_checkpoint(run, model, tokenizer, *tensors_of(model, optimizers), state, keep)


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def tensors_of(
    model: VisionLanguageModel, optimizers: list[torch.optim.Optimizer]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, and what else a run goes on from: the optimizers' tensors by parameter, and random states."""
    weights = dict(model.state_dict())
    if model.config.lm_tie_weights:
        weights.pop("decoder.head.weight", None)
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
    return weights, tensors


def write_checkpoint(
    run: Path,
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    weights: dict[str, Tensor],
    others: dict[str, Tensor],
    state: dict[str, Any],
    keep: int = 1,
    advice: str = "",
) -> Path:
    """`save_checkpoint` of tensors that were copied; without `weights` only the state of a step that is there."""
    root, target = run / "checkpoints", step_folder(run, state["step"])
    temporary = root / f".tmp-{target.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".tmp-*"):
            shutil.rmtree(leftover)
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise ValueError(f"weights are not finite after step {state['step']}{advice}")
        if not (weights or target.exists()):
            raise FileNotFoundError(f"{target} was not written before")
        if not target.exists():
            write_pretrained(temporary, model, weights, tokenizer)
            save_file({name: t.detach().cpu().contiguous() for name, t in others.items()}, temporary / OPTIMIZER)
        temporary.mkdir(exist_ok=True)
        (temporary / "state.json").write_text(json.dumps(state) + "\n")
        for file in temporary.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if target.exists():  # this step again: the folder must not be gone for a moment
            os.replace(temporary / "state.json", target / "state.json")
            shutil.rmtree(temporary)
        else:
            os.replace(temporary, target)
        best = step_folder(run, state["best_step"]) if state.get("best_step") is not None else None
        if best and not best.exists():  # it could not be written: the one before it stays
            best = root / (run / "best").resolve().name if (run / "best").exists() else None
        _link(run / "last", target)
        if best and (run / "best").resolve() != best.resolve():  # not only this step's: a crash may have come before
            _link(run / "best", best)
        older = sorted(set(checkpoints_of(run)) - {target, best}, key=step_of)
        for folder in older[: max(len(older) - keep + 1, 0)]:
            gone = folder.with_name(f".tmp-{folder.name}")  # whatever is named step-* is complete, to its end
            os.replace(folder, gone)
            shutil.rmtree(gone)
        replaced(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        there = newest_checkpoint(run)
        kept = f"the newest checkpoint is {there}" if there else "there is no checkpoint yet"
        if (run / REPLACED).exists():
            kept += f", and until then {run / REPLACED} keeps the run that it replaces"
        raise OSError(
            f"the checkpoint of step {state['step']} could not be written to {root}: {error}; {kept}"
        ) from error
    return target


def load_checkpoint(
    folder: Path, model: VisionLanguageModel, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Restore model, optimizer and random state in place; returns the `state` that was saved with them."""
    load_weights(folder, model)
    return load_training_state(folder, model, optimizers)


def load_weights(folder: Path, model: VisionLanguageModel) -> None:
    """The first half of `load_checkpoint`, before the model is sharded."""
    _, model.extra_config = read_config(folder)
    model.load_reference_state_dict(load_tensors(folder / "model.safetensors"))


def load_training_state(
    folder: Path, model: VisionLanguageModel, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Any]:
    """The second half of `load_checkpoint`; of a sharded model's optimizer state each rank takes its part."""
    file = folder / OPTIMIZER
    tensors = load_tensors(file)
    try:
        torch.set_rng_state(tensors.pop("rng.cpu"))
        cuda_rng = tensors.pop("rng.cuda", None)
        if cuda_rng is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda_rng)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{file} is damaged: no random state in it ({error})") from error
    names = {parameter: name for name, parameter in model.named_parameters()}
    slots = _slots(file, tensors, {name: parameter for parameter, name in names.items()})
    for optimizer in optimizers:  # by name: a part that was frozen or freed since keeps the others' in place
        held = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        state = {i: slots[name] for i, name in enumerate(held) if name in slots}
        try:
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{file} is damaged: not the state of {type(optimizer).__name__} ({error!r})") from error
    return read_state(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """The `state` that was saved with a checkpoint. Raises ValueError naming the file if it is damaged."""
    return read_json(folder / "state.json")


def _slots(file: Path, tensors: dict[str, Tensor], parameters: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Optimizer state by parameter and slot. Raises ValueError naming the first that has not its parameter's shape."""
    slots: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, slot = name.rpartition(".")
        if parameter in parameters and tensor.dim():
            if tensor.shape != parameters[parameter].shape:
                shapes = f"{tuple(tensor.shape)}, its parameter {tuple(parameters[parameter].shape)}"
                raise ValueError(f"{file}: {name} has shape {shapes}")
            tensor = as_shard_of(tensor, parameters[parameter])
        slots.setdefault(parameter, {})[slot] = tensor
    return slots


def load_tensors(file: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose names are `wanted`. Raises an error naming the file if it is damaged."""
    return _read(file, wanted, lambda tensors, name: tensors.get_tensor(name))


def stored_shapes(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file without their values, on the meta device. Reads its header alone."""

    def shape_of(tensors: Any, name: str) -> Tensor:
        return torch.empty(tensors.get_slice(name).get_shape(), device="meta")

    return _read(file, lambda name: True, shape_of)


def _read(file: Path, wanted: Callable[[str], bool], get: Callable[[Any, str], Tensor]) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the checkpoint is not complete")
    try:
        with safe_open(file, "pt") as tensors:
            return {name: get(tensors, name) for name in tensors.keys() if wanted(name)}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, RuntimeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error  # beside its own: of types that torch cannot hold


def _link(link: Path, target: Path) -> None:
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.relative_to(link.parent))
    os.replace(temporary, link)
