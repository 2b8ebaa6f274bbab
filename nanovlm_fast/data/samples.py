"""One example of a source becomes a sample: decoded, augmented, tokenised.

What a position of the stream holds is a function of the seed and the position, never of what was
read before. Resuming, and dividing the data between workers, rest on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.images import Grid, augment, load_image, split_image
from nanovlm_fast.data.sources.example import Example, Source
from nanovlm_fast.data.text import TextProcessor
from nanovlm_fast.packing.documents import Sample

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
    return Sample(example.name, tiles, documents)


class SampleLoader:
    """Reads the examples of a source as samples.

    Decoded images and token ids are kept for the next epoch, up to CACHE_BYTES.
    """

    def __init__(self, source: Source, model: VLMConfig, train: TrainConfig, text: TextProcessor):
        source.check(model.vit_img_size, text)
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
        # From the position, not from a generator that lives on: a resumed run draws the same
        rng = np.random.default_rng([self.train.seed, position])
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
        return Sample(whole.name, images, documents, position)

    def load(self, index: int) -> Sample:
        """Read one example with all its questions, not augmented, and keep it if there is room."""
        example = self.source[index]
        if example.documents is not None:
            # Prepared data is not cached: its images are views of a memory-mapped file
            return Sample(example.name, np.asarray(example.images), example.documents)
        limit = self.model.lm_max_position_embeddings
        count = len(example.images)
        if self.text.mode == "first":
            count = min(count, 1)
        # Before the images are decoded: thousands of them would fill the memory
        if count * self.model.image_tokens > limit:
            taken = f"{count} images take {count * self.model.image_tokens} tokens"
            raise TooLong(f"{example.name}: {taken}, --lm-max-position-embeddings is {limit}")
        sample = make_sample(example, self.model, self.text)
        needed = sample.images.nbytes + 20 * sample.tokens  # id 8, row 4, label 8 bytes per token
        # Never evicted: each epoch reads everything once, so a cache that evicts the least recently
        # used would drop most examples before they come again
        if needed <= self.cache_room:
            self.cache_room -= needed
            self.cache[index] = sample
        return sample
