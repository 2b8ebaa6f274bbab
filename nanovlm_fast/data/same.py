"""Which examples show the same picture.

Pictures are the same if their bytes are. Bytes are read only of pictures that have the size of one
that somebody asks about: for a hundred held-out pictures that is little, however large the data.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

LARGEST = 2**30  # bytes; no file that can be decoded has more, and this many are read at once


class Pictures:
    """The pictures of a source: example `examples[i]` shows file `files[i]`; `examples` ascends.

    `sizes[f]` is a number that files of the same content have in common and that is cheap to know,
    or -1 where file f cannot be read; `content(f)` reads the file.
    """

    def __init__(
        self,
        examples: np.ndarray,
        files: np.ndarray,
        sizes: np.ndarray,
        content: Callable[[int], bytes],
    ):
        self.examples, self.files, self.sizes, self.content = examples, files, sizes, content
        self.by_size = np.argsort(sizes, kind="stable")
        self.by_file = np.argsort(files, kind="stable")
        self.digests: dict[int, str] = {}

    def of(self, example: int) -> list[int]:
        """The files that the example shows."""
        return self.files[_span(self.examples, example)].tolist()

    def digest(self, file: int) -> str:
        """Equal for files of the same content; one that cannot be read is like no other."""
        if file not in self.digests:
            digest = f"unreadable {file}"
            if self.sizes[file] >= 0:
                with contextlib.suppress(OSError, ValueError):
                    digest = hashlib.sha256(self.content(file)).hexdigest()[:32]
            self.digests[file] = digest
        return self.digests[file]

    def same_size(self, size: int) -> list[int]:
        if size < 0:
            return []
        return self.by_size[_span(self.sizes, size, self.by_size)].tolist()

    def showing(self, file: int) -> set[int]:
        """The examples that show what is in this file, under this name or another."""
        alike = self.same_size(int(self.sizes[file])) or [file]
        if len(alike) > 1:
            alike = [other for other in alike if self.digest(other) == self.digest(file)]
        return {example for other in alike for example in self._shown_by(other)}

    def _shown_by(self, file: int) -> list[int]:
        return self.examples[self.by_file[_span(self.files, file, self.by_file)]].tolist()

    def group(self, example: int) -> set[int]:
        """The example, those that share a picture with it, those that do with these, and so on."""
        found, files, new = {example}, set(), {example}
        while new:
            unseen = {file for one in new for file in self.of(one)} - files
            files |= unseen
            new = set().union(*(self.showing(file) for file in unseen)) - found
            found |= new
        return found


def _span(values: np.ndarray, value: int, order: np.ndarray | None = None) -> slice:
    """Where `value` stands in `values`, which ascend (in that order)."""
    return slice(*(np.searchsorted(values, value, side, order) for side in ("left", "right")))


def of_files(paths: Iterable[Iterable[Path]]) -> Pictures:
    """The pictures of examples that show these files. Files of one name are one file."""
    numbers: dict[Path, int] = {}
    shown = []
    for i, some in enumerate(paths):
        shown += [(i, numbers.setdefault(path, len(numbers))) for path in some]
    examples, files = np.array(shown, np.int64).reshape(-1, 2).T
    names = list(numbers)
    sizes = np.array([_size(path) for path in names], np.int64)
    return Pictures(examples.copy(), files.copy(), sizes, lambda file: names[file].read_bytes())


def _size(path: Path) -> int:
    try:
        # reading a pipe or a device may never end
        size = path.stat().st_size if path.is_file() else -1
    except (OSError, ValueError):  # a name that no file can have
        return -1
    return size if size <= LARGEST else -1
