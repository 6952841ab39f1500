"""Resumable data loader: its whole state is the number of samples handed out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from emmdit.data.batch import Batch
from emmdit.data.captions import choose
from emmdit.data.stream import Order, StreamSampler


class _Positioned(Dataset):
    """Looks up (index, position) pairs, writes both into the sample, and chooses among its captions, in the worker."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitems__(self, pairs: list[tuple[int, int]]) -> list[dict[str, Any]]:
        if hasattr(self.dataset, "__getitems__"):  # reads a batch at once
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
    """Endless, resumable stream of training batches over a map-style dataset of dicts.

    Iterating gives `len(self)` batches from the current position; the next iteration continues from there (see
    `emmdit.data.stream`). Samples are counted as batches are handed out: what workers have prefetched is not counted,
    and the batches do not depend on `num_workers`. Where a sample has `captions`, pairs of text and weight, one
    becomes its `caption`, by seed and position.

    With Lightning set `use_distributed_sampler: false`, and give `samples_seen` in `train_dataloader()`: Lightning
    restores a loader's state only when it resumes mid-epoch or trains by `max_steps`.

    Args:
        dataset: map-style, `dataset[i] -> dict`.
        order: of the samples; its seed also chooses among captions.
        global_batch: samples in one forward pass of all ranks together; a multiple of `world_size`.
        rank, world_size: this process among all processes.
        num_workers: as in torch's DataLoader; the workers live as long as it.
        samples_seen: position to begin at.
    """

    def __init__(
        self,
        dataset: Any,
        order: Order,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        samples_seen: int = 0,
    ) -> None:
        if global_batch % world_size:
            # the mean over ranks of their mean losses would weigh samples unequally
            raise ValueError(
                f"A global batch of {global_batch} does not divide into {world_size} equal parts: "
                f"choose a multiple of {world_size}."
            )
        self.samples_seen = samples_seen
        self.wait_seconds = 0.0  # spent in here waiting for batches, since it was made
        self.sampler = StreamSampler(order, global_batch, rank, world_size)
        self.dataloader = DataLoader(
            _Positioned(dataset, order.seed),
            batch_sampler=self.sampler,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
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
        """Continue from `state` with the next iteration; the number of ranks and the batch size may differ."""
        self.samples_seen = int(state["samples_seen"])
