"""Mixture of datasets: several in a row as one."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from emmdit.data.buckets import Bucketing, bucketing, concatenated


class Mixture(Dataset):
    """The samples of the first source, then of the second, ...; `emmdit.data.stream.Order` mixes them.

    Args:
        sources: name -> map-style dataset.
        weights: name -> share of the draws, in any unit; None: each sample once an epoch.
    """

    def __init__(self, sources: dict[str, Any], weights: dict[str, float] | None = None) -> None:
        self.sources = sources
        self.counts = [len(source) for source in sources.values()]
        self.weights = None if weights is None else [weights[name] for name in sources]
        self._starts = np.cumsum([0, *self.counts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Each source reads its part of a batch at once. `sample_id` is the index here."""
        numbers = np.asarray(indices)
        if numbers.min() < 0 or numbers.max() >= len(self):
            raise IndexError(f"sample {numbers.max()} is outside this dataset of {len(self)} samples.")
        places = np.searchsorted(self._starts, numbers, side="right") - 1
        out: list[Any] = [None] * len(numbers)
        for place, source in enumerate(self.sources.values()):
            here = np.flatnonzero(places == place).tolist()
            local = (numbers[here] - self._starts[place]).tolist()
            if here and hasattr(source, "__getitems__"):
                samples = source.__getitems__(local)
            else:
                samples = [source[index] for index in local]
            for slot, sample in zip(here, samples, strict=True):
                out[slot] = {**sample, "sample_id": indices[slot]}
        return out

    def buckets(self) -> Bucketing:
        """Sizes and each sample's index into them, see `emmdit.data.buckets`."""
        return concatenated([bucketing(source) for source in self.sources.values()])

    @property
    def sizes(self) -> np.ndarray | None:
        """(n, 2) height and width of the images before resize and crop; None where a source does not know them."""
        sizes = [getattr(source, "sizes", None) for source in self.sources.values()]
        return None if any(found is None for found in sizes) else np.concatenate(sizes)
