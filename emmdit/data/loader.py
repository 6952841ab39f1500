"""A loader that goes on exactly where it stopped: its whole state is the number of samples handed out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from emmdit.data.captions import choose
from emmdit.data.order import Order
from emmdit.data.sampler import ResumableSampler


class _Positioned(Dataset):
    """Looks up (index, position) pairs, writes both into the sample, and chooses among its captions, in the worker."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitems__(self, pairs: list[tuple[int, int]]) -> list[dict[str, Any]]:
        if hasattr(self.dataset, "__getitems__"):  # reads a batch at once, e.g. Hugging Face `datasets`
            samples = self.dataset.__getitems__([index for index, _ in pairs])
        else:
            samples = [self.dataset[index] for index, _ in pairs]
        return [self._placed(sample, *pair) for sample, pair in zip(samples, pairs, strict=True)]

    def _placed(self, sample: dict[str, Any], index: int, position: int) -> dict[str, Any]:
        sample = {**sample, "sample_id": index, "position": position}
        if "captions" in sample:
            sample["caption"] = choose(sample.pop("captions"), self.seed, position)
        return sample


class ResumableLoader:
    """Endless, resumable stream of training batches over a map-style data set of dicts.

    Iterating gives `len(self)` batches from the current position; the next iteration goes on from there, so
    passes follow each other without repeating or dropping a sample (see `emmdit.data.sampler`). Samples are
    counted here, in the main process, as batches are handed out: what workers have fetched ahead is not
    counted. The batches do not depend on `num_workers`, as long as `dataset[i]` is a function of i alone.

    Each batch is collated by torch's `default_collate` (captions become a list of str) and gains `sample_id`
    (B,) int64, the index in the data set, and `position` (B,) int64, the global position in the stream. Where a
    sample has `captions`, pairs of text and weight, one becomes its `caption`, by seed and position.

    Use it for training only: validation wants the same samples every time. With Lightning set
    `use_distributed_sampler: false`, and give `samples_seen` in `train_dataloader()`: Lightning itself
    restores a loader's state only when it resumes in mid epoch or trains by `max_steps`. Its
    `overfit_batches` has no effect on the samples drawn; use a smaller data set.

    Args:
        dataset: map-style, `dataset[i] -> dict`.
        global_batch: samples in one forward pass of all ranks together; a multiple of `world_size`.
        rank, world_size, seed, shuffle: see `ResumableSampler`.
        num_workers, persistent_workers, prefetch_factor: as in torch's DataLoader.
        pin_memory: copy batches to page-locked memory; only where there is an accelerator.
        collate_fn: in place of `default_collate`.
        samples_seen: position to begin at.
        order: of the samples, with mixing, buckets or a block shuffle; a plain one by default.
    """

    def __init__(
        self,
        dataset: Any,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 0,
        persistent_workers: bool = True,
        prefetch_factor: int = 2,
        pin_memory: bool = True,
        collate_fn: Callable[[list[dict[str, Any]]], Any] = default_collate,
        samples_seen: int = 0,
        order: Order | None = None,
    ) -> None:
        if global_batch % world_size:
            # the mean over ranks of their mean losses would weigh samples unequally
            raise ValueError(
                f"A global batch of {global_batch} does not divide into {world_size} equal parts: "
                f"choose a multiple of {world_size}."
            )
        self.samples_seen = samples_seen
        self.wait_seconds = 0.0  # spent in here waiting for batches, since it was made
        self.sampler = ResumableSampler(len(dataset), global_batch, rank, world_size, seed, shuffle, order=order)
        workers = {"persistent_workers": persistent_workers, "prefetch_factor": prefetch_factor} if num_workers else {}
        self.dataloader = DataLoader(
            _Positioned(dataset, seed),
            batch_sampler=self.sampler,
            num_workers=num_workers,
            pin_memory=pin_memory and torch.cuda.is_available(),
            collate_fn=collate_fn,
            **workers,
        )

    @property
    def dataset(self) -> Any:
        """The data set as it was given."""
        return self.dataloader.dataset.dataset

    @property
    def batch_size(self) -> int:
        """Samples in one batch of this rank."""
        return self.sampler.global_batch // self.sampler.world_size

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        self.sampler.start = self.samples_seen
        batches = iter(self.dataloader)
        for _ in range(len(self)):
            began = time.perf_counter()
            batch = next(batches)
            self.wait_seconds += time.perf_counter() - began
            # counted before it is handed out: a checkpoint written while this batch is in use includes it
            self.samples_seen += self.sampler.global_batch
            yield batch

    def state_dict(self) -> dict[str, int]:
        """`{"samples_seen": n}`: samples handed out to all ranks together, the same on every rank."""
        return {"samples_seen": self.samples_seen}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from `state` with the next iteration; the number of ranks and the batch size may differ."""
        self.samples_seen = int(state["samples_seen"])
