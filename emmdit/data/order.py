"""Which sample stands at which position of the endless training stream, with mixing, buckets and shuffling.

Three questions, each answered from (seed, position) alone:

- **Which run?** Samples of one bucket (images of one size) come in runs of `run` samples, so that a batch has one shape
  on all ranks. Bucket b with n_b samples gives floor((e + 1) n_b / run) - floor(e n_b / run) runs to data epoch e,
  and the runs of an epoch are shuffled. What does not fill a run is not dropped: it opens the bucket's next run.
- **Which draw?** Each bucket is an endless stream of its own, epoch after epoch in a fresh order.
- **Which sample?** Where sources are mixed by weights, a bucket's epoch holds as many draws of each source as its
  weight asks for; a source hands out its samples evenly, each as often as any other, or once more.

With one bucket and no weights this is a permutation of the data set for each epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

WINDOW = 16  # blocks whose samples are mixed with each other in a block shuffle


def _random(*key: int) -> np.random.RandomState:
    """numpy's legacy `RandomState` on purpose: its streams are frozen for good (NEP 19), so an order survives an
    upgrade of numpy or torch in the middle of a long run."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))


def epoch_order(
    length: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    block: int | None = None,
    window: int = WINDOW,
    key: tuple[int, ...] = (),
) -> np.ndarray:
    """The indices of one epoch in their order, (length,) int32 (int64 above 2**31). 25M samples take 100 MB.

    Args:
        block: None: a permutation of all. Else blocks of so many consecutive indices are permuted, and then the indices
            of `window` blocks that follow each other are mixed: reads stay local, for disks on which that counts.
        key: keeps streams apart that share seed and epoch; its last number is not 0.
    """
    order = np.arange(length, dtype=np.int32 if length <= np.iinfo(np.int32).max else np.int64)
    if not shuffle:
        return order
    random = _random(seed, epoch, *key)
    if block is None or block >= length:
        random.shuffle(order)
        return order
    starts = np.arange(0, length, block)
    random.shuffle(starts)
    out, filled = np.empty_like(order), 0
    for first in range(0, len(starts), window):
        mixed = np.concatenate([order[start : start + block] for start in starts[first : first + window]])
        random.shuffle(mixed)
        out[filled : filled + len(mixed)] = mixed
        filled += len(mixed)
    return out


@dataclass(frozen=True)
class Group:
    """The samples of one bucket, source behind source; `draws[k]` of an epoch's draws fall on source k."""

    bucket: int
    counts: list[int]
    draws: list[int]
    members: np.ndarray | None  # indices in the data set; None: all of it

    @property
    def length(self) -> int:
        """Draws in an epoch."""
        return sum(self.draws)


def _groups(counts: list[int], quotas: Sequence[float], buckets: np.ndarray | None) -> list[Group]:
    if buckets is None or (buckets == buckets[0]).all():
        return [Group(0, counts, [max(1, round(quota)) for quota in quotas], None)]
    bounds = np.cumsum([0, *counts])
    groups = []
    for bucket in np.unique(buckets).tolist():
        members = np.flatnonzero(buckets == bucket)
        members = members.astype(np.int32 if len(buckets) <= np.iinfo(np.int32).max else np.int64)
        parts = np.diff(np.searchsorted(members, bounds)).tolist()
        draws = [
            max(1, round(quota * part / count)) if part else 0
            for quota, part, count in zip(quotas, parts, counts, strict=True)
        ]
        groups.append(Group(bucket, parts, draws, members))
    return groups


