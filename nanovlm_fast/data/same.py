"""Which examples show the same picture.

Two pictures are the same if the bytes of their files are. Files are compared by size first, and
read only if they have the size of a picture in question: for a hundred held-out pictures that is
little, however large the data set.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

# Bytes. A larger file is not read, as it is read at once; it is over what can be decoded anyway
LARGEST = 2**30


def digest_of(content: bytes) -> str:
    """What stands for the content of a picture's file."""
    return hashlib.sha256(content).hexdigest()[:32]


class Pictures:
    """The pictures of a source.

    examples  (shown,) int64, ascending: example `examples[i]` shows file `files[i]`
    files     (shown,) int64
    sizes     (files,) int64: a number that is cheap to find and equal for files of equal content,
              -1 for a file that cannot be read
    content   a function that reads a file
    """

    def __init__(
        self,
        examples: np.ndarray,
        files: np.ndarray,
        sizes: np.ndarray,
        content: Callable[[int], bytes],
    ):
        self.examples = examples
        self.files = files
        self.sizes = sizes
        self.content = content
        # Sorted once, so that the look-ups below are binary searches
        self.by_size = np.argsort(sizes, kind="stable")
        self.by_file = np.argsort(files, kind="stable")
        self.digests: dict[int, str] = {}

    def of(self, example: int) -> list[int]:
        """The files that the example shows."""
        return self.files[_span(self.examples, example)].tolist()

    def digest(self, file: int) -> str:
        """Equal for files of equal content. A file that cannot be read equals no other."""
        if file not in self.digests:
            digest = f"unreadable {file}"
            if self.sizes[file] >= 0:
                with contextlib.suppress(OSError, ValueError):
                    digest = digest_of(self.content(file))
            self.digests[file] = digest
        return self.digests[file]

    def same_size(self, size: int) -> list[int]:
        """The files of this size; none for -1, which says that nothing is known."""
        if size < 0:
            return []
        return self.by_size[_span(self.sizes, size, self.by_size)].tolist()

    def showing(self, file: int) -> set[int]:
        """The examples that show the content of this file, under whatever name."""
        alike = self.same_size(int(self.sizes[file])) or [file]
        if len(alike) > 1:
            alike = [other for other in alike if self.digest(other) == self.digest(file)]
        return {example for other in alike for example in self._shown_by(other)}

    def _shown_by(self, file: int) -> list[int]:
        return self.examples[self.by_file[_span(self.files, file, self.by_file)]].tolist()

    def group(self, example: int) -> set[int]:
        """The example, those that share a picture with it, those that share one with these, ...

        To the end of the chain: any two examples of different groups share no picture.
        """
        found = {example}
        new = {example}
        files: set[int] = set()
        while new:
            unseen = {file for one in new for file in self.of(one)} - files
            files |= unseen
            new = set().union(*(self.showing(file) for file in unseen)) - found
            found |= new
        return found


def _span(values: np.ndarray, value: int, order: np.ndarray | None = None) -> slice:
    """Where `value` stands in `values`, which ascend, or do in the given order."""
    start = int(np.searchsorted(values, value, "left", order))
    end = int(np.searchsorted(values, value, "right", order))
    return slice(start, end)


def of_files(paths: Iterable[Iterable[Path]]) -> Pictures:
    """The pictures of examples, given the files that each one shows."""
    numbers: dict[Path, int] = {}
    shown: list[tuple[int, int]] = []
    for i, some in enumerate(paths):
        for path in some:
            # One number per name: the size of a file that many examples show is looked up once
            shown.append((i, numbers.setdefault(path, len(numbers))))
    # reshape, for no pictures at all
    examples, files = np.array(shown, np.int64).reshape(-1, 2).T
    names = list(numbers)
    sizes = np.array([size_of_file(path) for path in names], np.int64)
    return Pictures(examples.copy(), files.copy(), sizes, lambda file: names[file].read_bytes())


def size_of_file(path: Path) -> int:
    """Bytes of a file, -1 if it cannot be read or is too large."""
    try:
        # Reading a pipe or a device may never end
        size = path.stat().st_size if path.is_file() else -1
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return -1
    return size if size <= LARGEST else -1
