"""The training stream: complete, disjoint over ranks, resumable anywhere; mixing, buckets, block shuffle; kill -9."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emmdit.data.buckets import Buckets
from emmdit.data.captions import choose
from emmdit.data.loader import ResumableLoader
from emmdit.data.stream import WINDOW, Order, StreamSampler, epoch_order, stream_report

SIZES = [(8 * n, 8) for n in range(5)]


def stream(order: Order, positions: int, global_batch: int, world_size: int, start: int = 0) -> tuple[np.ndarray, list]:
    """What all ranks together draw from `start` on in `positions` samples, in stream order; and each global batch."""
    ranks = [StreamSampler(order, global_batch, r, world_size) for r in range(world_size)]
    found, batches = {}, []
    for begin in range(start, start + positions, global_batch):
        shares = [rank.batch(begin) for rank in ranks]
        pairs = [pair for share in shares for pair in share]
        assert len({position for _, position in pairs}) == len(pairs) == global_batch  # no position twice
        found |= {position: index for index, position in pairs}
        batches.append([index for index, _ in pairs])
    assert sorted(found) == list(range(start, start + positions))  # and none left out
    return np.array([found[p] for p in sorted(found)], dtype=np.int64), batches


@settings(max_examples=50, deadline=None)
@given(data=st.data(), world_size=st.integers(1, 4), seed=st.integers(0, 99))
def test_union_is_the_dataset_and_nothing_twice(data: st.DataObject, world_size: int, seed: int) -> None:
    """Any batch and number of ranks, with and without buckets and a block shuffle."""
    length = data.draw(st.integers(1, 60))
    buckets = data.draw(st.none() | st.lists(st.integers(1, 4), min_size=length, max_size=length))
    block = data.draw(st.none() | st.integers(1, 20))
    global_batch = world_size * data.draw(st.integers(1, 6))
    chunk = global_batch * data.draw(st.integers(1, 3))
    codes = None if buckets is None else np.array(buckets)
    order = Order(length, seed, block=block, buckets=codes, chunk=chunk)
    epochs = 3
    drawn = sum(order.chunks_before(epochs)) * chunk if len(order.groups) > 1 else epochs * length
    indices, batches = stream(order, -(-drawn // global_batch) * global_batch, global_batch, world_size)
    indices = indices[:drawn]

    if len(order.groups) == 1:
        for epoch in range(epochs):
            assert sorted(indices[epoch * length : (epoch + 1) * length]) == list(range(length))
        return
    told = stream_report(order, buckets=SIZES)["buckets"]
    for batch in batches:
        assert len(set(codes[batch])) == 1  # one size on all ranks
    for group, row in zip(order.groups, told, strict=True):
        mine = indices[codes[indices] == group.bucket]
        assert row["samples"] == len(group.members) == row["draws"]
        # after three epochs a bucket lacks less than a chunk of three times its samples, which is what the report says
        assert epochs * len(group.members) - len(mine) == epochs * len(group.members) % chunk
        for first in range(0, len(mine), len(group.members)):  # its own epochs: each sample once
            part = mine[first : first + len(group.members)]
            assert len(set(part)) == len(part) and set(part) <= set(group.members.tolist())
    assert sum(row["carried_over"] for row in told) == length - sum(order.chunks_before(1)) * chunk


@settings(max_examples=30, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_mixing_draws_each_source_as_its_weight_says_and_its_samples_evenly(data: st.DataObject, seed: int) -> None:
    counts = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    weights = data.draw(st.lists(st.floats(0.2, 5), min_size=len(counts), max_size=len(counts)))
    block = data.draw(st.none() | st.integers(1, 20))
    order = Order(sum(counts), seed, block=block, counts=counts, weights=weights)
    epochs = 7
    indices, _ = stream(order, epochs * order.length, order.length, 1)
    bounds = np.cumsum([0, *counts])
    (group,) = order.groups
    for k in range(len(counts)):
        assert abs(group.draws[k] - sum(counts) * weights[k] / sum(weights)) <= 1
        for epoch in range(epochs):
            part = indices[epoch * order.length : (epoch + 1) * order.length]
            assert ((bounds[k] <= part) & (part < bounds[k + 1])).sum() == group.draws[k]  # its share in each epoch
        times = np.bincount(indices, minlength=sum(counts))[bounds[k] : bounds[k + 1]]
        assert times.max() - times.min() <= 1 and times.sum() == epochs * group.draws[k]
    told = stream_report(order, [str(k) for k in range(len(counts))])["sources"]
    assert [row["passes"] * row["samples"] for row in told] == pytest.approx(group.draws)


def test_weights_and_buckets_together() -> None:
    counts, codes = [40, 100, 7], np.random.default_rng(0).integers(1, 4, 147)
    order = Order(147, 5, counts=counts, weights=[1, 1, 2], buckets=codes, chunk=8)
    epochs = 20
    indices, batches = stream(order, sum(order.chunks_before(epochs)) * 8, 4, 2)
    assert all(len(set(codes[batch])) == 1 for batch in batches)
    shares = [((lo <= indices) & (indices < hi)).mean() for lo, hi in ((0, 40), (40, 140), (140, 147))]
    assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.02)
    times = np.bincount(indices, minlength=147)
    for group in order.groups:
        for lo, hi in ((0, 40), (40, 140), (140, 147)):
            part = times[[m for m in group.members.tolist() if lo <= m < hi]]
            assert not len(part) or part.max() - part.min() <= 2  # evenly, up to the chunk that an end cuts


def test_a_bucket_smaller_than_a_chunk_is_not_lost() -> None:
    codes = np.array([1] * 50 + [2] * 3)
    order = Order(53, buckets=codes, chunk=16)
    (_, small) = stream_report(order, buckets=SIZES)["buckets"]
    assert small["chunks"] == 3 / 16 and small["carried_over"] == 3
    indices, _ = stream(order, sum(order.chunks_before(16)) * 16, 16, 1)
    assert np.bincount(indices)[50:].tolist() == [16, 16, 16]  # sixteen epochs, sixteen times
    assert stream_report(order, buckets=SIZES, sizes=np.full((53, 2), 100))["buckets"][1]["cropped"] == 0.5


@pytest.mark.parametrize("world_size,global_batch", [(1, 4), (3, 12), (4, 8), (2, 6)])
def test_a_resume_may_begin_at_any_aligned_position(world_size: int, global_batch: int) -> None:
    codes = np.random.default_rng(1).integers(1, 4, 70)
    order = Order(70, 2, block=5, counts=[30, 40], weights=[1, 3], buckets=codes, chunk=24)
    straight, _ = stream(order, 480, 24, 2)
    start = 5 * global_batch
    resumed, _ = stream(order, 120, global_batch, world_size, start)
    assert resumed.tolist() == straight[start : start + 120].tolist()
    with pytest.raises(ValueError, match=r"\b30\b.*\b12\b.*batch_size.*\b6\b"):
        StreamSampler(order, 12, 0, 3).batch(30)
    with pytest.raises(ValueError, match=r"bucket_batch.*\b24\b.*\b9\b"):
        StreamSampler(order, 9)
    with pytest.raises(ValueError, match=r"\b3\b.*bucket_batch"):
        Order(70, buckets=codes)


def test_block_shuffle_stays_local_and_moves_everything() -> None:
    length, block = 20_000, 100
    order = epoch_order(length, 0, 0, block=block)
    assert sorted(order) == list(range(length))
    for first in range(0, length, WINDOW * block):  # a stretch of the stream reads from 16 blocks of the disk
        assert len(set(order[first : first + WINDOW * block] // block)) == WINDOW or first + WINDOW * block > length
    assert np.abs(np.diff(order[:1000])).mean() > block
    assert not np.array_equal(order, epoch_order(length, 0, 1, block=block))
    assert np.array_equal(epoch_order(50, 3, 2, block=50), epoch_order(50, 3, 2))


def test_orders_are_those_of_the_first_release() -> None:
    """A changed order would break every resume across an upgrade."""

    def digest(indices) -> str:
        return hashlib.sha256(np.asarray(indices, np.int64).tobytes()).hexdigest()[:16]

    index = Buckets(64, 2.0).assign(np.random.default_rng(0).integers(200, 2000, (997, 2)), 512)
    mixed, bucketed = dict(counts=[300, 697], weights=[2, 1]), dict(buckets=index, chunk=24)
    for options, expected in (
        ({}, "565af62a1b2b92f0"),
        ({"block": 50}, "f0c0d72f5a8d4922"),
        (mixed, "69db2ceac82dccbc"),
        (bucketed, "f7f0b2a44ea42029"),
        ({"block": 50} | mixed | bucketed, "97839587191ef6be"),
    ):
        assert digest(Order(997, 7, **options).indices(np.arange(5000))) == expected, options
    rank = StreamSampler(Order(997, 7, **bucketed), 24, 1, 3)
    assert digest([i for n in range(50) for i, _ in rank.batch(24 * n)]) == "2acfd3afbd1aa560"
    captions = [choose([("a", 1.0), ("b", 2.0), ("c", 1.0)], 3, position) for position in range(20)]
    assert "".join(captions) == "bbbcbcbcaaababaababb"


@pytest.mark.parametrize("length,arguments", [(0, (4,)), (5, (1, 0, 2)), (5, (4, 2, 2)), (5, (4, 0, 3))])
def test_loader_errors(length, arguments):
    with pytest.raises(ValueError):
        ResumableLoader(Toy(), Order(length), *arguments)


# -- the loader --------------------------------------------------------------------------------------


class Toy(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 17

    def __getitem__(self, index: int) -> dict:
        return {"image": torch.full((2,), float(index)), "caption": f"number {index}"}


def take(loader, n: int) -> list[dict]:
    """The next n batches, over as many passes as that needs."""
    out = []
    while len(out) < n:
        for batch in loader:
            out.append(batch)
            if len(out) == n:
                break
    return out


def ids(batches: list[dict]) -> list[int]:
    return [i for batch in batches for i in batch["sample_id"].tolist()]


def test_workers_change_nothing_and_prefetch_is_not_counted():
    plain = ResumableLoader(Toy(), Order(17, 1), 4)
    workers = ResumableLoader(Toy(), Order(17, 1), 4, num_workers=2)
    assert len(plain) == 5
    # stop in mid pass (batches in flight are dropped), go on, and cross two epoch ends
    for n in (3, 5, 4):
        assert ids(take(workers, n)) == ids(take(plain, n))
        assert workers.state_dict() == plain.state_dict()
    assert plain.state_dict() == {"samples_seen": 48}


def test_state_counts_the_batch_in_use():
    loader = ResumableLoader(Toy(), Order(17), 4)
    for n, _ in enumerate(loader, start=1):
        assert loader.state_dict() == {"samples_seen": 4 * n}
    assert n == len(loader)


# -- kill -9, then another number of ranks ------------------------------------------------------------


class Rows:
    """90 samples with two captions each."""

    def __len__(self) -> int:
        return 90

    def __getitem__(self, index: int) -> dict:
        return {"caption": "", "captions": [(f"{index} long", 3.0), (f"{index} short", 1.0)]}


def read_rank(
    out: Path, rank: int, world: int, batch: int, start: int, stop: int, die: int, buckets: bool, workers: int
):
    codes = np.random.default_rng(1).integers(1, 4, 90) if buckets else None
    order = Order(90, 2, counts=[40, 50], weights=[1, 3], buckets=codes, chunk=24)
    loader = ResumableLoader(Rows(), order, batch, rank, world, num_workers=workers)
    loader.load_state_dict({"samples_seen": start})
    with out.open("a") as file:
        while loader.samples_seen < stop:
            for batch in loader:
                for line in zip(batch["position"].tolist(), batch["sample_id"].tolist(), batch["caption"], strict=True):
                    file.write(json.dumps(line) + "\n")
                file.flush()
                if loader.samples_seen >= die:
                    os.kill(os.getpid(), signal.SIGKILL)
                if loader.samples_seen >= stop:
                    break


def read(out: Path, world: int, batch: int, start: int, stop: int, die: int, buckets: bool, workers: int = 0) -> list:
    """Lines (position, id, caption) of all ranks, each a process of its own; at `die` they end by SIGKILL."""
    out.mkdir()
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            try:
                read_rank(out / str(rank), rank, world, batch, start, stop, die, buckets, workers)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    ends = {os.waitpid(child, 0)[1] for child in children}
    assert ends == ({signal.SIGKILL} if die < stop else {0})
    return sorted(json.loads(line) for rank in range(world) for line in (out / str(rank)).read_text().splitlines())


@pytest.mark.parametrize("buckets", [False, True])
def test_killed_on_two_ranks_resumes_on_one_then_three(buckets: bool, tmp_path: Path) -> None:
    """An epoch has 90 draws: the first kill is in its middle, the second in the middle of the third."""
    whole = read(tmp_path / "whole", 1, 24, 0, 264, 999, buckets)
    two = read(tmp_path / "two", 2, 12, 0, 264, 48, buckets, workers=1)
    one = read(tmp_path / "one", 1, 6, 36, 264, 192, buckets)  # the last checkpoint was twelve samples before the kill
    three = read(tmp_path / "three", 3, 12, 180, 264, 999, buckets)
    assert [line[0] for line in whole] == list(range(264))
    assert two == whole[:48] and one == whole[36:192] and three == whole[180:]
    captions = [line[2].split()[1] for line in whole]
    assert 0.65 < captions.count("long") / 264 < 0.85  # weights 3 to 1
    assert len({line[2] for line in whole}) > len({line[1] for line in whole})  # another epoch, another caption
