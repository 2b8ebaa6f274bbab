"""The process that runs huggingface/nanoVLM from a checkout; it does what bench.peer asks for over a pipe.

Of the checkout it needs

| file | what |
| --- | --- |
| `models/config.py` | `VLMConfig`, a dataclass; it gets those of our fields that it has |
| `models/vision_language_model.py` | `VisionLanguageModel(cfg)`, or `(cfg, load_backbone=False)`, with nanoVLM's keys |

and of its `forward` one of two interfaces, both returning (logits, mean loss over the targets that are not -100):

    forward(input_ids, image, attention_mask=, targets=)     v0.1: image tokens go before the text
    forward(input_ids, images, attention_mask=, targets=)    main: they replace the tokenizer's image tokens

The tokenizer that main downloads in its constructor is replaced: the token ids are made already, and it is asked for
the image token's id alone. That is an id no text of the batch has.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from multiprocessing.connection import Connection
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.memory import peak_of
from nanovlm_fast.device import autocast_to

NEEDED = ("models/config.py", "models/vision_language_model.py")


def serve(connection: Connection, options: dict[str, Any]) -> None:
    """Answer (result, None) or (None, error in a line) to the start and to every (command, arguments) after it."""
    nanovlm = None
    while True:
        try:
            if nanovlm is None:
                nanovlm = NanoVLM(**options)
                connection.send((nanovlm.interface, None))
            command, args = connection.recv()
            connection.send((getattr(nanovlm, command)(*args), None))
        except EOFError:
            return
        except torch.OutOfMemoryError:
            connection.send((None, "nanoVLM is out of memory: fewer --samples"))
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            text = error if isinstance(error, ValueError) else f"{type(error).__name__}: {' '.join(lines[:2])}"
            connection.send((None, f"nanoVLM: {text}"))
        if nanovlm is None:
            return


class NanoVLM:
    """The checkout's model with our weights. Called, it takes an optimizer step on the batch of the last `peak`."""

    def __init__(
        self,
        checkout: str,
        config: dict[str, Any],
        image_tokens: int,
        weights: str,
        device: str,
        dtype: torch.dtype,
        threads: int,
    ):
        torch.set_num_threads(threads)
        sys.path.insert(0, checkout)
        configs, models = (load(f"models.{name}") for name in ("config", "vision_language_model"))
        self.device, self.image_tokens = torch.device(device), image_tokens
        self.autocast, self.tokenizer = autocast_to(dtype, self.device), SimpleNamespace(image_token_id=0)
        if hasattr(models, "get_tokenizer"):
            models.get_tokenizer = lambda *args, **options: self.tokenizer
        known = {field.name for field in dataclasses.fields(configs.VLMConfig)}
        values = {**config, "mp_image_token_length": image_tokens, "lm_base_vocab_size": config["lm_vocab_size"]}
        cfg = configs.VLMConfig(**{name: value for name, value in values.items() if name in known})
        options = inspect.signature(models.VisionLanguageModel).parameters
        own_weights = {"load_backbone": False} if "load_backbone" in options else {}
        self.model = models.VisionLanguageModel(cfg, **own_weights)
        self.model.load_state_dict(load_file(weights))
        self.model.to(self.device).train()
        arguments = list(inspect.signature(self.model.forward).parameters)
        if arguments[:1] != ["input_ids"] or not {"image", "images"} & set(arguments):
            raise ValueError(f"forward takes ({', '.join(arguments)}), neither v0.1's nor main's arguments")
        self.interface = ", ".join(arguments)
        self.inside = "images" in arguments  # image tokens among the text's
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        self.rows: dict[str, Tensor] = {}

    def lay_out(self, rows: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """What forward takes, on the host, and for main `image_token`."""
        tensors = {name: torch.from_numpy(array) for name, array in rows.items()}
        pixels = tensors.pop("pixels")
        if not self.inside:
            return {**tensors, "image": pixels}
        ids = tensors["input_ids"]
        token = unused(ids, self.model.decoder.token_embedding.num_embeddings)
        fill = {"input_ids": token, "attention_mask": 1, "targets": -100}
        pads = (tensors["attention_mask"] == 0).sum(1).tolist()
        wide = {
            name: torch.stack(
                [
                    torch.cat([row[:pad], row.new_full((self.image_tokens,), fill[name]), row[pad:]])
                    for row, pad in zip(tensor, pads, strict=True)
                ]
            )
            for name, tensor in tensors.items()
        }
        return {**wide, "images": pixels, "image_token": torch.tensor(token)}

    def loss(self, rows: dict[str, Tensor]) -> Tensor:
        rows = dict(rows)
        self.tokenizer.image_token_id = int(rows.pop("image_token", 0))
        return self.model(**{name: tensor.to(self.device) for name, tensor in rows.items()})[1]

    def gradients(self, rows: dict[str, np.ndarray], file: str) -> float:
        """The loss in float32; every gradient goes to the file, by the weight's name."""
        laid_out = self.lay_out(rows)
        with torch.backends.cudnn.flags(allow_tf32=False):
            loss = self.loss(laid_out)
            loss.backward()
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.model.named_parameters()}
        save_file({name: grad.cpu().contiguous() for name, grad in found.items()}, file)
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def peak(self, rows: dict[str, np.ndarray]) -> float:
        """Take the batch in and two steps on it; MiB of all that the process holds."""
        self.rows = self.lay_out(rows)
        mib = peak_of(self)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the device is shared
        return mib

    def step(self) -> float:
        loss = self()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return loss

    def __call__(self) -> float:
        with self.autocast():
            loss = self.loss(self.rows)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def load(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{name} cannot be imported ({error}): install what the checkout's README asks for") from error


def unused(ids: Tensor, vocabulary: int) -> int:
    """The lowest token id that the batch does not have."""
    free = torch.ones(vocabulary, dtype=torch.bool)
    free[ids.unique()] = False
    if not free.any():
        raise ValueError("the batch has every token id: none is left to mark images, take fewer --samples")
    return int(free.nonzero()[0])
