"""Tokenizer and documents: a conversation becomes token ids, with targets where there is loss.

A document of one turn, with k image tokens, a prompt of p tokens and an answer of m; - is IGNORE.
Only the answer carries loss, and each label is the token after its position:

    input_ids   0 ...   0  p_0 ... p_p  a_0 ... a_m  eos    (n,) int64
    labels      - ...   -  -   ... a_0  a_1 ... eos  -      (n,) int64
    image_rows  0 ... k-1  -1  ...  -1  -1  ...  -1  -1     (n,) int32
"""

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

# The end of sequence if no file names one: that of SmolLM2, and of tokenizers made here
EOS = "<|endoftext|>"
TOKENS_MAP = "special_tokens_map.json"
Turn = tuple[str, str]  # question, answer
Grid = tuple[int, int]  # rows and columns of an image's tiles
Images = int | Sequence[Grid]  # of an example: how many of one tile each, or the grid of each


def is_hub_name(name: str) -> bool:
    """Whether a tokenizer's name can only be one on the hub: not a path, and not 'train'."""
    shaped = re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name)
    return bool(shaped) and name != "train" and not Path(name).is_dir()


class Tokenizer:
    """A `tokenizers` tokenizer and its end of sequence, stored in the layout of `transformers`.

    A special token spelled out in a text (`<|endoftext|>` in a question) is encoded as text like
    any other, so no text can end a document. Added tokens that are not special are vocabulary: they
    are encoded as one token, and decoded again.
    """

    def __init__(self, base: BaseTokenizer, eos: str = EOS):
        self.base = base
        self.eos = eos
        eos_id: int | None = base.token_to_id(eos)
        if eos_id is None:
            raise ValueError(f"the tokenizer has no end-of-sequence token {eos!r}")
        self.eos_id = eos_id
        # A file may switch both on. Truncation would shorten texts without a word
        base.no_padding()
        base.no_truncation()
        # A setting that is not stored in tokenizer.json, so the fingerprint stays what it was
        base.encode_special_tokens = True
        self._make_special([eos])

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[BaseTokenizer, str]]:
        """Pickle by constructing anew: unpickled, `base` has lost `encode_special_tokens`."""
        return Tokenizer, (self.base, self.eos)

    def _make_special(self, tokens: Sequence[str]) -> None:
        """Mark entries as special that a text could still spell; entries that are new are added."""
        spelled = []
        for token in tokens:
            number = self.base.token_to_id(token)
            if number is None or number in self.base.encode(token, add_special_tokens=False).ids:
                spelled.append(token)
        if spelled:
            self.base.add_special_tokens(spelled)

    def reserve(self, tokens: Sequence[str]) -> list[int]:
        """The ids of special tokens that no text can spell; new ones follow the vocabulary.

        Those that the tokenizer has keep their ids. Raises ValueError for a token without a text.
        """
        if not all(tokens):
            raise ValueError("a special token must not be empty")
        self._make_special(tokens)
        for cached in ("special_tokens", "special_ids"):  # before these were among them
            self.__dict__.pop(cached, None)
        known: dict[str, int] = self.base.get_vocab()
        return [known[token] for token in tokens]

    def end_with(self, eos: str) -> None:
        """Make another of the entries the end of sequence, also in what `save` writes."""
        self.eos = eos
        self.eos_id = self.reserve([eos])[0]

    def __len__(self) -> int:
        """Rows that an embedding of its ids needs.

        That is the largest id + 1, not the number of entries: ids may have gaps.
        """
        return max(self.base.get_vocab().values(), default=-1) + 1

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers with the same content, which give the same ids."""
        return hashlib.sha256(f"{self.base.to_str()}{self.eos}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of the text, none of them a special token that the text spells.

        Raises ValueError if the model of the tokenizer has no other token for a text that spells
        the end of sequence or another special token. A Unigram model may have none.
        """
        ids = self.base.encode(text, add_special_tokens=False).ids
        if self.eos_id in ids:
            what = f"{self.eos!r} in a text from the end of sequence"
            raise ValueError(f"the tokenizer cannot tell {what}")
        if not self.special_ids.isdisjoint(ids):
            # The token for what is unknown is special too, and no text has to spell it
            spelled = [t for t, i in self.special_tokens.items() if i in ids and t in text]
            if spelled:
                what = f"{spelled[0]!r} in a text from that special token"
                raise ValueError(f"the tokenizer cannot tell {what}")
        return ids

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens, which `encode` never gives."""
        added = self.base.get_added_tokens_decoder().items()
        return {token.content: number for number, token in added if token.special}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    def decode(self, ids: Sequence[int]) -> str:
        """Text up to the first end-of-sequence token."""
        ids = list(ids)
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return self.base.decode(ids, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as `transformers` reads them."""
        write_whole(folder / "tokenizer.json", self.base.to_str(pretty=True))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos,
            "pad_token": self.eos,
        }
        write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
        # One that another tokenizer left would take precedence; see `named_eos`
        (folder / TOKENS_MAP).unlink(missing_ok=True)

    @staticmethod
    def load(folder: Path) -> Tokenizer:
        """Read what `save` or transformers wrote.

        Raises FileNotFoundError without a tokenizer.json, ValueError if a file is damaged or no end
        of sequence is known.
        """
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
        except Exception as error:  # `tokenizers` raises plain Exception
            raise ValueError(f"{file} is damaged: {printable(str(error))}") from error
        if source is None:
            where = "eos_token in tokenizer_config.json"
            raise ValueError(f"{folder}: no end of sequence: name it as {where}")
        raise ValueError(f"{source}: its eos_token {printable(eos)!r} is no entry of {file}")

    @staticmethod
    def from_hub(name: str) -> Tokenizer:
        """A Hugging Face tokenizer, by hub name or local folder.

        Raises FileNotFoundError for a name that is neither, OSError if the hub cannot be reached,
        and what `load` raises.
        """
        folder = Path(os.path.expanduser(name))  # Path.expanduser raises for an unknown user
        if folder.is_dir():
            return Tokenizer.load(folder)
        if not is_hub_name(name):
            raise FileNotFoundError(f"--lm-tokenizer {name}: no such folder, and not a hub name")
        # Imported here: it takes seconds, and training from a local folder must not need it
        from transformers import AutoTokenizer

        try:
            # Without trust_remote_code=False, a tokenizer with code of its own makes it prompt
            loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except OSError as error:
            raise OSError(
                f"tokenizer {name!r} could not be loaded from the Hugging Face hub. Give a local "
                "folder with its tokenizer.json: --lm-tokenizer FOLDER "
                f"({str(error).splitlines()[0]})"
            ) from error
        return Tokenizer(loaded.backend_tokenizer, loaded.eos_token or EOS)

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int, special: Sequence[str] = (EOS,)) -> Tokenizer:
        """Train a byte-level BPE (as GPT-2's) with at most `vocab_size` entries.

        Its first entries are the `special` tokens, the last of which is the end of sequence.
        """
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
            special_tokens=list(special),
            # All bytes, or a text with a byte that the training texts lack could not be encoded.
            # Sorted: `alphabet` comes in no fixed order, and ids follow it
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        )
        base.train_from_iterator(texts, trainer)
        return Tokenizer(base, special[-1])


