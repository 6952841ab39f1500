"""Aspect-ratio buckets: the few sizes that images are resized to, so that a batch has one shape and little is cropped.

A dataset whose images have several sizes has a method `buckets()`: the sizes, (height, width) in pixels, in rising
order, and for each sample an index into them (see `bucketing`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emmdit.data.images import image_size
from emmdit.data.readers.open import select_columns, value
from emmdit.data.readers.protocol import Rows
from emmdit.files import atomic_path, cache_folder

Bucketing = tuple[list[tuple[int, int]], np.ndarray]  # sizes in rising order; (n,) index of each sample into them


@dataclass(frozen=True)
class Buckets:
    """Sizes of about resolution x resolution pixels, from wide to tall.

    Args:
        step: sides are multiples of it. The network and the autoencoder decide: 128 px for E-MMDiT on DC-AE.
        max_ratio: of the longer to the shorter side; longer images are cropped to the last bucket.
    """

    step: int = 64
    max_ratio: float = 2.0

    def __post_init__(self) -> None:
        if self.step < 1 or not self.max_ratio >= 1:
            raise ValueError(f"buckets need a step of at least 1 and a max_ratio of at least 1, got {self}.")

    def sizes(self, resolution: int) -> list[tuple[int, int]]:
        """(height, width) of each bucket, the widest first."""
        if resolution % self.step:
            raise ValueError(f"The resolution {resolution} is not a multiple of the buckets' step {self.step}.")
        found = set()
        for short in range(self.step, resolution + 1, self.step):
            long = round(resolution**2 / short / self.step) * self.step
            if long <= self.max_ratio * short:
                found |= {(short, long), (long, short)}
        return sorted(found)

    def assign(self, sizes: np.ndarray, resolution: int) -> np.ndarray:
        """Index into `self.sizes` of images (n, 2) height and width: the nearest in shape; the square for (0, 0)."""
        buckets = self.sizes(resolution)
        ratios = np.log([width / height for height, width in reversed(buckets)])  # tallest first: rising
        heights, widths = np.maximum(sizes, 1).astype(np.float64).T
        nearest = np.searchsorted((ratios[1:] + ratios[:-1]) / 2, np.log(widths / heights))
        return (len(buckets) - 1 - nearest).astype(np.int16)


def bucketing(dataset: Any) -> Bucketing:
    """`dataset.buckets()`; one bucket of unknown size for a dataset that has no such method."""
    return dataset.buckets() if hasattr(dataset, "buckets") else one_bucket((0, 0), len(dataset))


def one_bucket(size: tuple[int, int], count: int) -> Bucketing:
    """All of `count` samples in one bucket; the index takes no memory."""
    return [size], np.broadcast_to(np.int16(0), count)


def concatenated(parts: Sequence[Bucketing]) -> Bucketing:
    """The bucketing of several datasets in a row."""
    sizes = sorted({size for part, _ in parts for size in part})
    if len(sizes) == 1:
        return one_bucket(sizes[0], sum(len(index) for _, index in parts))
    places = [np.array([sizes.index(size) for size in part], np.int16)[index] for part, index in parts]
    return sizes, np.concatenate(places)


def cropped(sizes: np.ndarray, bucket: tuple[int, int]) -> np.ndarray:
    """Part of the area, (n,), that images (n, 2) of height and width lose in a bucket."""
    fractions = np.asarray(bucket) / np.maximum(sizes, 1)
    return 1 - fractions.min(1) / fractions.max(1)


def image_sizes(rows: Rows, image_column: str, size_columns: Sequence[str] | None = None) -> np.ndarray:
    """(n, 2) int32 height and width of upright images, (0, 0) where they are unknown.

    From `size_columns` (height, width) where they are given; else from the images' headers, which are read once
    and cached in `$EMMDIT_CACHE/sizes`. No image is decoded; but all files are read, so large sets should have columns.
    """
    found = np.zeros((len(rows), 2), np.int32)
    if size_columns is not None:
        rows = select_columns(rows, {"size": size_columns}, "the source", "size_columns")
        for first in range(0, len(rows), 10_000):
            part = rows.__getitems__(list(range(first, min(first + 10_000, len(rows)))))
            found[first : first + len(part)] = [_size([value(row, name) for name in size_columns]) for row in part]
        return found
    name = f"{rows.fingerprint} {len(rows)} {image_column}"
    folder = cache_folder("sizes")
    kept = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.npy"
    try:
        if (stored := np.load(kept, allow_pickle=False)).shape == found.shape:
            return stored
    except (OSError, ValueError, EOFError):
        pass  # there is none, or it is damaged
    for number in range(len(rows)):
        try:
            found[number] = _size(image_size(value(rows[number], image_column)))
        except Exception:  # it is named when its turn comes to be read
            continue
    try:
        with atomic_path(kept) as part:
            np.save(part, found)
    except OSError:
        pass  # a full or read-only home is no reason to stop
    return found


def _size(sides: Sequence[Any]) -> tuple[int, int]:
    """Height and width; (0, 0), which is unknown, where metadata say nothing that an image could have."""
    try:
        height, width = (int(float(side)) for side in sides)
    except (TypeError, ValueError, OverflowError):
        return 0, 0
    return (height, width) if min(height, width) > 0 and max(height, width) < 1 << 31 else (0, 0)
