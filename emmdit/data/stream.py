"""The training stream: which sample of the dataset stands at which position, as a pure function of (seed, position).

The training data are one endless stream. *Position* p is the number of samples that all ranks together drew before it;
data epoch e covers the positions [e * length, (e + 1) * length). A global batch is the next `global_batch` positions
and may span two epochs, so nothing is dropped whatever the batch size; within it rank r takes the positions start + r,
start + r + world_size, ... The position is therefore all that has to be stored, and it means the same on every rank and
for any number of ranks.

`Order` answers three questions from (seed, position) alone:

- **Which chunk?** Samples of one bucket (images of one size) come in chunks of `chunk` samples, so that a batch has one
  shape on all ranks. Bucket b with n_b samples gives floor((e + 1) n_b / chunk) - floor(e n_b / chunk) chunks to epoch
  e, and the chunks of an epoch are shuffled. What does not fill a chunk is carried over to the bucket's next one.
- **Which draw?** Each bucket is an endless stream of its own, epoch after epoch in a fresh order.
- **Which sample?** Where sources are mixed by weights, a bucket's epoch holds as many draws of each source as its
  weight asks for; a source gives its samples evenly, each as often as any other, or once more.

With one bucket and no weights this is a permutation of the dataset for each epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from emmdit.data.buckets import cropped

WINDOW = 16  # blocks whose samples are mixed with each other in a block shuffle


def _random(*key: int) -> np.random.RandomState:
    """numpy's legacy `RandomState` on purpose: its streams are frozen for good (NEP 19), so an order survives an
    upgrade of numpy or torch in the middle of a long run."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))


def _index_dtype(length: int) -> type:
    return np.int32 if length <= np.iinfo(np.int32).max else np.int64


def epoch_order(
    length: int, seed: int, epoch: int, block: int | None = None, window: int = WINDOW, key: tuple[int, ...] = ()
) -> np.ndarray:
    """The indices of one epoch in their order, (length,) int32 (int64 above 2**31). 25M samples take 100 MB.

    Args:
        block: None: a permutation of all. Else blocks of this many consecutive indices are permuted, and then the
            indices of `window` consecutive blocks are mixed: reads stay local, for disks on which that counts.
        key: separates streams that share seed and epoch; its last number is not 0.
    """
    order = np.arange(length, dtype=_index_dtype(length))
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
    """The samples of one bucket, source after source; `draws[k]` of an epoch's draws fall on source k."""

    bucket: int
    counts: list[int]
    draws: list[int]
    members: np.ndarray | None  # indices in the dataset; None: all of it

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
        members = np.flatnonzero(buckets == bucket).astype(_index_dtype(len(buckets)))
        parts = np.diff(np.searchsorted(members, bounds)).tolist()
        draws = [
            max(1, round(quota * part / count)) if part else 0
            for quota, part, count in zip(quotas, parts, counts, strict=True)
        ]
        groups.append(Group(bucket, parts, draws, members))
    return groups


class Order:
    """Positions in the stream to sample indices.

    Args:
        length: number of samples.
        seed: of the order.
        block: see `epoch_order`.
        counts: samples of each source, where the dataset is several sources in a row.
        weights: share of the draws that each source gets, in any unit; None: each sample once an epoch.
        buckets: (length,) the number of each sample's bucket; None: all images have one size.
        chunk: consecutive samples of one bucket; the global batch divides it.

    Attributes:
        length: draws in an epoch.
    """

    def __init__(
        self,
        length: int,
        seed: int = 0,
        block: int | None = None,
        counts: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        buckets: np.ndarray | None = None,
        chunk: int | None = None,
    ) -> None:
        if length < 1:
            raise ValueError("The dataset is empty: check its path and filters.")
        if block is not None and block < 1:
            raise ValueError(f"shuffle_block must be at least 1 sample, got {block}.")
        counts = [length] if counts is None else [int(count) for count in counts]
        if sum(counts) != length or min(counts) < 1:
            raise ValueError(f"The sources have {counts} samples, the dataset {length}: every source needs some.")
        if weights is not None and (len(weights) != len(counts) or not all(0 < w < float("inf") for w in weights)):
            raise ValueError(f"weights {list(weights)} must be {len(counts)} positive numbers, one for each source.")
        self.seed, self.block, self.counts = seed, block, counts
        quotas = counts if weights is None else [length * weight / sum(weights) for weight in weights]
        self.groups = _groups(counts, quotas, buckets)
        self.length = sum(group.length for group in self.groups)
        self.chunk = chunk if len(self.groups) > 1 else None
        if len(self.groups) > 1 and (chunk is None or chunk < 1):
            raise ValueError(
                f"The samples have {len(self.groups)} different sizes: set bucket_batch to the global batch "
                "(batch_size x processes), so that a batch has one size and the order does not depend on their number."
            )
        self._cache: dict[tuple[int, ...], dict[int, np.ndarray]] = {}

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Sample index at each position, (n,) int64."""
        positions = np.asarray(positions, dtype=np.int64)
        if self.chunk is None:
            return self._draw(0, positions)
        out = np.empty(len(positions), dtype=np.int64)
        chunks, offsets = np.divmod(positions, self.chunk)
        for chunk in np.unique(chunks).tolist():
            here = chunks == chunk
            group, number = self._find(chunk)
            out[here] = self._draw(group, number * self.chunk + offsets[here])
        return out

    # -- buckets -------------------------------------------------------------------------------------

    def chunks_before(self, epoch: int) -> list[int]:
        """Chunks that each bucket has given before `epoch`."""
        return [epoch * group.length // self.chunk for group in self.groups]

    def _find(self, chunk: int) -> tuple[int, int]:
        """Bucket of a chunk of the stream, and the chunk's number within the bucket."""
        epoch = chunk * self.chunk // self.length
        while sum(self.chunks_before(epoch + 1)) <= chunk:
            epoch += 1
        begin = self.chunks_before(epoch)
        schedule = self._kept((3,), [epoch], lambda epoch: self._schedule(epoch, begin))[epoch]
        group, number = schedule[chunk - sum(begin)].tolist()
        return group, number

    def _schedule(self, epoch: int, begin: list[int]) -> np.ndarray:
        """The chunks of an epoch in their order, (chunks, 2): bucket, number within it."""
        counts = np.subtract(self.chunks_before(epoch + 1), begin)
        groups = np.repeat(np.arange(len(counts)), counts)
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
        """The draws of an epoch, source after source, to samples: each as often as any other, or once more."""
        group = self.groups[number]
        draw_bounds, bounds = np.cumsum([0, *group.draws]), np.cumsum([0, *group.counts])
        sources = np.searchsorted(draw_bounds, slots, side="right") - 1
        out = np.empty(len(slots), dtype=np.int64)
        for source in np.unique(sources).tolist():
            here = sources == source
            slot, count = slots[here] - draw_bounds[source], group.counts[source]
            rest = group.draws[source] % count
            more = slot - (group.draws[source] - rest)  # draws beyond whole passes continue from epoch to epoch
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
        orders = self._kept(key, needed, lambda epoch: epoch_order(length, self.seed, epoch, self.block, window, key))
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


