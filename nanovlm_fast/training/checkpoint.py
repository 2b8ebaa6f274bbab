"""Checkpoints: a model folder with nanoVLM's weight names, and what a run needs to continue.

    RUN/checkpoints/step-000500/
        config.json  model.safetensors  tokenizer.json  tokenizer_config.json
        optimizer.safetensors  state.json
    RUN/last, RUN/best          links to two of them

A checkpoint is written to a temporary folder and renamed, so a folder named step-* is complete. It
does not depend on how many ranks wrote it, or on whether they held parts of the state. There is no
pickle in it, and therefore torch.distributed.checkpoint, whose own format is a pickle, is not used.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.files import read_json
from nanovlm_fast.model.lora import held_whole, is_of_adapter
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.ranks import World
from nanovlm_fast.runs import REPLACED, replaced
from nanovlm_fast.training.parallel import as_shard_of, whole
from nanovlm_fast.weights.adapter import check_base, read_adapter
from nanovlm_fast.weights.folder import (
    checkpoints_of,
    newest_checkpoint,
    read_config,
    step_of,
    write_pretrained,
)
from nanovlm_fast.weights.tensors import load_tensors

OPTIMIZER = "optimizer.safetensors"


def newest_state(run: Path, world: World) -> tuple[Path | None, dict[str, Any] | None]:
    """The newest checkpoint of a run and the content of its state.json, or (None, None).

    The first rank's view counts: on a shared file system others may see a new folder later.
    """
    newest = newest_checkpoint(run)
    found = world.gather(str(newest) if newest else None)[0]
    return (Path(found), read_state(Path(found))) if found else (None, None)


@dataclass
class Tensors:
    """The tensors of a checkpoint."""

    weights: dict[str, Tensor]  # as in nanoVLM's layout
    others: dict[str, Tensor]  # optimizer state by parameter name, and the random state


class Checkpointer:
    """Writes the checkpoints of a run in the background.

    The loop waits only while the state is copied to the host, and on a GPU not even for that: the
    copies are queued behind the step, into page-locked memory that is reused by the next save.
    `first` is False for ranks that only contribute their part of the state. `saved` is the step of
    the checkpoint that the run resumed from.
    """

    def __init__(
        self,
        run: Path,
        tokenizer: Tokenizer,
        keep: int = 1,
        first: bool = True,
        saved: int | None = None,
    ):
        self.run = run
        self.tokenizer = tokenizer
        self.keep = keep
        self.first = first
        self.saved = saved
        self.host: dict[str, Tensor] = {}  # page-locked memory, by name
        self.copied = Tensors({}, {})  # of the step that was saved last
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
        """Begin to write the checkpoint of `state['step']`; raise what the previous one met.

        `state` is anything JSON can hold; what `late()` returns, once the device has computed it,
        is added to it. `advice` ends the error that weights which are not finite raise.
        """
        self.wait()
        # As text, because the loop goes on and changes the state while the thread writes.
        text = json.dumps(state)
        # A step that is saved again (after an evaluation) has the same tensors.
        if self.saved != state["step"]:
            tensors = tensors_of(model, optimizers)
            self.copied = Tensors(self._copies(tensors.weights), self._copies(tensors.others))
        self.saved = state["step"]
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
                    self.run,
                    model,
                    self.tokenizer,
                    tensors=self.copied,
                    state={**json.loads(text), **late()},
                    keep=self.keep,
                    advice=advice,
                )
            except Exception as error:  # `wait` raises it, in the loop's thread
                self.error = error

        # No daemon: a process that ends must not cut off a checkpoint.
        self.writer = threading.Thread(target=write, name="checkpoint")
        self.writer.start()

    def wait(self) -> None:
        """Wait until the checkpoint is written. Raises OSError or ValueError if it could not be."""
        if self.writer:
            self.writer.join()
            self.writer = None
        if error := self.error:
            self.error = None
            raise error

    def _copies(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in tensors.items():
            # A collective if the tensor is sharded, so it comes before the question who writes.
            tensor = whole(tensor.detach())
            if self.first:
                if name not in self.host:
                    self.host[name] = torch.empty_like(
                        tensor, device="cpu", pin_memory=tensor.is_cuda
                    )
                copies[name] = self.host[name].copy_(tensor, non_blocking=tensor.is_cuda)
        return copies


def save_checkpoint(
    run: Path,
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    optimizers: list[torch.optim.Optimizer],
    state: dict[str, Any],
    keep: int = 1,
) -> Path:
    """Write the checkpoint of `state['step']`, and point RUN/last and RUN/best at the right ones.

    `state` is anything JSON can hold; its `best_step` is what RUN/best points at. Of older
    checkpoints, `keep` - 1 and the best are kept. Returns the new folder. Raises OSError naming the
    newest checkpoint if this one cannot be written, and ValueError for weights that are not finite.
    """
    tensors = tensors_of(model, optimizers)
    return write_checkpoint(run, model, tokenizer, tensors=tensors, state=state, keep=keep)


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def tensors_of(model: VisionLanguageModel, optimizers: list[torch.optim.Optimizer]) -> Tensors:
    """The tensors of a run, where they are: neither copied nor gathered from shards.

    Of a model with adapters, without what lies in their base.
    """
    weights = dict(model.state_dict())
    if adapter := model.adapter:
        stored = {name for name, one in model.named_parameters() if adapter.stores(name, one)}
        weights = {name: weights[name] for name in weights if name in stored}
    # A tied head is the token embedding, and safetensors refuses shared memory.
    if model.config.lm_tie_weights:
        weights.pop("decoder.head.weight", None)
    names = {weight: name for name, weight in _updated(model).items()}
    tensors = {}
    for optimizer in optimizers:
        for parameter, slots in optimizer.state.items():
            for slot, tensor in slots.items():
                tensors[f"{names[parameter]}.{slot}"] = tensor
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return Tensors(weights, tensors)


def write_checkpoint(
    run: Path,
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    *,
    tensors: Tensors,
    state: dict[str, Any],
    keep: int = 1,
    advice: str = "",
) -> Path:
    """`save_checkpoint` of tensors on the host, which need not be the model's own.

    If the step's folder exists, only its state is written again, and `tensors` may be empty.
    """
    root = run / "checkpoints"
    target = step_folder(run, state["step"])
    temporary = root / f".tmp-{target.name}"
    try:
        _write_folder(temporary, target, model, tokenizer, tensors, state, advice)
        best = _best(run, state)
        _link(run / "last", target)
        # Whenever it differs and not only if this step is the best: a crash may have come between
        # an earlier checkpoint and its link.
        if best and (run / "best").resolve() != best.resolve():
            _link(run / "best", best)
        # Old ones go last: until the links are right, they may be what a link points at.
        older = sorted(set(checkpoints_of(run)) - {target, best}, key=step_of)
        for folder in older[: max(len(older) - keep + 1, 0)]:
            # Renamed before it is removed: whatever is named step-* is complete, to its end.
            gone = folder.with_name(f".tmp-{folder.name}")
            os.replace(folder, gone)
            shutil.rmtree(gone)
        replaced(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        newest = newest_checkpoint(run)
        kept = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"
        if (run / REPLACED).exists():
            kept += f", and until then {run / REPLACED} keeps the run that it replaces"
        failed = f"the checkpoint of step {state['step']} could not be written to {root}"
        raise OSError(f"{failed}: {error}; {kept}") from error
    return target


def _write_folder(
    temporary: Path,
    target: Path,
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    tensors: Tensors,
    state: dict[str, Any],
    advice: str,
) -> None:
    """Write a checkpoint to `temporary`, flush it to the disk, and move it to `target`."""
    root = target.parent
    root.mkdir(parents=True, exist_ok=True)
    # What an interrupted save or removal left behind takes disk space that this one may need.
    for leftover in root.glob(".tmp-*"):
        shutil.rmtree(leftover)
    if not all(tensor.isfinite().all() for tensor in tensors.weights.values()):
        raise ValueError(f"weights are not finite after step {state['step']}{advice}")
    if not (tensors.weights or target.exists()):
        raise FileNotFoundError(f"{target} was not written before")
    if not target.exists():
        write_pretrained(temporary, model, tensors.weights, tokenizer)
        others = {name: one.detach().cpu().contiguous() for name, one in tensors.others.items()}
        save_file(others, temporary / OPTIMIZER)
    temporary.mkdir(exist_ok=True)
    (temporary / "state.json").write_text(json.dumps(state) + "\n")
    # Before the rename: after a power cut, a renamed folder could otherwise hold empty files.
    for file in temporary.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if target.exists():
        # The same step again: its folder must not be missing for a moment.
        os.replace(temporary / "state.json", target / "state.json")
        shutil.rmtree(temporary)
    else:
        os.replace(temporary, target)


def _best(run: Path, state: dict[str, Any]) -> Path | None:
    """The folder that RUN/best should point at."""
    if state.get("best_step") is None:
        return None
    best = step_folder(run, state["best_step"])
    if best.exists():
        return best
    # It could not be written (--on-save-error continue): the one before it stays.
    link = run / "best"
    return run / "checkpoints" / link.resolve().name if link.exists() else None


def load_checkpoint(
    folder: Path, model: VisionLanguageModel, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Restore model, optimizer and random state in place; return the `state` saved with them."""
    load_weights(folder, model)
    return load_training_state(folder, model, optimizers)


