"""Rows of a table as training samples: captions with images or precomputed latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from emmdit.data.images import first_line, load_image
from emmdit.data.sources import origin, value


class CaptionedRows(Dataset):
    """Rows first..last-1 of a table as samples; sample i is a function of its row alone.

    Args:
        rows: what `emmdit.data.sources.open_source` gives.
        source: its name in messages.
        columns: "caption", and "image" or "latents" or both, to names; `json.prompt` reads inside `json`.
        resolution: of images, in pixels.
        latents_shape: (C, h, w) of latents stored as float16 bytes.
        latents_scale: factor to the codec's scaled latents.
    """

    def __init__(
        self,
        rows: Any,
        source: str,
        columns: dict[str, str],
        resolution: int,
        latents_shape: tuple[int, int, int] | None = None,
        latents_scale: float = 1.0,
        first: int = 0,
        last: int | None = None,
    ) -> None:
        self.rows, self.source, self.columns, self.resolution = rows, source, columns, resolution
        self.latents_shape, self.latents_scale = latents_shape, latents_scale
        self.first, self.last = first, len(rows) if last is None else last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`caption`, `sample_id`, `image` (3, R, R) in [-1, 1] and/or `latents` (C, h, w), scaled.

        Raises:
            ValueError: the row can not be read; names its number, and its file where that is known.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is outside this data set of {len(self)} rows.")
        number = self.first + int(index)
        try:
            row = self.rows[number]
        except Exception as error:
            raise ValueError(f"{self._named(number)}: {first_line(error)}: mend or remove the row.") from error
        sample: dict[str, Any] = {"sample_id": torch.tensor(index, dtype=torch.int64)}
        for kind, column in self.columns.items():
            try:
                sample[kind] = getattr(self, f"_{kind}")(value(row, column))
            except Exception as error:
                raise ValueError(
                    f"{self._named(number)}: the {kind} in column '{column}' can not be read "
                    f"({first_line(error)}): mend or remove the row."
                ) from error
        return sample

    def _named(self, number: int) -> str:
        place = origin(self.rows, number)
        return f"Row {number} of '{self.source}'" + f" ({place})" * bool(place)

    def _caption(self, found: Any) -> str:
        if not isinstance(found, str):
            raise ValueError(f"a text was expected, not {found!r:.40}")
        return found

    def _image(self, found: Any) -> torch.Tensor:
        return load_image(found, self.resolution)

    def _latents(self, found: Any) -> torch.Tensor:
        if isinstance(found, bytes):
            if self.latents_shape is None:
                raise ValueError("latents_shape must say how its bytes are to be read")
            found = np.frombuffer(found, np.float16).reshape(self.latents_shape)
        array = np.asarray(found, dtype=np.float32)
        if array.ndim != 3:
            raise ValueError(f"an array (C, h, w) was expected, not one of shape {array.shape}")
        return torch.from_numpy(array) * self.latents_scale