class StreamSampler(Sampler[list[tuple[int, int]]]):
    """Batch sampler over the stream: one rank's batches as lists of (sample index, position).

    An iteration gives `len(self)` batches from position `start`, which the loader moves; the sampler does not move it,
    because a worker process runs ahead of what training has used.

    Args:
        order: of the samples.
        global_batch: samples in one forward pass of all ranks together.
        rank, world_size: this process among all processes.

    Raises:
        ValueError: a batch would hold images of two sizes, or the rank does not exist.
    """

    def __init__(self, order: Order, global_batch: int, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not exist among {world_size} processes: ranks count from 0.")
        if global_batch < world_size:
            raise ValueError(f"A global batch of {global_batch} is too small for {world_size} processes: raise it.")
        if order.chunk is not None and order.chunk % global_batch:
            raise ValueError(
                f"bucket_batch {order.chunk} is not a multiple of the global batch {global_batch} (batch_size x "
                "processes): batches would hold images of two sizes."
            )
        self.order, self.global_batch, self.rank, self.world_size, self.start = order, global_batch, rank, world_size, 0

    def __len__(self) -> int:
        """Batches until every sample was drawn once, counted from the start of an epoch."""
        return -(-self.order.length // self.global_batch)

    def batch(self, start: int) -> list[tuple[int, int]]:
        """This rank's (sample index, position) pairs of the global batch that begins at `start`."""
        if self.order.chunk is not None and start % self.global_batch:
            fitting = math.gcd(start, self.order.chunk)
            raise ValueError(
                f"The training stopped at sample {start}, not a multiple of the global batch {self.global_batch}, so "
                f"batches would hold images of two sizes: let batch_size x processes be a divisor of {fitting}."
            )
        positions = np.arange(start + self.rank, start + self.global_batch, self.world_size, dtype=np.int64)
        return list(zip(self.order.indices(positions).tolist(), positions.tolist(), strict=True))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        start = self.start
        for n in range(len(self)):
            yield self.batch(start + n * self.global_batch)


def stream_report(
    order: Order, names: Sequence[str] = (), buckets: Sequence[tuple[int, int]] = (), sizes: np.ndarray | None = None
) -> dict[str, Any]:
    """What an epoch holds: `sources` and `buckets`, a dict for each.

    Sources: `samples`, `draws` an epoch, `share` of all draws, `passes` (draws per sample and epoch).
    Buckets: `height`, `width`, `samples`, `draws` and `chunks` an epoch, `carried_over` (samples that the first epoch
    leaves to the next, because they do not fill a chunk), `cropped` (mean part of an image's area; None where the sizes
    are unknown).

    Args:
        names: of the sources, where the order mixes some.
        buckets: (height, width) of each bucket.
        sizes: (samples, 2) height and width of the images before the crop.
    """
    sources = []
    for place, name in enumerate(names):
        draws = sum(group.draws[place] for group in order.groups)
        count = order.counts[place]
        row = {"name": name, "samples": count, "draws": draws, "share": draws / order.length, "passes": draws / count}
        sources.append(row)
    rows = []
    for group in order.groups if order.chunk is not None else ():
        lost = None
        if sizes is not None:
            known = sizes[group.members]
            known = known[known.min(1) > 0]
            lost = float(cropped(known, buckets[group.bucket]).mean()) if len(known) else None
        height, width = buckets[group.bucket]
        row = {"height": height, "width": width, "samples": sum(group.counts), "draws": group.length}
        row |= {"chunks": group.length / order.chunk, "carried_over": group.length % order.chunk, "cropped": lost}
        rows.append(row)
    return {"epoch": order.length, "chunk": order.chunk, "sources": sources, "buckets": rows}