def named_eos(folder: Path) -> tuple[str, Path | None]:
    """(end-of-sequence token of a folder, the file that names it), or (EOS, None).

    The precedence is that of `transformers`: special_tokens_map.json goes before
    tokenizer_config.json, unless the latter has `added_tokens_decoder`, which came when the former
    went out of use. Raises ValueError if what a file names is not a token.
    """
    config = folder / "tokenizer_config.json"
    other = folder / TOKENS_MAP
    values = {file: read_json(file) if file.exists() else {} for file in (config, other)}
    order = [config, other] if "added_tokens_decoder" in values[config] else [other, config]
    for file in order:
        named = values[file].get("eos_token")
        if named is None:
            continue
        # A dict is a token with its flags
        eos = named.get("content") if isinstance(named, dict) else named
        if not isinstance(eos, str):
            raise ValueError(f"{file} is damaged: its eos_token is {printable(repr(named))}")
        return eos, file
    return EOS, None


class TextProcessor:
    """Makes documents of turns, each position labelled with its next token.

    Only answers and their end-of-sequence token carry loss. Special tokens in the prompt around
    the question are special; those in a question or an answer are text. `mode`: 'first' takes the
    first turn, 'independent' makes a document of every turn, 'chat' puts all turns into one.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: str, image_tokens: int, mode: str = "independent"
    ):
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.image_tokens = image_tokens
        self.mode = mode
        # Longest first: the first alternative that matches wins, and one token may begin another
        longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
        special = "|".join(map(re.escape, longest_first))
        # Cut before a question is put in: special tokens of the prompt only, not of the question
        self.prompt_parts = re.split(f"({special})", prompt) if special else [prompt]
        self.seen: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Answers and questions repeat, so 100,000 short texts are kept."""
        ids = self.seen.get(text)
        if ids is None:
            ids = self.tokenizer.encode(text)
            if len(self.seen) < 100_000 and len(text) <= 200:
                self.seen[text] = ids
        return ids

    def length(self, answer: str) -> int:
        """Tokens of an answer, without the end of sequence."""
        return len(self.encode(f" {answer}"))

    def ask(self, question: str, before: str = "") -> list[int]:
        """Ids of the text `before` and the prompt around the question."""
        special = self.tokenizer.special_tokens
        if len(self.prompt_parts) == 1:
            # In one piece: cut into parts, a text may give other tokens
            return self.encode(before + self.prompt.format(question=question))
        ids = list(self.encode(before))  # a copy, as `encode` keeps what it returns
        for part in self.prompt_parts:
            if part in special:
                ids.append(special[part])
            else:
                ids += self.encode(part.format(question=question))
        return ids

    def document(self, turns: Sequence[Turn], n_images: Images, whole: bool = False) -> Document:
        """One document with all turns.

        With '' as the last answer it is a prompt, to which a model replies, `whole` or not: only
        conversations (chat.py) have empty answers.
        """
        count = n_images if isinstance(n_images, int) else len(n_images)
        n_image_tokens = count * self.image_tokens
        ids = [0] * n_image_tokens
        targets = [IGNORE] * n_image_tokens
        for i, (question, answer) in enumerate(turns):
            prompt = self.ask(question, "\n" if i else "")
            reply = [*self.encode(" " + answer), self.tokenizer.eos_id] if answer else []
            ids += prompt + reply
            targets += [IGNORE] * len(prompt) + reply
        rows = np.full(len(ids), -1, np.int32)
        rows[:n_image_tokens] = np.arange(n_image_tokens)
        # Shifted here, so that neither the packer nor the model has to know about neighbours
        labels = np.array([*targets[1:], IGNORE], np.int64)
        asked = "\n".join(question for question, _ in turns)
        return Document(np.array(ids, np.int64), rows, labels, asked)

    def documents(self, turns: Sequence[Turn], n_images: Images) -> list[Document]:
        """The documents of an example's turns, as `mode` says."""
        if self.mode == "independent":
            return [self.document([turn], n_images, whole=True) for turn in turns]
        chosen = turns[:1] if self.mode == "first" else turns
        return [self.document(chosen, n_images, whole=True)]
