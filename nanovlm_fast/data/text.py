"""Tokenizer, prompt and documents: a conversation becomes token ids with the targets that carry loss."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as BaseTokenizer

from nanovlm_fast.data.images import printable
from nanovlm_fast.files import read_json, write_whole
from nanovlm_fast.packing.documents import IGNORE, Document

EOS = "<|endoftext|>"  # where no file names one: SmolLM2's, and that of tokenizers made here
TOKENS_MAP = "special_tokens_map.json"
Turn = tuple[str, str]  # question, answer


def is_hub_name(name: str) -> bool:
    """Whether a tokenizer's name can only be the hub's: no folder, no other path, not 'train'."""
    shaped = re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name)
    return bool(shaped) and name != "train" and not Path(name).is_dir()


class Tokenizer:
    """A `tokenizers` tokenizer and its end of sequence, stored in the layout of `transformers`.

    A special token that a text spells out (`<|endoftext|>` in a question) is text like any other,
    so no text can end a document. Added tokens that are not special are vocabulary: they are found
    in a text and come back from it.
    """

    def __init__(self, base: BaseTokenizer, eos: str = EOS):
        self.base = base
        self.eos = eos
        self.eos_id = base.token_to_id(eos)
        if self.eos_id is None:
            raise ValueError(f"the tokenizer has no end-of-sequence token {eos!r}")
        base.no_padding()
        base.no_truncation()
        base.encode_special_tokens = True  # a setting, not in tokenizer.json: the fingerprint stays
        if self.eos_id in base.encode(eos, add_special_tokens=False).ids:
            base.add_special_tokens([eos])  # it was an added token that is not marked as special

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[BaseTokenizer, str]]:
        """Pickle by constructing anew: `base` alone comes out of a pickle without its settings."""
        return Tokenizer, (self.base, self.eos)

    def __len__(self) -> int:
        """Rows that an embedding of its ids needs."""
        return max(self.base.get_vocab().values(), default=-1) + 1

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that give the same ids."""
        return hashlib.sha256(f"{self.base.to_str()}{self.eos}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of the text, none of them the end of sequence.

        Raises ValueError if the tokenizer's model has no other way to write it (a Unigram may not).
        """
        ids = self.base.encode(text, add_special_tokens=False).ids
        if self.eos_id in ids:
            what = f"{self.eos!r} in a text from the end of sequence"
            raise ValueError(f"the tokenizer cannot tell {what}")
        return ids

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the tokens that `encode` takes for text."""
        added = self.base.get_added_tokens_decoder().items()
        return {token.content: number for number, token in added if token.special}

    def decode(self, ids: Sequence[int]) -> str:
        """Text up to the first end-of-sequence token."""
        ids = list(ids)
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return self.base.decode(ids, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        write_whole(folder / "tokenizer.json", self.base.to_str(pretty=True))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos,
            "pad_token": self.eos,
        }
        write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
        (folder / TOKENS_MAP).unlink(missing_ok=True)  # another tokenizer's would be believed

    @staticmethod
    def load(folder: Path) -> Tokenizer:
        """Read what `save` (or transformers) wrote. Raises FileNotFoundError without a tokenizer.json."""
        if not (folder / "tokenizer.json").exists():
            raise FileNotFoundError(
                f"{folder} has no tokenizer.json; --lm-tokenizer names another tokenizer"
            )
        file = folder / "tokenizer.json"
        eos, source = named_eos(folder)
        try:
            base = BaseTokenizer.from_file(str(file))
            if base.token_to_id(eos) is not None:
                return Tokenizer(base, eos)
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"{file} is damaged: {printable(str(error))}") from error
        if source is None:
            where = "eos_token in tokenizer_config.json"
            raise ValueError(f"{folder}: no end of sequence: name it as {where}")
        raise ValueError(f"{source}: its eos_token {printable(eos)!r} is no entry of {file}")

    @staticmethod
    def from_hub(name: str) -> Tokenizer:
        """A Hugging Face tokenizer, by hub name or local folder."""
        folder = Path(os.path.expanduser(name))  # Path's own raises for a user that is not there
        if folder.is_dir():
            return Tokenizer.load(folder)
        if not is_hub_name(name):
            raise FileNotFoundError(f"--lm-tokenizer {name}: no such folder, and not a hub name")
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(
                name, trust_remote_code=False
            )  # left out, it asks
        except OSError as error:
            raise OSError(
                f"tokenizer {name!r} could not be loaded from the Hugging Face hub. Give a local folder with its "
                f"tokenizer.json: --lm-tokenizer FOLDER ({str(error).splitlines()[0]})"
            ) from error
        return Tokenizer(loaded.backend_tokenizer, loaded.eos_token or EOS)

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE (as GPT-2's) on the given text, with at most `vocab_size` entries."""
        from tokenizers import decoders, models, pre_tokenizers, trainers

        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size <= len(alphabet):
            raise ValueError(
                f"--lm-vocab-size must be over {len(alphabet)} (bytes and <eos>), got {vocab_size}"
            )
        base = BaseTokenizer(models.BPE())
        base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        base.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS],
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        )
        base.train_from_iterator(texts, trainer)
        return Tokenizer(base)


