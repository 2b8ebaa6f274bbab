"""What a step trains on: documents drawn like The Cauldron's, or those of a data set.

By default `cauldron_like` makes one image and one question per sample: 49 image tokens, a prompt
and an answer. Lengths are log-normal: prompts with a median of 16 tokens and a sigma of 0.4,
answers (including the end of the sequence) with a median of 7.5 and a sigma of 1.0. What exceeds
nanoVLM's 79 text tokens is cut. A sample then has 78 tokens on average, 12 of them labelled, and
39% of rows of 128 are padding. Pixels and token ids are noise. On request an image has several
questions, or every text has the median lengths, so that no row needs padding.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.registry import load_source, texts
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.model.flops import step_flops
from nanovlm_fast.packing.documents import IGNORE, Document, Sample
from nanovlm_fast.presets import preset

# Median and sigma of log-normal lengths, in tokens.
PROMPT = (16.0, 0.4)
ANSWER = (7.5, 1.0)
SHORTEST_PROMPT = 6  # "Question: why? Answer:"
SHORTEST_ANSWER = 2  # a word and the end of the sequence


@dataclass
class Work:
    """The samples of one optimizer step, and their real sizes.

    The counts are the same for every variant, however it pads or packs the samples. `train` is how
    the model would be trained.
    """

    config: VLMConfig
    samples: list[Sample]
    train: TrainConfig = field(default_factory=TrainConfig)

    @cached_property
    def documents(self) -> list[Document]:
        return [document for sample in self.samples for document in sample.documents]

    @property
    def text_length(self) -> int:
        """Text tokens to which the reference pads every row."""
        longest = max(int((document.image_rows < 0).sum()) for document in self.documents)
        return max(self.config.lm_max_length, longest)

    @property
    def row_length(self) -> int:
        """Image and text tokens of a padded row."""
        shown = max(int((document.image_rows >= 0).sum()) for document in self.documents)
        return shown + self.text_length

    @property
    def counts(self) -> dict[str, int]:
        """Real tokens (text and image, no padding), labelled tokens, images, questions."""
        return {
            "tokens": sum(len(document) for document in self.documents),
            "labels": sum(sample.labels for sample in self.samples),
            "images": sum(len(sample.images) for sample in self.samples),
            "questions": len(self.documents),
        }

    @property
    def flops(self) -> int:
        """Model FLOPs of a step: useful work only, see `step_flops`."""
        counts = self.counts
        pairs = sum(len(d) * (len(d) + 1) // 2 for d in self.documents)  # causal attention
        return step_flops(self.config, counts["images"], counts["tokens"], counts["labels"], pairs)

    @property
    def waste(self) -> float:
        """Share of the reference's positions that are padding."""
        return 1 - self.counts["tokens"] / (self.row_length * len(self.documents))

    def rates(self, seconds: float, peak: float | None) -> dict[str, float]:
        """Rates of a step that takes `seconds`; with the device's `peak` FLOP/s also `mfu`."""
        values = {f"{name}_per_s": count / seconds for name, count in self.counts.items()}
        values["tflops_per_s"] = self.flops / seconds / 1e12
        return values | ({"mfu": self.flops / seconds / peak} if peak else {})

    def as_result(self) -> dict[str, float]:
        sizes = {"row_length": self.row_length, "padded_waste": self.waste, "flops": self.flops}
        return {**self.counts, **sizes}


def load_work(
    preset_name: str,
    data: str = "",
    samples: int = 0,
    layers: int = 0,
    on_gpu: bool = False,
    seed: int = 0,
) -> Work:
    """Work for a preset.

    Empty and zero options mean defaults. `data`: easy_vqa for tiny, else cauldron_like. `samples`:
    32 of a data set; of cauldron_like 256 on a GPU and 16 on a CPU. `layers`: the preset's. Raises
    ValueError for an unknown preset or data set, and for negative numbers.
    """
    config, train = preset(preset_name)
    data = data or ("easy_vqa" if preset_name == "tiny" else "cauldron_like")
    for option, value in (("samples", samples), ("layers", layers)):
        if value < 0:
            raise ValueError(f"--{option} must be positive, or 0 for the default, got {value}")
    if layers:
        config = dataclasses.replace(config, vit_n_blocks=layers, lm_n_blocks=layers)
    if data == "cauldron_like":
        samples = samples or (256 if on_gpu else 16)
        return Work(config, cauldron_like(config, samples, seed), train)
    source = load_source(data, "train")
    tokenizer = Tokenizer.train(texts(source, config.prompt), config.lm_vocab_size)
    text = TextProcessor(tokenizer, config.prompt, config.image_tokens, "independent")
    # All questions of an image and no augmentation: every variant gets the same work.
    train = dataclasses.replace(train, data=data, questions_per_image=0, augment="none", seed=seed)
    load = SampleLoader(source, config, train, text)
    count = min(samples or 32, len(source))
    return Work(config, [load(position) for position in range(count)], train)


def draw_lengths(
    rng: np.random.Generator, count: int, longest: int, even: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(count,) prompt and answer lengths in tokens, together at most `longest`.

    `even`: all lengths are the medians.
    """

    def draw(median: float, sigma: float) -> np.ndarray:
        return np.rint(rng.lognormal(np.log(median), 0.0 if even else sigma, count))

    prompt = draw(*PROMPT).clip(SHORTEST_PROMPT, longest - SHORTEST_ANSWER).astype(int)
    answer = draw(*ANSWER).clip(SHORTEST_ANSWER)
    return prompt, np.minimum(answer, longest - prompt).astype(int)


def cauldron_like(
    config: VLMConfig, count: int, seed: int = 0, questions: int = 1, even: bool = False
) -> list[Sample]:
    """`count` samples of one image with `questions` about it; deterministic.

    The text of a question has at most config.lm_max_length tokens. `even`: all have equal lengths.
    """
    rng = np.random.default_rng(seed)
    size = config.vit_img_size
    lengths = draw_lengths(rng, count * questions, config.lm_max_length, even)
    pairs = list(zip(*lengths, strict=True))
    samples = []
    for i in range(count):
        about_it = pairs[i * questions : (i + 1) * questions]
        documents = [noise(rng, config, prompt, answer) for prompt, answer in about_it]
        images = rng.integers(0, 256, (1, 3, size, size), dtype=np.uint8)
        samples.append(Sample(f"cauldron_like/{i}", images, documents))
    return samples


def noise(rng: np.random.Generator, config: VLMConfig, prompt: int, answer: int) -> Document:
    """One image's tokens, then random text whose `answer` last tokens are labelled."""
    shown = config.image_tokens
    length = shown + prompt + answer
    ids = rng.integers(0, config.lm_vocab_size, length)
    ids[:shown] = 0  # a placeholder: the image's tokens replace these embeddings
    rows = np.arange(length, dtype=np.int32)
    rows[shown:] = -1
    labels = np.full(length, IGNORE, np.int64)
    # A position is labelled with the token that follows it.
    labels[-answer - 1 : -1] = ids[-answer:]
    return Document(ids, rows, labels)
