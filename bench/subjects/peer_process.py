"""The process that runs huggingface/nanoVLM from a checkout, on commands of bench.peer over a pipe.

It needs these files of the checkout:

| file | what |
| --- | --- |
| `models/config.py` | `VLMConfig`, a dataclass; it gets those of our fields that it has |
| `models/vision_language_model.py` | `VisionLanguageModel(cfg)`, or `(cfg, load_backbone=False)` |
| `data/collators.py`, of v0.1 | `VQACollator(tokenizer, max_length)`, which lays out the rows |

The model must have nanoVLM's keys, and its `forward` one of two interfaces. Both return (logits,
mean loss over the targets that are not -100):

    forward(input_ids, image, attention_mask=, targets=)     v0.1: image tokens precede the text
    forward(input_ids, images, attention_mask=, targets=)    main: they replace placeholder tokens

v0.2 has v0.1's interface with main's rows; it is refused. No tokenizer is downloaded, because the
token ids exist already. v0.1's collator gets a stand-in that reads ids from text. The tokenizer
that main downloads in its constructor is replaced by a stand-in with the image token's id, which
is an id that no text of the batch contains.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.harness.processes import peak_of
from nanovlm_fast.command import ran_out_of_memory
from nanovlm_fast.device import autocast_to

NEEDED = ("models/config.py", "models/vision_language_model.py")
V01 = ("input_ids", "image", "attention_mask", "targets")  # what v0.1's forward takes
ONLY = "only v0.1 and main are compared (git checkout v0.1, or main, in that folder)"


def serve(connection: Connection, options: dict[str, Any]) -> None:
    """Answer the start and every (command, arguments) with (result, None) or (None, error)."""
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
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            text = f"{type(error).__name__}: {' '.join(lines[:2])}"
            if isinstance(error, ValueError):
                text = str(error)
            if ran_out_of_memory(error):
                text = "out of memory: fewer --samples"
            connection.send((None, f"nanoVLM: {text}"))
        if nanovlm is None:
            return


class NanoVLM:
    """The checkout's model with our weights.

    A call takes an optimizer step on the batch of the last `peak`.
    """

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
        configs = load("models.config")
        known = {field.name for field in dataclasses.fields(configs.VLMConfig)}
        # Image tokens within the text, but images of one size: a version between v0.1 and main.
        if "mp_image_token_length" in known and "max_img_size" not in known:
            raise ValueError(f"{checkout} is v0.2, or near it: {ONLY}")
        models = load("models.vision_language_model")
        self.device = torch.device(device)
        self.image_tokens = image_tokens
        self.autocast = autocast_to(dtype, self.device)
        self.tokenizer = SimpleNamespace(image_token_id=0)
        if hasattr(models, "get_tokenizer"):
            # Through vars: mypy knows no attributes of a module that is imported by name.
            vars(models)["get_tokenizer"] = lambda *args, **options: self.tokenizer
        values = {
            **config,
            "mp_image_token_length": image_tokens,
            "lm_base_vocab_size": config["lm_vocab_size"],
        }
        cfg = configs.VLMConfig(**{name: value for name, value in values.items() if name in known})
        options = inspect.signature(models.VisionLanguageModel).parameters
        own_weights = {"load_backbone": False} if "load_backbone" in options else {}
        self.model = models.VisionLanguageModel(cfg, **own_weights)
        self.model.load_state_dict(load_file(weights))
        self.model.to(self.device).train()
        arguments = list(inspect.signature(self.model.forward).parameters)
        if arguments[:1] != ["input_ids"] or not {"image", "images"} & set(arguments):
            raise ValueError(f"forward takes ({', '.join(arguments)}): {ONLY}")
        self.interface = ", ".join(arguments)
        self.collator = None if "images" in arguments else load("data.collators").VQACollator
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        self.rows: dict[str, Tensor] = {}

    def lay_out(self, rows: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """The arguments of forward, on the host; for main also `image_token`."""
        tensors = {name: torch.from_numpy(array) for name, array in rows.items()}
        if self.collator:
            return collated(self.collator, **tensors)
        pixels = tensors.pop("pixels")
        if "image_token" in tensors:  # rows that hold their image tokens already
            return {**tensors, "images": pixels}
        ids = tensors["input_ids"]
        token = unused(ids, self.model.decoder.token_embedding.num_embeddings)
        fill = {"input_ids": token, "attention_mask": 1, "targets": -100}
        pads = (tensors["attention_mask"] == 0).sum(1).tolist()

        def widened(name: str, tensor: Tensor) -> Tensor:
            """Insert the image's tokens between the padding and the text of every row."""
            image = tensor.new_full((self.image_tokens,), fill[name])
            rows = zip(tensor, pads, strict=True)
            return torch.stack([torch.cat([row[:pad], image, row[pad:]]) for row, pad in rows])

        wide = {name: widened(name, tensor) for name, tensor in tensors.items()}
        return {**wide, "images": pixels, "image_token": torch.tensor(token)}

    def loss(self, rows: dict[str, Tensor]) -> Tensor:
        rows = dict(rows)
        self.tokenizer.image_token_id = int(rows.pop("image_token", 0))
        return self.model(**{name: tensor.to(self.device) for name, tensor in rows.items()})[1]

    def gradients(self, rows: dict[str, np.ndarray], file: str) -> float:
        """Return the loss in float32; write every gradient to the file, by the weight's name."""
        laid_out = self.lay_out(rows)
        with torch.backends.cudnn.flags(allow_tf32=False):
            loss = self.loss(laid_out)
            loss.backward()
        found = {
            n: torch.zeros_like(p) if p.grad is None else p.grad
            for n, p in self.model.named_parameters()
        }
        save_file({name: grad.cpu().contiguous() for name, grad in found.items()}, file)
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def peak(self, rows: dict[str, np.ndarray]) -> float:
        """Store the batch and take two steps on it; return the MiB that the process holds."""
        self.rows = self.lay_out(rows)
        mib = peak_of(self)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the device is shared with bench.peer's process
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