def named_eos(folder: Path) -> tuple[str, Path | None]:
    """The end-of-sequence token of a folder and the file that names it; else `EOS` and None.

    It is what `transformers` says: special_tokens_map.json goes before tokenizer_config.json,
    unless that has `added_tokens_decoder`, with which the other went out of use. Raises ValueError
    for a file that names no token.
    """
    config = folder / "tokenizer_config.json"
    other = folder / TOKENS_MAP
    values = {file: read_json(file) if file.exists() else {} for file in (config, other)}
    order = [config, other] if "added_tokens_decoder" in values[config] else [other, config]
    for file in order:
        named = values[file].get("eos_token")
        if named is None:
            continue
        eos = named.get("content") if isinstance(named, dict) else named  # a dict has flags too
        if not isinstance(eos, str):
            raise ValueError(f"{file} is damaged: its eos_token is {printable(repr(named))}")
        return eos, file
    return EOS, None


class TextProcessor:
    """Turns -> documents of `[image tokens][prompt answer eos ...]`, each position labelled with its next token.

    Only answers and their end-of-sequence token carry loss. Special tokens in the prompt around
    the question are meant; those in a question or an answer are text. `mode`: 'first' takes the
    first turn, 'independent' makes every turn a document, 'chat' puts all turns in one. A text
    seen before is not tokenised again.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: str, image_tokens: int, mode: str = "independent"
    ):
        self.tokenizer, self.prompt, self.image_tokens, self.mode = (
            tokenizer,
            prompt,
            image_tokens,
            mode,
        )
        longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
        special = "|".join(map(re.escape, longest_first))
        self.prompt_parts = re.split(f"({special})", prompt) if special else [prompt]
        self.seen: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        ids = self.seen.get(text)
        if ids is None:
            ids = self.tokenizer.encode(text)
            if len(self.seen) < 100_000:
                self.seen[text] = ids
        return ids

    def ask(self, question: str, before: str = "") -> list[int]:
        """The prompt around the question, after the text `before`."""
        special = self.tokenizer.special_tokens
        if len(self.prompt_parts) == 1:
            return self.encode(before + self.prompt.format(question=question))
        ids = self.encode(before)
        for part in self.prompt_parts:
            meant = part in special
            ids = ids + ([special[part]] if meant else self.encode(part.format(question=question)))
        return ids

    def document(self, turns: Sequence[Turn], n_images: int) -> Document:
        """One document with all turns; the last answer may be '' to make a prompt without labels."""
        ids = [0] * (n_images * self.image_tokens)
        targets = [IGNORE] * len(ids)
        for i, (question, answer) in enumerate(turns):
            prompt = self.ask(question, "\n" if i else "")
            reply = [*self.encode(" " + answer), self.tokenizer.eos_id] if answer else []
            ids += prompt + reply
            targets += [IGNORE] * len(prompt) + reply
        rows = np.full(len(ids), -1, np.int32)
        rows[: n_images * self.image_tokens] = np.arange(n_images * self.image_tokens)
        labels = np.array([*targets[1:], IGNORE], np.int64)
        return Document(
            np.array(ids, np.int64), rows, labels, "\n".join(question for question, _ in turns)
        )

    def documents(self, turns: Sequence[Turn], n_images: int) -> list[Document]:
        if self.mode == "independent":
            return [self.document([turn], n_images) for turn in turns]
        return [self.document(turns[:1] if self.mode == "first" else turns, n_images)]
