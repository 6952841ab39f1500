"""The order in which samples are drawn: a pure function of (seed, position), so that any run can be resumed.

The training data are one endless stream. *Position* p is the number of samples drawn before it by all ranks
together; data epoch e covers the positions [e * length, (e + 1) * length) and holds every sample exactly
once, in an order drawn from (seed, e). A global batch is the next `global_batch` positions, and may span two
epochs, so that nothing is dropped whatever the batch size. Within it rank r takes the positions start + r,
start + r + world_size, ...

The position is therefore all that has to be stored, and it means the same on every rank and for any number of
ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


def epoch_order(length: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The sample indices of one epoch in their order, (length,) int32 (int64 above 2**31 samples).

    numpy's legacy `RandomState` is used on purpose: its streams are frozen for good (NEP 19), so an order
    survives an upgrade of numpy or torch in the middle of a long run. 25M samples take 100 MB.
    """
    order = np.arange(length, dtype=np.int32 if length <= np.iinfo(np.int32).max else np.int64)
    if shuffle:
        np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, epoch)))).shuffle(order)
    return order


def rank_positions(start: int, global_batch: int, rank: int, world_size: int) -> np.ndarray:
    """Positions that `rank` takes from the global batch beginning at `start`, (batch,) int64."""
    return np.arange(start + rank, start + global_batch, world_size, dtype=np.int64)


class ResumableSampler(Sampler[list[tuple[int, int]]]):
    """A batch sampler over the stream above: yields one rank's batch as a list of (sample index, position).

    One iteration gives `len(self)` batches from `start`, which the caller moves (see `ResumableLoader`); it
    does not move by itself, because a worker process runs ahead of what training has really used. The batches
    of a resumed iteration are those an unbroken one would have given, with any `global_batch` and
    `world_size`.

    Args:
        length: number of samples in the data set.
        global_batch: samples in one forward pass of all ranks together.
        rank, world_size: this process among all processes.
        seed: of the order.
        shuffle: False keeps the order of the data set in every epoch.
        start: position of the first sample.
    """

    def __init__(
        self,
        length: int,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        start: int = 0,
    ) -> None:
        if length < 1:
            raise ValueError("The data set is empty: check its path and filters.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not exist among {world_size} processes: ranks count from 0.")
        if global_batch < world_size:
            raise ValueError(f"A global batch of {global_batch} is too small for {world_size} processes: raise it.")
        self.length, self.global_batch = length, global_batch
        self.rank, self.world_size = rank, world_size
        self.seed, self.shuffle, self.start = seed, shuffle, start
        self._orders: dict[int, np.ndarray] = {}  # of the epochs in the latest batch, one or two as a rule

    def __len__(self) -> int:
        """Batches until every sample was drawn once, counted from the start of an epoch."""
        return -(-self.length // self.global_batch)

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Sample index at each position, (n,) int64."""
        epochs, offsets = np.divmod(positions, self.length)
        needed = np.unique(epochs)
        for epoch in [e for e in self._orders if e not in needed]:
            del self._orders[epoch]
        out = np.empty(len(positions), dtype=np.int64)
        for epoch in needed.tolist():
            if epoch not in self._orders:
                self._orders[epoch] = epoch_order(self.length, self.seed, epoch, self.shuffle)
            here = epochs == epoch
            out[here] = self._orders[epoch][offsets[here]]
        return out

    def batch(self, start: int) -> list[tuple[int, int]]:
        """This rank's (sample index, position) pairs of the global batch beginning at `start`."""
        positions = rank_positions(start, self.global_batch, self.rank, self.world_size)
        return list(zip(self.indices(positions).tolist(), positions.tolist(), strict=True))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        start = self.start
        for n in range(len(self)):
            yield self.batch(start + n * self.global_batch)
