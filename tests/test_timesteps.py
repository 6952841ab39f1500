"""The drawn timesteps have the distribution they claim, on the values they claim."""

import math

import pytest
import torch
from scipy import stats

from emmdit.flow import LogitNormal, LogitNormalGrid, Uniform, UniformGrid, resolution_shift, shift_timesteps

SAMPLERS = [LogitNormalGrid, LogitNormal, Uniform, UniformGrid]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def logit_normal_cdf(mean=0.0, std=1.0):
    return lambda t: stats.norm.cdf((torch.logit(torch.as_tensor(t / 1000).double()).numpy() - mean) / std)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.6), (-1.0, 2.0)])
def test_logit_normal_distribution(mean, std, stratified):
    t = LogitNormal(mean, std, stratified=stratified)(20_000, seeded())
    assert t.dtype == torch.float32 and t.shape == (20_000,)
    assert t.min() > 0 and t.max() <= 1000
    assert stats.kstest(t.double(), logit_normal_cdf(mean, std)).pvalue > 0.01


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("mean", [0.0, 0.8])
def test_grid_is_a_logit_normal_rounded_up_to_a_whole_number(mean, stratified):
    n = 50_000
    t = LogitNormalGrid(mean, stratified=stratified)(n, seeded())
    assert torch.equal(t, t.round()) and t.min() >= 1 and t.max() <= 1000
    # P(t <= k) = P(1000 sigma <= k): compared at every whole number, within Kolmogorov's bound at 1%
    k = torch.arange(1, 1000)
    below = torch.searchsorted(t.sort().values, k.float(), right=True) / n
    assert (below.double() - torch.as_tensor(logit_normal_cdf(mean)(k))).abs().max() < 1.63 / math.sqrt(n)


def test_grid_is_nitro_e_timestep_for_timestep():
    from diffusers import FlowMatchEulerDiscreteScheduler

    timesteps = FlowMatchEulerDiscreteScheduler(shift=1.0).timesteps
    u = torch.sigmoid(torch.normal(0.0, 1.0, (4096,), generator=seeded(3)))
    drawn = timesteps[(u * 1000).long()].round()  # diffusers' table has 666.99997 and the like in ten places
    assert torch.equal(LogitNormalGrid()(4096, seeded(3)), drawn)


def test_grid_with_shift_is_the_shifted_grid_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    plain, shifted = LogitNormalGrid()(256, seeded()), LogitNormalGrid(shift=3.0)(256, seeded())
    table = FlowMatchEulerDiscreteScheduler(shift=3.0).timesteps
    torch.testing.assert_close(shifted, table[1000 - plain.long()])


def test_grid_reaches_both_ends_and_not_beyond():
    t = LogitNormalGrid(std=100.0)(2000, seeded())  # sigmoid rounds to 0 and to 1
    assert t.min() == 1 and t.max() == 1000
    assert set(LogitNormalGrid(num=4)(1000, seeded()).tolist()) == {250.0, 500.0, 750.0, 1000.0}


def test_uniform_distributions():
    t = Uniform()(20_000, seeded())
    assert t.min() > 0 and t.max() <= 1000
    assert stats.kstest(t / 1000, "uniform").pvalue > 0.01
    counts = torch.bincount(UniformGrid()(100_000, seeded()).long(), minlength=1000)
    assert len(counts) == 1000 and stats.chisquare(counts).pvalue > 0.01
    assert set(UniformGrid(2, 4)(100, seeded()).tolist()) == {2.0, 3.0, 4.0}


@pytest.mark.parametrize("n", [1, 2, 7, 256])
def test_stratified_has_exactly_one_in_each_stratum(n):
    strata = list(range(n))
    for seed in range(5):
        t = LogitNormal(0.3, 0.7, stratified=True)(n, seeded(seed))
        assert sorted((logit_normal_cdf(0.3, 0.7)(t) * n).astype(int)) == strata
        t = Uniform(stratified=True)(n, seeded(seed))
        assert sorted(((1 - t.double() / 1000) * n).int().tolist()) == strata
    assert sorted(UniformGrid(0, n - 1, stratified=True)(n, seeded()).tolist()) == strata


def test_strata_are_in_random_order():
    orders = {tuple(Uniform(stratified=True)(4, seeded(seed)).argsort().tolist()) for seed in range(400)}
    assert len(orders) == 24


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("stratified", [False, True])
def test_same_generator_same_timesteps(kind, stratified):
    sampler = kind(stratified=stratified)
    assert torch.equal(sampler(64, seeded(1)), sampler(64, seeded(1), "cpu"))
    assert not torch.equal(sampler(64, seeded(1)), sampler(64, seeded(2)))


def test_shift():
    t = torch.linspace(0, 1000, 11)
    shifted = shift_timesteps(t, 3.0)
    torch.testing.assert_close(shifted / 1000, 3 * (t / 1000) / (1 + 2 * (t / 1000)))
    assert shifted[0] == 0 and shifted[-1] == 1000 and (shifted[1:-1] > t[1:-1]).all()
    torch.testing.assert_close(shift_timesteps(shifted, 1 / 3), t)
    assert torch.equal(shift_timesteps(t, 1.0), t)
    torch.testing.assert_close(Uniform(shift=3.0)(9, seeded()), shift_timesteps(Uniform()(9, seeded()), 3.0))
    assert [resolution_shift(1024, 256), resolution_shift(256, 256), resolution_shift(4096, 1024, 1.5)] == [
        2.0,
        1.0,
        3.0,
    ]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: LogitNormal(std=0.0), "std"),
        (lambda: LogitNormalGrid(std=-1.0), "std"),
        (lambda: LogitNormalGrid(num=0), r"\bnum\b"),
        (lambda: Uniform(shift=0.0), "shift"),
        (lambda: Uniform(shift=math.inf), "shift"),
        (lambda: UniformGrid(5, 4), "first"),
        (lambda: UniformGrid(0, 1001), "last"),
        (lambda: Uniform()(0), r"timesteps.*\b0\b"),
        (lambda: resolution_shift(0, 16), "tokens"),
    ],
)
def test_arguments_are_checked(make, name):
    with pytest.raises(ValueError, match=name):
        make()
