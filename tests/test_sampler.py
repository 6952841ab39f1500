"""The order of samples: complete, disjoint, resumable for any number of ranks, and the same for any number of
workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emmdit.data.loader import ResumableLoader
from emmdit.data.sampler import ResumableSampler, epoch_order, rank_positions


def stream(length: int, global_batch: int, world_size: int, start: int, batches: int, seed: int = 3) -> list[list]:
    """(index, position) pairs of the next `batches` global batches, the ranks' shares put together in stream
    order."""
    ranks = [ResumableSampler(length, global_batch, r, world_size, seed) for r in range(world_size)]
    out = []
    for n in range(batches):
        shares = [rank.batch(start + n * global_batch) for rank in ranks]
        out.append(sorted((pair for share in shares for pair in share), key=lambda pair: pair[1]))
        assert sum(map(len, shares)) == len(set(out[-1])) == global_batch  # no overlap of ranks
    return out


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("length,global_batch", [(17, 4), (16, 4), (30, 7), (5, 12), (1, 4), (64, 64)])
def test_every_sample_once_an_epoch(length, global_batch, world_size):
    batches = 4 * -(-length // global_batch)
    pairs = [p for batch in stream(length, global_batch, world_size, 0, batches) for p in batch]
    indices, positions = zip(*pairs, strict=True)
    assert list(positions) == list(range(batches * global_batch))
    for epoch in range(len(indices) // length):
        assert sorted(indices[epoch * length : (epoch + 1) * length]) == list(range(length))


@pytest.mark.parametrize("start_batches", [0, 1, 4, 5, 11])  # 17 / 4: batch 4 spans two epochs
@pytest.mark.parametrize("world_size,global_batch", [(1, 4), (2, 4), (3, 6), (4, 8), (2, 5), (1, 1)])
def test_resume_anywhere_with_other_ranks_and_batch(start_batches, world_size, global_batch):
    straight = [p for batch in stream(17, 4, 2, 0, 40) for p in batch]
    start = start_batches * 4
    resumed = [p for batch in stream(17, global_batch, world_size, start, 12) for p in batch]
    assert resumed == straight[start : start + len(resumed)]


def test_epochs_and_seeds_differ_and_the_order_is_frozen():
    assert not np.array_equal(epoch_order(50, 0, 0), epoch_order(50, 0, 1))
    assert not np.array_equal(epoch_order(50, 0, 0), epoch_order(50, 1, 0))
    assert np.array_equal(epoch_order(50, 0, 7, shuffle=False), np.arange(50))
    # a changed order would break every resume across an upgrade
    assert epoch_order(10, 0, 0).tolist() == [6, 1, 0, 5, 3, 8, 7, 9, 2, 4]


def test_long_order_is_small_and_cache_stays_small():
    sampler = ResumableSampler(1000, 10)
    for n in range(500):
        sampler.batch(n * 10)
    assert [len(kept) for kept in sampler.order._cache.values()] == [1] and epoch_order(1000, 0, 0).dtype == np.int32


def test_rank_positions():
    assert rank_positions(10, 8, 1, 4).tolist() == [11, 15]


@pytest.mark.parametrize("arguments", [(0, 4), (5, 1, 0, 2), (5, 4, 2, 2)])
def test_sampler_errors(arguments):
    with pytest.raises(ValueError):
        ResumableSampler(*arguments)


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


def test_batch_contents():
    (batch,) = take(ResumableLoader(Toy(), 4, seed=1), 1)
    assert batch["sample_id"].dtype == batch["position"].dtype == torch.int64
    assert batch["position"].tolist() == [0, 1, 2, 3]
    assert batch["caption"] == [f"number {i}" for i in batch["sample_id"].tolist()]
    assert torch.equal(batch["image"][:, 0], batch["sample_id"].float())


@pytest.mark.parametrize("persistent", [True, False])
def test_workers_change_nothing_and_prefetch_is_not_counted(persistent):
    plain = ResumableLoader(Toy(), 4, seed=1)
    workers = ResumableLoader(Toy(), 4, seed=1, num_workers=2, persistent_workers=persistent)
    assert len(plain) == 5
    # stop in mid pass (batches in flight are dropped), go on, and cross two epoch ends
    for n in (3, 5, 4):
        assert ids(take(workers, n)) == ids(take(plain, n))
        assert workers.state_dict() == plain.state_dict()
    assert plain.state_dict() == {"samples_seen": 48}


@pytest.mark.parametrize("world_size,global_batch", [(1, 4), (2, 4), (2, 8), (3, 6)])
def test_loader_resumes(world_size, global_batch):
    straight = ResumableLoader(Toy(), 4, seed=1)
    take(straight, 6)
    state = straight.state_dict()
    expected = ids(take(straight, 12))
    ranks = [ResumableLoader(Toy(), global_batch, r, world_size, seed=1) for r in range(world_size)]
    for rank in ranks:
        rank.load_state_dict(state)
    n = 48 // global_batch
    shares = [take(rank, n) for rank in ranks]
    merged = {}
    for share in shares:
        for batch in share:
            merged.update(zip(batch["position"].tolist(), batch["sample_id"].tolist(), strict=True))
    assert [merged[p] for p in sorted(merged)] == expected
    assert min(merged) == 24
    assert {tuple(rank.state_dict().items()) for rank in ranks} == {(("samples_seen", 72),)}


def test_state_counts_the_batch_in_use():
    loader = ResumableLoader(Toy(), 4)
    for n, _ in enumerate(loader, start=1):
        assert loader.state_dict() == {"samples_seen": 4 * n}
    assert n == len(loader)


def test_uneven_batch_is_refused():
    with pytest.raises(ValueError, match=r"\b4\b.*\b3\b"):
        ResumableLoader(Toy(), 4, 0, 3)