class DecimalTokenizer:
    """Stands in for v0.1's tokenizer: a text is a list of token ids, each followed by a space."""

    @staticmethod
    def text(ids: list[int]) -> str:
        return "".join(f"{token} " for token in ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [int(word) for word in text.split()]

    def batch_encode_plus(
        self, texts: list[str], max_length: int, **options: object
    ) -> dict[str, Tensor]:
        """Rows of `max_length`, padded on the left and cut on the right, as `options` request."""
        input_ids = torch.zeros(len(texts), max_length, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for row, text in enumerate(texts):
            ids = self.encode(text)[:max_length]
            input_ids[row, max_length - len(ids) :] = torch.tensor(ids)
            mask[row, max_length - len(ids) :] = 1
        return {"input_ids": input_ids, "attention_mask": mask}


def collated(
    collator: Callable[..., Callable[[list[dict]], dict[str, Tensor]]],
    input_ids: Tensor,
    attention_mask: Tensor,
    targets: Tensor,
    pixels: Tensor,
) -> dict[str, Tensor]:
    """Rows by v0.1's collator, of the samples in these left-padded rows; named as in forward."""
    items = []
    for ids, real, labels, image in zip(input_ids, attention_mask, targets, pixels, strict=True):
        text = ids[real == 1].tolist()
        answer = int((labels != -100).sum())
        question = DecimalTokenizer.text(text[:-answer])
        reply = DecimalTokenizer.text(text[-answer:])
        items.append({"image": image, "text_data": question, "answer": reply})
    batch = collator(DecimalTokenizer(), input_ids.shape[1])(items)
    return {name: batch["labels" if name == "targets" else name] for name in V01}


def load(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        how = "install what the checkout's README lists"
        raise ValueError(f"{name} cannot be imported ({error}): {how}") from error


def unused(ids: Tensor, vocabulary: int) -> int:
    """The lowest token id that the batch does not contain."""
    free = torch.ones(vocabulary, dtype=torch.bool)
    free[ids.unique()] = False
    if not free.any():
        raise ValueError("the batch has every token id, none is left for images: fewer --samples")
    return int(free.nonzero()[0])