def load_weights(folder: Path, model: VisionLanguageModel) -> None:
    """The first half of `load_checkpoint`, before the model is sharded."""
    _, model.extra_config = read_config(folder)
    tensors = load_tensors(folder / "model.safetensors")
    if model.adapter is None:
        model.load_reference_state_dict(tensors)
        return
    check_base(folder, read_adapter(folder), model.adapter.hashes, tensors)
    model.adapter.loaded = frozenset(tensors)
    _load_stored(folder / "model.safetensors", model, tensors)


def _load_stored(file: Path, model: VisionLanguageModel, tensors: dict[str, Tensor]) -> None:
    """Load what the checkpoint of a model with adapters holds.

    Raises ValueError naming the first tensor that is missing, unexpected or of another shape.
    """
    ours = dict(model.named_parameters())
    whole = held_whole(tensors)
    needed = {name for name in ours if is_of_adapter(name) or name.split(".")[0] in whole}
    for name in sorted(needed | tensors.keys()):
        if name not in ours or name not in tensors or ours[name].shape != tensors[name].shape:
            raise ValueError(f"{file}: {name} does not fit the model and its adapters")
    model.load_state_dict(tensors, strict=False)


def load_training_state(
    folder: Path, model: VisionLanguageModel, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Any]:
    """The second half of `load_checkpoint`, after sharding: each rank takes its part of the state.

    Raises ValueError naming the file if it is damaged.
    """
    file = folder / OPTIMIZER
    tensors = load_tensors(file)
    _restore_random_state(file, tensors)
    parameters = _updated(model)
    names = {parameter: name for name, parameter in parameters.items()}
    slots = _slots(file, tensors, parameters)
    for optimizer in optimizers:
        # PyTorch numbers the parameters of an optimizer. The file has them by name, so that state
        # stays with its parameter when a part has been frozen or unfrozen since.
        held = [names[p] for group in optimizer.param_groups for p in group["params"]]
        state = {i: slots[name] for i, name in enumerate(held) if name in slots}
        groups = optimizer.state_dict()["param_groups"]
        try:
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        except (KeyError, TypeError, RuntimeError) as error:
            kind = type(optimizer).__name__
            raise ValueError(f"{file} is damaged: not the state of {kind} ({error!r})") from error
    return read_state(folder)


