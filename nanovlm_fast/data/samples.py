"""One example of a source becomes a sample: decoded, augmented, tokenised."""

from __future__ import annotations

import numpy as np

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.images import augment, load_image
from nanovlm_fast.data.sources.example import Example, Source
from nanovlm_fast.data.text import TextProcessor
from nanovlm_fast.packing.documents import Sample

CACHE_BYTES = 2**30  # decoded examples kept by each worker


class TooLong(ValueError):
    """An example that can be read but has no room in the model or the budgets.

    The message names it, and the option.
    """


def make_sample(example: Example, image_size: int, text: TextProcessor) -> Sample:
    """Decode, resize and tokenise. Raises ValueError naming the example if an image cannot be read."""
    example = example.first() if text.mode == "first" else example
    try:
        images = [load_image(image, image_size) for image in example.images]
        documents = text.documents(example.turns, len(images))
    except ValueError as error:
        raise ValueError(f"{example.name}: {error}") from error
    stacked = np.stack(images) if images else np.zeros((0, 3, image_size, image_size), np.uint8)
    return Sample(example.name, stacked, documents)


class SampleLoader:
    """Examples of a source as samples; decoded images and token ids are kept for the next epoch."""

    def __init__(self, source: Source, model: VLMConfig, train: TrainConfig, text: TextProcessor):
        source.check(model.vit_img_size, text)
        self.source, self.model, self.train, self.text = source, model, train, text
        self.cache: dict[int, Sample] = {}
        self.cache_room = CACHE_BYTES
        self.orders: dict[int, np.ndarray] = {}  # of the last two epochs

    def order(self, epoch: int) -> np.ndarray:
        """(examples,) a permutation: the order of an epoch."""
        if epoch not in self.orders:
            while len(self.orders) > 1:
                del self.orders[min(self.orders)]
            self.orders[epoch] = np.random.default_rng([self.train.seed, epoch]).permutation(
                len(self.source)
            )
        return self.orders[epoch]

    def index(self, position: int) -> int:
        """The example that `position` holds."""
        epoch, place = divmod(position, len(self.source))
        return int(self.order(epoch)[place])

    def __call__(self, position: int, curriculum: bool = False) -> Sample:
        """The sample at a position; under a curriculum only with the questions that it asks, which may be none.

        Raises ValueError (BadImage, malformed record), naming the example, if it cannot be read.
        """
        index = self.index(position)
        whole = self.cache.get(index) or self.load(index)
        rng = np.random.default_rng([self.train.seed, position])
        documents, wanted = whole.documents, self.train.questions_per_image
        if curriculum:
            documents = [
                document for document in documents if self.train.curriculum in document.question
            ]
        if 0 < wanted < len(documents):
            documents = [documents[i] for i in rng.permutation(len(documents))[:wanted]]
        return Sample(
            whole.name, augment(whole.images, self.train.augment, rng), documents, position
        )

    def load(self, index: int) -> Sample:
        example = self.source[index]
        if example.documents is not None:  # prepared: nothing that a cache could save
            return Sample(example.name, example.images, example.documents)
        limit, count = self.model.lm_max_position_embeddings, len(example.images)
        if self.text.mode == "first":
            count = min(count, 1)
        # before they are decoded: thousands would fill the memory
        if count * self.model.image_tokens > limit:
            taken = f"{count} images take {count * self.model.image_tokens} tokens"
            raise TooLong(f"{example.name}: {taken}, --lm-max-position-embeddings is {limit}")
        sample = make_sample(example, self.model.vit_img_size, self.text)
        needed = sample.images.nbytes + 20 * sample.tokens  # ids, rows and labels of a token
        if needed <= self.cache_room:
            self.cache_room -= needed
            self.cache[index] = sample
        return sample
