"""Mixture of several sources in one training, by weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from datamodules.base import TextImageDataModule
from emmdit.data.mixture import Mixture


class MixtureDataModule(TextImageDataModule):
    """Named sources, each a data module of its own; batches are drawn from all of them.

    Each source holds out its own first `validation_samples`, so that they stay the same when sources come and go; the
    validation loss is computed on equally many of each. What a source says of batch_size, num_workers, seed,
    validation_samples, shuffle_block and bucket_batch is not read: these are the mixture's.

    Args:
        sources: name -> data module. All give the same kind of sample.
        weights: name -> share of the samples drawn, in any unit; by default each sample of each source once an epoch.
        stream: `batch_size`, `seed`, `validation_samples`, ... of `TextImageDataModule`.
    """

    def __init__(
        self, sources: dict[str, TextImageDataModule], weights: dict[str, float] | None = None, **stream: Any
    ) -> None:
        super().__init__(**stream)
        if not sources:
            raise ValueError("A mixture needs at least one source.")
        if weights is not None and set(weights) != set(sources):
            raise ValueError(f"weights are given for {', '.join(weights)}, but the sources are {', '.join(sources)}.")
        if weights is not None and not all(0 < weight < float("inf") for weight in weights.values()):
            raise ValueError(f"weights must be positive numbers, not {weights}: remove a source that is not wanted.")
        self.sources, self.weights = sources, weights
        for source in sources.values():
            source.validation_samples, source.bucket_batch = self.validation_samples, self.bucket_batch

    def prepare_data(self) -> None:
        for source in self.sources.values():
            source.prepare_data()

    def setup(self, stage: str) -> None:
        """Each source's own checks, and that their samples go together. ValueError with one sentence."""
        for name, source in self.sources.items():
            source.trainer = self.trainer
            try:
                source.setup(stage)
            except (ValueError, OSError) as error:
                raise type(error)(f"Source '{name}': {error}") from error
        samples = {name: source.validation_dataset()[0] for name, source in self.sources.items()}
        kinds = {name: sorted(sample.keys() - {"captions"}) for name, sample in samples.items()}
        (first, expected), *others = kinds.items()
        for name, found in others:
            if found != expected:
                raise ValueError(
                    f"The source '{first}' gives {', '.join(expected)}, '{name}' {', '.join(found)}: a batch needs the "
                    "same of all (images: false and text: false leave them out)."
                )
        self.check_order(self.train_dataset())

    def train_dataset(self) -> Mixture:
        return Mixture({name: source.train_dataset() for name, source in self.sources.items()}, self.weights)

    def validation_dataset(self) -> Mixture:
        return Mixture({name: source.validation_dataset() for name, source in self.sources.items()})

    def validation_indices(self, dataset: Mixture) -> np.ndarray:
        count = -(-self.validation_samples // len(self.sources))
        starts = np.cumsum([0, *dataset.counts[:-1]])
        parts = [np.arange(s, s + min(count, n)) for s, n in zip(starts, dataset.counts, strict=True)]
        return np.concatenate(parts)

    def parts(self) -> dict[str, TextImageDataModule]:
        return self.sources
