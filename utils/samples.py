"""What is known of a dataset's images, in a few flat arrays however many images there are.

Forked workers share an array's pages; of a million Python objects each would copy most, since to look at one counts a
reference, which writes into its page.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sample:
    """One usable image."""

    path: str  # absolute
    labels: Floats  # (n, 5) [class, cx, cy, w, h] in 0..1
    segments: tuple[Floats, ...]  # empty, or a polygon (k, 2) in 0..1 per label; a box row's is its four corners
    shape_hw: tuple[int, int]  # pixels, upright by EXIF


class Ragged:
    """Arrays `(n_i, ...)` laid end to end in `flat`, by the number of rows of each; read like a sequence of them."""

    def __init__(self, flat: npt.NDArray[Any], counts: npt.ArrayLike) -> None:
        self.flat = flat
        self.starts: Integers = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        return self.flat[self.starts[index] : self.starts[index + 1]]

    def take(self, indices: Integers) -> Ragged:
        """The arrays of these indices, in their order."""
        counts = np.diff(self.starts)[indices]
        moved = np.repeat(self.starts[indices] - (np.cumsum(counts) - counts), counts)
        return Ragged(self.flat[moved + np.arange(len(moved))], counts)


class Paths:
    """File names one behind the other as bytes: an array of strings would make each as long as the longest."""

    def __init__(self, paths: Iterable[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._names = Ragged(np.frombuffer(b"".join(encoded), np.uint8), [len(path) for path in encoded])

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._names[index].tobytes())

    def take(self, indices: Integers) -> Paths:
        """The names of these indices, in their order."""
        chosen = Paths(())
        chosen._names = self._names.take(indices)
        return chosen


@dataclass(frozen=True, eq=False)
class Samples(Sequence[Sample]):
    """All usable images. A Sample is made when it is asked for, and its arrays are views of these."""

    paths: Paths
    labels: Ragged  # per image (n, 5)
    segments: Ragged  # per polygon (k, 2), in order of the images
    first_segment: Integers  # (images + 1,): image i's are those from first_segment[i] to first_segment[i + 1] - 1
    shapes_hw: Integers  # (images, 2)

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        number = range(len(self))[index]
        height, width = self.shapes_hw[number].tolist()
        return Sample(self.paths[number], self.labels[number], self.polygons(number), (height, width))

    def polygons(self, index: int) -> tuple[Floats, ...]:
        """The outlines `(k, 2)` of one image: none, or one per label."""
        return tuple(self.segments[i] for i in range(self.first_segment[index], self.first_segment[index + 1]))

    def take(self, indices: Integers) -> Samples:
        """The images of these indices, in their order."""
        counts = np.diff(self.first_segment)[indices]
        which = np.repeat(self.first_segment[indices] - (np.cumsum(counts) - counts), counts)
        segments = self.segments.take(which + np.arange(len(which)))
        first = np.concatenate(([0], np.cumsum(counts)))
        return Samples(self.paths.take(indices), self.labels.take(indices), segments, first, self.shapes_hw[indices])
