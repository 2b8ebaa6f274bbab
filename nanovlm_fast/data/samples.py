"""One example of a source becomes a sample: decoded, augmented, tokenised.

What a position of the stream holds is a function of the seed and the position, never of what was
read before. Resuming, and dividing the data between workers, rest on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.images import Grid, augment, load_image, split_image
from nanovlm_fast.data.sources.example import Example, Source
from nanovlm_fast.data.sources.finevision import RATINGS
from nanovlm_fast.data.text import TextProcessor
from nanovlm_fast.packing.documents import Sample

# What a run counts of what its options drop: turns by the rating that they fall by, examples that
# are left without a turn, and examples of a stream that show what is held out
DROPPED = (*RATINGS, "examples", "held_out")


def say_dropped(counts: Mapping[str, int]) -> str:
    """What the options dropped, by `DROPPED`, to go on a list of what was left out; '' if nothing.

    As in ", 3 examples without a turn left, turns rated too low: relevance 4".
    """
    left = dict(counts)
    said = ""
    for reason, what in (("held_out", "held out"), ("examples", "without a turn left")):
        if count := left.pop(reason, 0):
            said += f", {count:,} examples {what}"
    by_rating = ", ".join(f"{name} {count:,}" for name, count in sorted(left.items()) if count)
    return f"{said}, turns rated too low: {by_rating}" if by_rating else said


# Decoded examples that each worker keeps: enough for all of easy-VQA with the preset tiny
CACHE_BYTES = 2**30


class TooLong(ValueError):
    """An example that can be read but does not fit the model or the budgets.

    The message names it, and the option that limits it.
    """


def load_tiles(images: Sequence[Any], model: VLMConfig) -> tuple[np.ndarray, list[Grid]]:
    """(tiles of all images in order, the grid of each): what a model sees of an example.

    Tiles are (n, 3, S, S) uint8 with S = vit_img_size, one per image if images are not cut. Raises
    BadImage if an image cannot be decoded.
    """
    size = model.vit_img_size
    if not model.max_img_size:
        squares = [load_image(image, size) for image in images]
        return np.stack(squares) if squares else _no_images(size), [(1, 1)] * len(squares)
    cut = [split_image(image, model) for image in images]
    tiles = [tiles for tiles, _ in cut]
    return np.concatenate(tiles or [_no_images(size)]), [grid for _, grid in cut]


def tiles_shown(example: Example, model: VLMConfig) -> tuple[np.ndarray, list[Grid]]:
    """`load_tiles` of the example's images, which prepared data holds already.

    Raises ValueError for data that was prepared for another model's images.
    """
    if example.grids is None:
        return load_tiles(example.images, model)
    tiles = np.array(example.images)  # a copy: what the file is mapped to cannot be written to
    if not model.max_img_size or tiles.shape[1:] != (3, model.vit_img_size, model.vit_img_size):
        what = "tiles of prepared data, for models that see other ones or none"
        raise ValueError(f"{example.name}: {what}")
    return tiles, example.grids


def _no_images(size: int) -> np.ndarray:
    return np.zeros((0, 3, size, size), np.uint8)


def make_sample(example: Example, model: VLMConfig, text: TextProcessor) -> Sample:
    """Decode, resize or cut, and tokenise an example.

    Raises ValueError, naming the example, if an image cannot be read or a text not be tokenised.
    """
    example = example.first() if text.mode == "first" else example
    try:
        tiles, grids = load_tiles(example.images, model)
        documents = text.documents(example.turns, grids)
    except ValueError as error:
        raise ValueError(f"{example.name}: {error}") from error
    return Sample(example.name, tiles, documents, grids=tuple(grids))


def build(example: Example, model: VLMConfig, train: TrainConfig, text: TextProcessor) -> Sample:
    """Decode and tokenise an example, as the options of a run say.

    The sample has no documents if all turns were dropped. Raises TooLong for an example that the
    options leave out, and ValueError, naming it, for one that cannot be read.
    """
    example, dropped = chosen(example, train, text.mode)
    check_count(example, model)
    if dropped and not example.turns:
        nothing = _no_images(model.vit_img_size)
        return Sample(example.name, nothing, [], dropped=(*dropped, "examples"))
    sample = make_sample(example, model, text)
    sample.dropped = dropped
    return sample


def check_count(example: Example, model: VLMConfig) -> None:
    """Raise TooLong for more images than the model has positions for, whatever their sizes.

    To be called before they are decoded: thousands of them would fill the memory.
    """
    count = len(example.images)
    limit = model.lm_max_position_embeddings
    if count * model.image_tokens > limit:
        taken = f"{count} images take {count * model.image_tokens} tokens"
        raise TooLong(f"{example.name}: {taken}, --lm-max-position-embeddings is {limit}")


def chosen(example: Example, train: TrainConfig, mode: str) -> tuple[Example, tuple[str, ...]]:
    """What the options of a run take of an example, and the ratings that other turns fell by.

    Raises TooLong for more images than --max-images.
    """
    if mode == "first":
        example = example.first()
    if 0 < train.max_images < len(example.images):
        many = f"{len(example.images)} images, --max-images is {train.max_images}"
        raise TooLong(f"{example.name}: {many}")
    return well_rated(example, train)


def well_rated(example: Example, train: TrainConfig) -> tuple[Example, tuple[str, ...]]:
    """The example without the turns that are rated too low, and the rating that each fell by."""
    kept: list[int] = []
    dropped: list[str] = []
    for turn in range(len(example.turns)):
        reason = _falls_by(example, turn, train)
        if reason is None:
            kept.append(turn)
        else:
            dropped.append(reason)
    return (example.keep(kept), tuple(dropped)) if dropped else (example, ())


class WellRated(Source):
    """The examples of `source` without the turns that the options of a run drop.

    What is held out is asked what the run is trained to answer. Such an example may have no turn.
    """

    def __init__(self, source: Source, train: TrainConfig):
        self.source = source
        self.train = train

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return well_rated(self.source[index], self.train)[0]


def _falls_by(example: Example, turn: int, train: TrainConfig) -> str | None:
    """The first rating of a turn that is below its minimum, None for none."""
    for name, ratings in example.ratings.items():
        rating = ratings[turn]
        if rating is not None and rating < getattr(train, f"min_rating_{name}"):
            return name
    return None


class SampleLoader:
    """Reads the examples of a source as samples.

    Decoded images and token ids are kept for the next epoch, up to CACHE_BYTES.
    """

    def __init__(self, source: Source, model: VLMConfig, train: TrainConfig, text: TextProcessor):
        source.check(model, text, train)
        if model.max_img_size and train.augment != "none":
            moved = "moves and mirrors whole images, and these are cut into tiles (--max-img-size)"
            raise ValueError(f"--augment {train.augment} {moved}: use none")
        self.source = source
        self.model = model
        self.train = train
        self.text = text
        self.cache: dict[int, Sample] = {}
        self.cache_room = CACHE_BYTES
        # Of the last two epochs: samples of the epoch before are still buffered when one begins
        self.orders: dict[int, np.ndarray] = {}

    def order(self, epoch: int) -> np.ndarray:
        """(examples,) a permutation: the order of an epoch."""
        if epoch not in self.orders:
            while len(self.orders) > 1:
                del self.orders[min(self.orders)]
            rng = np.random.default_rng([self.train.seed, epoch])
            self.orders[epoch] = rng.permutation(len(self.source))
        return self.orders[epoch]

    def index(self, position: int) -> int:
        """The number of the example at a position."""
        epoch, place = divmod(position, len(self.source))
        return int(self.order(epoch)[place])

    def __call__(self, position: int, curriculum: bool = False) -> Sample:
        """The sample at a position.

        With `curriculum` it holds only the questions that the curriculum selects, perhaps none.
        Raises ValueError (BadImage, malformed record), naming the example, if it cannot be read.
        """
        index = self.index(position)
        whole = self.cache.get(index) or self.load(index)
        return self.drawn(whole, position, curriculum)

    def drawn(
        self, whole: Sample, position: int, curriculum: bool = False, shard: int | None = None
    ) -> Sample:
        """What a position holds of a sample: questions drawn, images augmented.

        `shard` tells the positions of a streamed data set apart, which each shard counts.
        """
        # From the position, not from a generator that lives on: a resumed run draws the same
        place = [position] if shard is None else [position, shard]
        rng = np.random.default_rng([self.train.seed, *place])
        documents = whole.documents
        wanted = self.train.questions_per_image
        if curriculum:
            documents = [
                document for document in documents if self.train.curriculum in document.question
            ]
        if 0 < wanted < len(documents):
            documents = [documents[i] for i in rng.permutation(len(documents))[:wanted]]
        # Drawn after the questions, and on a copy: the cache keeps the images as they were
        images = augment(whole.images, self.train.augment, rng)
        return replace(whole, images=images, documents=documents, key=position)

    def build(self, example: Example) -> Sample:
        """Decode and tokenise an example. Raises ValueError, naming it, if that cannot be done."""
        return build(example, self.model, self.train, self.text)

    def load(self, index: int) -> Sample:
        """Read one example with all its questions, not augmented, and keep it if there is room."""
        example = self.source[index]
        if example.documents is not None:
            # Prepared data is not cached: its images are views of a memory-mapped file
            return Sample(example.name, np.asarray(example.images), example.documents)
        sample = self.build(example)
        needed = sample.images.nbytes + 20 * sample.tokens  # id 8, row 4, label 8 bytes per token
        # Never evicted: each epoch reads everything once, so a cache that evicts the least recently
        # used would drop most examples before they come again
        if needed <= self.cache_room:
            self.cache_room -= needed
            self.cache[index] = sample
        return sample
