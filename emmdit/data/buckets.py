"""Aspect-ratio buckets: the few sizes that images are brought to, so that a batch has one shape and little is cropped.

A size is passed on as one number, `height << 16 | width`, in pixels: see `code` and `size`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emmdit.data.images import image_size
from emmdit.data.readers.open import fingerprint, value


@dataclass(frozen=True)
class Buckets:
    """Sizes of about resolution x resolution pixels, from tall to wide.

    Args:
        step: sides are multiples of it. The network and the codec decide: 128 px for E-MMDiT on DC-AE.
        max_ratio: of the longer to the shorter side; what is longer is cropped to the last bucket.
    """

    step: int = 64
    max_ratio: float = 2.0

    def __post_init__(self) -> None:
        if self.step < 1 or self.max_ratio < 1:
            raise ValueError(f"buckets need a step of at least 1 and a max_ratio of at least 1, got {self}.")

    def sizes(self, resolution: int) -> list[tuple[int, int]]:
        """(height, width) of each bucket, the tallest first."""
        if resolution % self.step:
            raise ValueError(f"The resolution {resolution} is no multiple of the buckets' step {self.step}.")
        found = set()
        for short in range(self.step, resolution + 1, self.step):
            long = round(resolution**2 / short / self.step) * self.step
            if long <= self.max_ratio * short:
                found |= {(short, long), (long, short)}
        return sorted(found, key=lambda size: size[1] / size[0])

    def assign(self, sizes: np.ndarray, resolution: int) -> np.ndarray:
        """The bucket, as a code, of images (n, 2) height and width: the nearest in shape; the square for (0, 0)."""
        buckets = self.sizes(resolution)
        ratios = np.log([width / height for height, width in buckets])
        heights, widths = np.maximum(sizes, 1).astype(np.float64).T
        nearest = np.searchsorted((ratios[1:] + ratios[:-1]) / 2, np.log(widths / heights))
        return np.array([code(*bucket) for bucket in buckets], np.int32)[nearest]


def code(height: int, width: int) -> int:
    return height << 16 | width


def size(code: int) -> tuple[int, int]:
    """(height, width) in pixels."""
    return code >> 16, code & 0xFFFF


def cropped(sizes: np.ndarray, bucket: tuple[int, int]) -> np.ndarray:
    """Part of the area, (n,), that images (n, 2) of height and width lose in a bucket."""
    fractions = np.asarray(bucket) / np.maximum(sizes, 1)
    return 1 - fractions.min(1) / fractions.max(1)


def codes_of(dataset: Any) -> np.ndarray | int:
    """Bucket of each sample of a data set, or the one that all are of; data sets tell by `buckets()`."""
    codes = dataset.buckets() if hasattr(dataset, "buckets") else 0
    return codes if isinstance(codes, int) or (codes != codes[0]).any() else int(codes[0])


def image_sizes(rows: Any, image_column: str, size_columns: Sequence[str] | None = None) -> np.ndarray:
    """(n, 2) int32 height and width of upright images, (0, 0) where they can not be told.

    From `size_columns` (height, width) where they are given; else from the images' headers, which are read once
    and kept in `$EMMDIT_CACHE/sizes`. No image is decoded; but all files are read, so that large sets want columns.
    """
    if size_columns is not None:
        columns = [np.asarray(_column(rows, name), dtype=np.float64) for name in size_columns]  # None becomes NaN
        return np.stack([np.nan_to_num(column).astype(np.int32) for column in columns], axis=1)
    name = f"{fingerprint(rows)} {len(rows)} {image_column}"
    folder = Path(os.environ.get("EMMDIT_CACHE", "~/.cache/emmdit"), "sizes").expanduser()
    kept = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.npy"
    if kept.is_file():
        return np.load(kept, allow_pickle=False)
    found = np.zeros((len(rows), 2), np.int32)
    for number in range(len(rows)):
        try:
            found[number] = image_size(value(rows[number], image_column))
        except Exception:  # it is named when its turn comes to be read
            continue
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{kept.name}.{os.getpid()}.npy"
        np.save(part, found)
        os.replace(part, kept)
    except OSError:
        pass  # a full or read-only home is no reason to stop
    return found


def _column(rows: Any, column: str) -> Any:
    """All values of one column; of a table in memory maps without reading the others."""
    name = column if column in rows.column_names else column.partition(".")[0]
    if name not in rows.column_names:
        raise ValueError(f"There is no size column '{column}': choose among {', '.join(rows.column_names)}.")
    narrow = rows.select_columns([name])
    if name == column and hasattr(narrow, "with_format"):
        return narrow.with_format("numpy")[:][name]
    return [value(narrow[number], column) for number in range(len(narrow))]
