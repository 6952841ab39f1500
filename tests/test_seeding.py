"""Randomness is a function of seed, purpose and position, and does not see how the batch is split."""

import pytest
import torch

from emmdit.seeding import generator, step_noise


def draw(*arguments):
    return torch.randn(16, generator=generator(*arguments))


def test_pure_function_and_every_argument_counts():
    base = draw(1, "noise", 4096)
    assert torch.equal(base, draw(1, "noise", 4096))
    others = [draw(2, "noise", 4096), draw(1, "timesteps", 4096), draw(1, "noise", 4097), draw(1, "noise", 409)]
    assert all(not torch.equal(base, other) for other in others)
    assert not torch.equal(draw(1, "a", 23), draw(12, "a", 3))


def test_the_hash_stays_what_it_is():
    # blake2b of "7|noise|2048", first 63 bits: a change here would change every run's noise on resume
    assert generator(7, "noise", 2048).initial_seed() == 7703723031115781383


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 12])
def test_rows_do_not_depend_on_the_split(ranks):
    n, before = 12, torch.random.get_rng_state()
    whole = step_noise((3, 2, 2), slice(None), n, generator(0, "noise", 96))
    assert whole.shape == (n, 3, 2, 2) and whole.dtype == torch.float32
    for rank in range(ranks):
        own = torch.arange(rank, n, ranks)  # interleaved, as a distributed sampler assigns them
        assert torch.equal(step_noise((3, 2, 2), own, n, generator(0, "noise", 96)), whole[own])
        block = slice(rank * n // ranks, (rank + 1) * n // ranks)
        assert torch.equal(step_noise((3, 2, 2), block, n, generator(0, "noise", 96), "cpu"), whole[block])
        assert torch.equal(step_noise((3, 2, 2), own.tolist(), n, generator(0, "noise", 96)), whole[own])
    assert torch.equal(before, torch.random.get_rng_state())  # global state is left alone


def test_noise_is_standard_normal():
    noise = step_noise((8, 8), slice(None), 1000, generator(0, "noise", 0))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert not torch.equal(noise[0], noise[1])