class Order:
    """Positions to sample indices.

    Args:
        length: number of samples.
        seed: of all choices.
        shuffle: False: the order of the data set, in every epoch.
        block: see `epoch_order`.
        counts: samples of each source, where the data set is several behind each other.
        weights: share of the draws that each source gets, in any unit; None: each sample once an epoch.
        buckets: (length,) the bucket's number of each sample; None: all of one shape.
        run: samples of a bucket that follow each other; the global batch divides it.

    Attributes:
        length: draws in an epoch.
    """

    def __init__(
        self,
        length: int,
        seed: int = 0,
        shuffle: bool = True,
        block: int | None = None,
        counts: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        buckets: np.ndarray | None = None,
        run: int | None = None,
    ) -> None:
        if length < 1:
            raise ValueError("The data set is empty: check its path and filters.")
        if block is not None and block < 1:
            raise ValueError(f"shuffle_block must be at least 1 sample, got {block}.")
        counts = [length] if counts is None else [int(count) for count in counts]
        if sum(counts) != length or min(counts) < 1:
            raise ValueError(f"The sources have {counts} samples, the data set {length}: every source needs some.")
        if weights is not None and (len(weights) != len(counts) or not all(0 < w < float("inf") for w in weights)):
            raise ValueError(f"weights {list(weights)} must be {len(counts)} positive numbers, one for each source.")
        self.samples, self.seed, self.shuffle, self.block, self.run = length, seed, shuffle, block, run
        self.counts = counts
        quotas = counts if weights is None else [length * weight / sum(weights) for weight in weights]
        self.groups = _groups(counts, quotas, buckets)
        self.length = sum(group.length for group in self.groups)
        if len(self.groups) > 1 and (run is None or run < 1):
            raise ValueError(
                f"The samples have {len(self.groups)} different sizes: set bucket_batch to the global batch "
                "(batch_size x processes), so that a batch has one size and the order the same on any number of them."
            )
        self._cache: dict[tuple[int, ...], dict[int, np.ndarray]] = {}

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Sample index at each position, (n,) int64."""
        positions = np.asarray(positions, dtype=np.int64)
        if len(self.groups) == 1:
            return self._draw(0, positions)
        out = np.empty(len(positions), dtype=np.int64)
        runs, offsets = np.divmod(positions, self.run)
        for run in np.unique(runs).tolist():
            here = runs == run
            group, number = self._find(run)
            out[here] = self._draw(group, number * self.run + offsets[here])
        return out

    # -- buckets -------------------------------------------------------------------------------------

    def runs_before(self, epoch: int) -> list[int]:
        """Runs that each bucket has given before `epoch`."""
        return [epoch * group.length // self.run for group in self.groups]

    def _find(self, run: int) -> tuple[int, int]:
        """Bucket of a run of the stream, and the run's number within the bucket."""
        epoch = run * self.run // self.length
        while sum(self.runs_before(epoch + 1)) <= run:
            epoch += 1
        begin = self.runs_before(epoch)
        schedule = self._kept((3,), [epoch], lambda epoch: self._schedule(epoch, begin))[epoch]
        group, number = schedule[run - sum(begin)].tolist()
        return group, number

    def _schedule(self, epoch: int, begin: list[int]) -> np.ndarray:
        """The runs of an epoch in their order, (runs, 2): bucket, number within it."""
        counts = np.subtract(self.runs_before(epoch + 1), begin)
        groups = np.repeat(np.arange(len(counts)), counts)
        if self.shuffle:
            _random(self.seed, epoch, 3).shuffle(groups)
        numbers = np.empty_like(groups)
        for group, first in enumerate(begin):  # a bucket's own stream is read in its order
            numbers[groups == group] = first + np.arange(counts[group])
        return np.stack([groups, numbers], axis=1)

    # -- within a bucket -----------------------------------------------------------------------------

    def _draw(self, number: int, positions: np.ndarray) -> np.ndarray:
        """Sample indices at positions of one bucket's own stream."""
        group = self.groups[number]
        key = () if len(self.groups) == 1 else (1, number + 1)
        found, epochs = self._permuted(positions, group.length, key)
        if group.draws != group.counts:
            found = self._sources(number, found, epochs)
        return found if group.members is None else group.members[found].astype(np.int64)

    def _sources(self, number: int, slots: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """The draws of an epoch, source behind source, to the samples: each as often as any other, or once more."""
        group = self.groups[number]
        draw_bounds, bounds = np.cumsum([0, *group.draws]), np.cumsum([0, *group.counts])
        sources = np.searchsorted(draw_bounds, slots, side="right") - 1
        out = np.empty(len(slots), dtype=np.int64)
        for source in np.unique(sources).tolist():
            here = sources == source
            slot, count = slots[here] - draw_bounds[source], group.counts[source]
            rest = group.draws[source] % count
            more = slot - (group.draws[source] - rest)  # draws that make no whole round go round through the epochs
            found = slot % count
            if (more >= 0).any():
                turns = (epochs[here] * rest + more)[more >= 0]
                found[more >= 0] = self._permuted(turns, count, (2, number + 1, source + 1), window=1)[0]
            out[here] = bounds[source] + found
        return out

    def _permuted(
        self, positions: np.ndarray, length: int, key: tuple[int, ...], window: int = WINDOW
    ) -> tuple[np.ndarray, np.ndarray]:
        """(index, epoch) at positions of an endless stream of permutations."""
        epochs, offsets = np.divmod(positions, length)
        needed = np.unique(epochs).tolist()
        common = dict(shuffle=self.shuffle, block=self.block, window=window, key=key)
        orders = self._kept(key, needed, lambda epoch: epoch_order(length, self.seed, epoch, **common))
        out = np.empty(len(positions), dtype=np.int64)
        for epoch in needed:
            here = epochs == epoch
            out[here] = orders[epoch][offsets[here]]
        return out, epochs

    def _kept(
        self, key: tuple[int, ...], epochs: list[int], make: Callable[[int], np.ndarray]
    ) -> dict[int, np.ndarray]:
        """Of each stream the orders of the epochs in its latest batch are kept: one or two as a rule."""
        before = self._cache.get(key, {})
        self._cache[key] = {epoch: before[epoch] if epoch in before else make(epoch) for epoch in epochs}
        return self._cache[key]
