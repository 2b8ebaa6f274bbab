"""What a step trains on: documents drawn like The Cauldron's, or those of a data set.

By default `cauldron_like` makes one image and one question per sample: 49 image tokens, a prompt
and an answer. Lengths are log-normal: prompts with a median of 16 tokens and a sigma of 0.4,
answers (including the end of the sequence) with a median of 7.5 and a sigma of 1.0. What exceeds
nanoVLM's 79 text tokens is cut. A sample then has 78 tokens on average, 12 of them labelled, and
39% of rows of 128 are padding. Pixels and token ids are noise. On request an image has several
questions, or every text has the median lengths, so that no row needs padding.

For models that cut images into tiles it is `finevision_like`, one conversation per sample. Its
means are those that FineVision's authors give: 0.7 images, 3.75 turns and 417 tokens of answers.
The shapes of the pictures and the spread of the lengths are assumptions: see the constants.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.chat import make_text
from nanovlm_fast.data.images import Grid, grid_of, tiles_of
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.registry import is_local, load_source, make_tokenizer
from nanovlm_fast.model.flops import step_flops
from nanovlm_fast.packing.documents import IGNORE, Document, Sample
from nanovlm_fast.presets import preset

# Median and sigma of log-normal lengths, in tokens.
PROMPT = (16.0, 0.4)
ANSWER = (7.5, 1.0)
# Of finevision_like: how many images a conversation has, and their pixels, each with its share.
IMAGES = {0: 0.34, 1: 0.62, 2: 0.03, 4: 0.01}
PIXELS = {(640, 480): 0.4, (480, 640): 0.15, (800, 800): 0.2, (1280, 720): 0.15, (1000, 500): 0.1}
TURNS = 3.75  # the mean of a geometric distribution
QUESTION = (16.0, 0.5)  # median and sigma, in tokens, as above
REPLY = (42.0, 1.4)
MARKS = 4  # tokens around each question and each reply
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
    def interleaved(self) -> bool:
        """Whether image tokens stand among the text, and not before it."""
        return bool(self.config.vlm_extra_tokens)

    @property
    def text_length(self) -> int:
        """Text tokens to which the reference pads every row."""
        longest = max(int((document.image_rows < 0).sum()) for document in self.documents)
        return max(self.config.lm_max_length, longest)

    @property
    def row_length(self) -> int:
        """Image and text tokens of a padded row."""
        if self.interleaved:
            return max(len(document) for document in self.documents)
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

    Empty and zero options mean defaults. `data`: see `default_data`. `samples`: 32 of a data set,
    of cauldron_like 256 on a GPU and 16 on a CPU, of finevision_like 8 and 2. `layers`: the
    preset's. Raises ValueError for an unknown preset or data set, and for negative numbers.
    """
    config, train = preset(preset_name)
    data = data or default_data(preset_name)
    for option, value in (("samples", samples), ("layers", layers)):
        if value < 0:
            raise ValueError(f"--{option} must be positive, or 0 for the default, got {value}")
    if layers:
        config = dataclasses.replace(config, vit_n_blocks=layers, lm_n_blocks=layers)
    if data == "cauldron_like":
        samples = samples or (256 if on_gpu else 16)
        return Work(config, cauldron_like(config, samples, seed), train)
    if data == "finevision_like":
        return Work(config, finevision_like(config, samples or (8 if on_gpu else 2), seed), train)
    source = load_source(data, "train")
    # One of the hub's would have to be downloaded.
    tokenizer = make_tokenizer(dataclasses.replace(config, lm_tokenizer="train"), source)
    text = make_text(tokenizer, config, "independent")
    # All questions of an image and no augmentation: every variant gets the same work.
    train = dataclasses.replace(train, data=data, questions_per_image=0, augment="none", seed=seed)
    load = SampleLoader(source, config, train, text)
    count = min(samples or 32, len(source))
    return Work(config, [load(position) for position in range(count)], train)


def default_data(preset_name: str) -> str:
    """What a preset trains on here: data that ships with a package, else documents like its own."""
    config, train = preset(preset_name)
    if is_local(train.data):
        return train.data
    return "finevision_like" if config.max_img_size else "cauldron_like"


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


def finevision_like(
    config: VLMConfig, count: int, seed: int = 0, questions: int = 0, blank: bool = False
) -> list[Sample]:
    """`count` conversations about images that are cut into tiles; deterministic.

    With `questions`, every sample has one image and so many documents of one turn about it.
    `blank`: pixels are zeros without memory, to draw many samples whose sizes alone matter. Raises
    ValueError for a model without tokens for tiles.
    """
    if not config.max_img_size:
        raise ValueError("finevision_like cuts images into tiles, which this model does not take")
    rng = np.random.default_rng(seed)
    sizes: list[tuple[int, int]] = list(PIXELS)
    samples = []
    for i in range(count):
        number = 1 if questions else int(rng.choice(list(IMAGES), p=list(IMAGES.values())))
        drawn = rng.choice(len(sizes), number, p=list(PIXELS.values()))
        grids = [grid_of(*sizes[int(which)], config) for which in drawn]
        if questions:
            documents = [conversation(rng, config, grids, 1) for _ in range(questions)]
        else:
            documents = [conversation(rng, config, grids, int(rng.geometric(1 / TURNS)))]
        size = config.vit_img_size
        shape = (sum(tiles_of(grid, config) for grid in grids), 3, size, size)
        zeros = np.broadcast_to(np.zeros((), np.uint8), shape)
        tiles = zeros if blank else rng.integers(0, 256, shape, dtype=np.uint8)
        samples.append(Sample(f"finevision_like/{i}", tiles, documents))
    return samples


def conversation(
    rng: np.random.Generator, config: VLMConfig, grids: list[Grid], turns: int
) -> Document:
    """Tiles behind the tokens of their places, then turns of random text with labelled replies.

    At most as many turns as the model has positions for; the first is cut to them.
    """
    base = config.lm_vocab_size - len(config.vlm_extra_tokens)
    ids_of = {name: base + number for number, name in enumerate(config.vlm_extra_tokens)}
    tile = [ids_of["image_token"]] * config.image_tokens
    ids: list[int] = []
    for rows, columns in grids:
        if config.has_global_tile:
            ids += [ids_of["global_image_token"], *tile]
        if (rows, columns) != (1, 1) or not config.has_global_tile:
            for place in range(rows * columns):
                name = f"r{place // columns + 1}c{place % columns + 1}"
                ids += [ids_of[name], *tile]
    labelled = [False] * len(ids)
    for turn in range(turns):
        medians = np.array([QUESTION, REPLY])
        lengths = np.rint(rng.lognormal(np.log(medians[:, 0]), medians[:, 1])).astype(int)
        asked, said = lengths.clip(1, 2048) + MARKS
        room = config.lm_max_position_embeddings - len(ids)
        if turn and asked + said > room:
            break
        asked = min(asked, room // 2)
        said = min(said, room - asked)
        ids += rng.integers(0, base, asked + said).tolist()
        labelled += [False] * asked + [True] * said
    input_ids = np.array(ids, np.int64)
    rows_of = np.full(len(ids), -1, np.int32)
    (shown,) = np.nonzero(input_ids == ids_of["image_token"])
    rows_of[shown] = np.arange(len(shown))
    # A position is labelled with the token that follows it.
    targets = np.where(labelled, input_ids, IGNORE)
    return Document(input_ids, rows_of, np.append(targets[1:], IGNORE))
