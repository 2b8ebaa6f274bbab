"""Checkpoints: a model folder with nanoVLM's weight names, and beside it what a run needs to continue exactly.

    RUN/checkpoints/step-000500/   config.json model.safetensors tokenizer.json tokenizer_config.json
                                   optimizer.safetensors state.json
    RUN/last, RUN/best             links to two of them

A checkpoint is written to a temporary folder and renamed: a folder named step-* is complete. No pickle anywhere: that
is why torch.distributed.checkpoint, whose own format is one, gives no format here. A checkpoint knows nothing of how
many ranks wrote it, or whether they held parts of the state.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.files import read_json
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.ranks import World
from nanovlm_fast.runs import REPLACED, replaced
from nanovlm_fast.training.parallel import as_shard_of, whole
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
    """The newest checkpoint, as the first rank sees the shared folder, and its state; or None."""
    newest = newest_checkpoint(run)
    found = world.gather(str(newest) if newest else None)[0]
    return (Path(found), read_state(Path(found))) if found else (None, None)


class Checkpointer:
    """Writes checkpoints of a run in the background: the loop waits only while the state is copied to the host.

    Not even for that on a GPU: the copies are queued behind the step, into page-locked memory that is kept for the
    next time. `first` is False for ranks that only lend their part of the state; `saved` is the step of the checkpoint
    that the run goes on from.
    """

    def __init__(
        self,
        run: Path,
        tokenizer: Tokenizer,
        keep: int = 1,
        first: bool = True,
        saved: int | None = None,
    ):
        self.run, self.tokenizer, self.keep, self.first, self.saved = (
            run,
            tokenizer,
            keep,
            first,
            saved,
        )
        self.host: dict[str, Tensor] = {}  # the copies, by name
        self.copied: tuple[dict[str, Tensor], dict[str, Tensor]] = (
            {},
            {},
        )  # of the step that was saved last
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
                    self.run,
                    model,
                    self.tokenizer,
                    *self.copied,
                    {**json.loads(text), **late()},
                    self.keep,
                    advice,
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
                    self.host[name] = torch.empty_like(
                        tensor, device="cpu", pin_memory=tensor.is_cuda
                    )
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
            save_file(
                {name: t.detach().cpu().contiguous() for name, t in others.items()},
                temporary / OPTIMIZER,
            )
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
        if (
            best and (run / "best").resolve() != best.resolve()
        ):  # not only this step's: a crash may have come before
            _link(run / "best", best)
        older = sorted(set(checkpoints_of(run)) - {target, best}, key=step_of)
        for folder in older[: max(len(older) - keep + 1, 0)]:
            gone = folder.with_name(
                f".tmp-{folder.name}"
            )  # whatever is named step-* is complete, to its end
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
    for (
        optimizer
    ) in optimizers:  # by name: a part that was frozen or freed since keeps the others' in place
        held = [
            names[parameter] for group in optimizer.param_groups for parameter in group["params"]
        ]
        state = {i: slots[name] for i, name in enumerate(held) if name in slots}
        try:
            optimizer.load_state_dict(
                {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
            )
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{file} is damaged: not the state of {type(optimizer).__name__} ({error!r})"
            ) from error
    return read_state(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """The `state` that was saved with a checkpoint. Raises ValueError naming the file if it is damaged."""
    return read_json(folder / "state.json")


def _slots(
    file: Path, tensors: dict[str, Tensor], parameters: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Optimizer state by parameter and slot. Raises ValueError naming the first that has not its parameter's shape."""
    slots: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, slot = name.rpartition(".")
        if parameter in parameters and tensor.dim():
            if tensor.shape != parameters[parameter].shape:
                shapes = (
                    f"{tuple(tensor.shape)}, its parameter {tuple(parameters[parameter].shape)}"
                )
                raise ValueError(f"{file}: {name} has shape {shapes}")
            tensor = as_shard_of(tensor, parameters[parameter])
        slots.setdefault(parameter, {})[slot] = tensor
    return slots


def _link(link: Path, target: Path) -> None:
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.relative_to(link.parent))
    os.replace(temporary, link)
