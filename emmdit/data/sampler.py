"""The order in which samples are drawn: a pure function of (seed, position), so that any run can be resumed.

The training data are one endless stream. *Position* p is the number of samples drawn before it by all ranks
together; data epoch e covers the positions [e * length, (e + 1) * length) and holds every sample exactly
once, in an order drawn from (seed, e) (more on mixtures and buckets in `emmdit.data.order`). A global batch is the
next `global_batch` positions, and may span two epochs, so that nothing is dropped whatever the batch size. Within it
rank r takes the positions start + r, start + r + world_size, ...

The position is therefore all that has to be stored, and it means the same on every rank and for any number of
ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from emmdit.data.order import Order
from emmdit.data.order import epoch_order as epoch_order


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
        order: with mixing, buckets or a block shuffle; `length`, `seed` and `shuffle` are then not read.

    Raises:
        ValueError: one sentence; a batch that would hold images of two sizes, too, when it is made.
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
        order: Order | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not exist among {world_size} processes: ranks count from 0.")
        if global_batch < world_size:
            raise ValueError(f"A global batch of {global_batch} is too small for {world_size} processes: raise it.")
        self.order = order or Order(length, seed, shuffle)
        self.global_batch, self.rank, self.world_size, self.start = global_batch, rank, world_size, start
        self.run = self.order.run if len(self.order.groups) > 1 else None
        if self.run is not None and self.run % global_batch:
            raise ValueError(
                f"bucket_batch {self.run} is no multiple of the global batch {global_batch} (batch_size x processes): "
                "batches would hold images of two sizes."
            )

    def __len__(self) -> int:
        """Batches until every sample was drawn once, counted from the start of an epoch."""
        return -(-self.order.length // self.global_batch)

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Sample index at each position, (n,) int64."""
        return self.order.indices(positions)

    def batch(self, start: int) -> list[tuple[int, int]]:
        """This rank's (sample index, position) pairs of the global batch beginning at `start`."""
        if self.run is not None and start % self.global_batch:
            fitting = math.gcd(start, self.run)
            raise ValueError(
                f"The training stopped at sample {start}, no multiple of the global batch {self.global_batch}, so that "
                f"batches would hold images of two sizes: let batch_size x processes be a divisor of {fitting}."
            )
        positions = rank_positions(start, self.global_batch, self.rank, self.world_size)
        return list(zip(self.indices(positions).tolist(), positions.tolist(), strict=True))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        start = self.start
        for n in range(len(self)):
            yield self.batch(start + n * self.global_batch)
