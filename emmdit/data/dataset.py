"""Captioned dataset: rows of a table as training samples, with images or precomputed latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from emmdit.data.buckets import Bucketing, Buckets, one_bucket
from emmdit.data.captions import candidates, texts
from emmdit.data.images import load_image
from emmdit.data.readers.open import value
from emmdit.data.readers.protocol import Rows
from emmdit.files import first_line


class CaptionedDataset(Dataset):
    """Rows first..last-1 of a table as samples; sample i is a function of its row alone.

    Args:
        rows: as `emmdit.data.readers.open.open_source` gives them.
        source: its name in messages.
        columns: "caption", and "image" or "latents" or both, to names; `json.prompt` reads inside `json`.
        resolution: of images, in pixels.
        latents_shape: (C, h, w) of latents stored as float16 bytes.
        latents_scale: factor to the autoencoder's scaled latents.
        captions: columns and weights of several captions, for the loader to choose from; each holds a text or a list
            of texts that share its weight. None: the first text of `columns["caption"]` alone.
        sizes: (len(rows), 2) height and width of all images, for the buckets.
        buckets: sizes that images are brought to in place of the square.
    """

    def __init__(
        self,
        rows: Rows,
        source: str,
        columns: dict[str, str],
        resolution: int,
        latents_shape: tuple[int, int, int] | None = None,
        latents_scale: float = 1.0,
        first: int = 0,
        last: int | None = None,
        captions: dict[str, float] | None = None,
        sizes: np.ndarray | None = None,
        buckets: Buckets | None = None,
    ) -> None:
        self.rows, self.source, self.columns = rows, source, columns
        self.latents_shape, self.latents_scale = latents_shape, latents_scale
        self.first, self.last = first, len(rows) if last is None else last
        self.captions = None if captions is None else {name: weight for name, weight in captions.items() if weight > 0}
        self.sizes = None if buckets is None else sizes[self.first : self.last]
        self.bucketing = one_bucket((resolution, resolution), len(self))
        if buckets is not None:
            self.bucketing = buckets.sizes(resolution), buckets.assign(self.sizes, resolution)

    def __len__(self) -> int:
        return self.last - self.first

    def buckets(self) -> Bucketing:
        """Sizes and each sample's index into them, see `emmdit.data.buckets`."""
        return self.bucketing

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`caption`, `sample_id`, `image` (3, R, R) in [-1, 1] and/or `latents` (C, h, w), scaled; `captions`, (text,
        weight) pairs, where there are several.

        Raises:
            ValueError: the row cannot be read; names its number, and its file where that is known.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """A batch at once, which is faster for Arrow tables."""
        if outside := [index for index in indices if not 0 <= index < len(self)]:
            raise IndexError(f"sample {outside[0]} is outside this dataset of {len(self)} rows.")
        numbers = [self.first + int(index) for index in indices]
        try:
            rows = self.rows.__getitems__(numbers)
        except Exception:
            rows = [self._row(number) for number in numbers]  # one by one, to find the bad one and name it
        return [self._sample(index, row) for index, row in zip(indices, rows, strict=True)]

    def _row(self, number: int) -> dict[str, Any]:
        try:
            return self.rows[number]
        except Exception as error:
            raise ValueError(f"{self._named(number)}: {first_line(error)}: fix or remove the row.") from error

    def _sample(self, index: int, row: dict[str, Any]) -> dict[str, Any]:
        sample: dict[str, Any] = {"sample_id": torch.tensor(index, dtype=torch.int64)}
        for kind, column in self.columns.items():
            try:
                found = value(row, column)
                if kind == "image":
                    sizes, places = self.bucketing
                    sample[kind] = load_image(found, sizes[places[index]])
                elif kind == "latents":
                    sample[kind] = self._latents(found)
                else:
                    sample |= self._caption(found, row)
            except Exception as error:
                raise ValueError(
                    f"{self._named(self.first + index)}: the {kind} in column '{column}' cannot be read "
                    f"({first_line(error)}): fix or remove the row."
                ) from error
        return sample

    def _named(self, number: int) -> str:
        place = self.rows.origin(number)
        return f"Row {number} of '{self.source}'" + f" ({place})" * bool(place)

    def _caption(self, found: Any, row: dict[str, Any]) -> dict[str, Any]:
        if self.captions is None:
            return {"caption": _texts(found)[0]}
        pairs = []
        for column, weight in self.captions.items():
            given = candidates(_texts(value(row, column), missing=len(self.captions) > 1))
            pairs += [(text, weight / len(given)) for text, _ in given]
        if len(pairs) > 1:
            return {"caption": pairs[0][0], "captions": pairs}
        return {"caption": pairs[0][0] if pairs else _texts(found)[0]}

    def _latents(self, found: Any) -> torch.Tensor:
        if isinstance(found, bytes):
            if self.latents_shape is None:
                raise ValueError("latents_shape must say how its bytes are read")
            found = np.frombuffer(found, np.float16).reshape(self.latents_shape)
        array = np.array(found, dtype=np.float32)  # its own memory: bytes are read-only
        if array.ndim != 3:
            raise ValueError(f"an array (C, h, w) was expected, not one of shape {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError("not all its values are finite")
        if self.latents_scale != 1:
            array = array * np.float32(self.latents_scale)
        return torch.from_numpy(array)


def _texts(found: Any, missing: bool = False) -> list[str]:
    """A text or a list of texts as a list; with `missing` there may be none."""
    found = [text for text in texts(found) if text is not None or not missing]
    if None in found or not (found or missing):
        raise ValueError(f"a text was expected, not {None if None in found else found}")
    return found