def _updated(model: VisionLanguageModel) -> dict[str, Tensor]:
    """What optimizers update, by name: parameters, or the masters of working weights."""
    return {name: model.masters.of(one) for name, one in model.named_parameters()}


def _restore_random_state(file: Path, tensors: dict[str, Tensor]) -> None:
    """Restore and remove the random states among the tensors."""
    try:
        torch.set_rng_state(tensors.pop("rng.cpu"))
        cuda_rng = tensors.pop("rng.cuda", None)
        if cuda_rng is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda_rng)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{file} is damaged: no random state in it ({error})") from error


def read_state(folder: Path) -> dict[str, Any]:
    """The `state` saved with a checkpoint. Raises ValueError naming the file if it is damaged."""
    return read_json(folder / "state.json")


def _slots(
    file: Path, tensors: dict[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Optimizer state by parameter and slot.

    Raises ValueError naming the first tensor whose shape is not that of its parameter.
    """
    slots: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, slot = name.rpartition(".")
        # Scalars, as AdamW's step count, have no parameter's shape and are never sharded.
        if parameter in parameters and tensor.dim():
            wanted = tuple(parameters[parameter].shape)
            if tensor.shape != wanted:
                shapes = f"{tuple(tensor.shape)}, its parameter {wanted}"
                raise ValueError(f"{file}: {name} has shape {shapes}")
            tensor = as_shard_of(tensor, parameters[parameter])
        slots.setdefault(parameter, {})[slot] = tensor
    return slots


def _link(link: Path, target: Path) -> None:
    """Point the link at the target, in one step: a reader finds the old target or the new one."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.relative_to(link.parent))
    os.replace(temporary, link)
