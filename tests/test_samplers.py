"""Samplers against the closed form: for Gaussian data the best prediction is known and the ODE map affine."""

import math

import numpy as np
import pytest
import torch

from emmdit.flow import SAMPLERS, EpsilonDDPM, RectifiedFlow, dpm_solver, euler, heun, sample, timestep_grid

FLOW, DDPM = RectifiedFlow(), EpsilonDDPM()
MEAN, STD = 0.7, 0.4


def gaussian(path):
    """The best prediction for data N(MEAN, STD^2) in every element."""

    def predict(x, t):
        alpha, sigma = path.alpha_sigma(t.to(x.dtype))
        variance = (alpha * STD) ** 2 + sigma**2
        x0 = MEAN + alpha * STD**2 / variance * (x - alpha * MEAN)
        noise = sigma / variance * (x - alpha * MEAN)
        return path.target(x0, noise, t)

    return predict


def exact(path, x, t):
    """Where the ODE carries x from time t to clean data."""
    alpha, sigma = (value.item() for value in path.alpha_sigma(t.double()))
    return MEAN + STD * (x - alpha * MEAN) / math.sqrt((alpha * STD) ** 2 + sigma**2)


def error(path, sampler, grid):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    return (sampler(gaussian(path), x, grid, path) - exact(path, x, grid[0])).abs().max().item()


def even_in_log_snr(path, n):
    """n timesteps at equal distances in log-SNR from 999 to 1, then clean data: singular for no sampler."""
    t = torch.linspace(999, 1, 50_000, dtype=torch.float64)
    alpha, sigma = path.alpha_sigma(t)
    log_snr = (alpha / sigma).log().numpy()
    return torch.tensor([*np.interp(np.linspace(log_snr[0], log_snr[-1], n), log_snr, t.numpy()), 0.0])


def order(path, sampler, grid):
    """The measured order of convergence, from 20 to 80 steps."""
    return math.log(error(path, sampler, grid(path, 20)) / error(path, sampler, grid(path, 80)), 4)


# Begins with almost no noise, so that the first-order step from there to clean data does not hide the order
FINE_DDPM = EpsilonDDPM(beta_start=1e-7)


@pytest.mark.parametrize("path", [FLOW, FINE_DDPM], ids=["flow", "ddpm"])
@pytest.mark.parametrize(("name", "expected"), [("euler", 1), ("heun", 2), ("dpm_solver", 2)])
def test_order_of_convergence(path, name, expected):
    assert order(path, SAMPLERS[name], even_in_log_snr) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("kind", ["nitro", "uniform"])
@pytest.mark.parametrize(("name", "expected"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence_on_the_flow_grids(kind, name, expected):
    found = order(FLOW, SAMPLERS[name], lambda path, n: timestep_grid(n, kind))
    assert found == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("path", "kind"), [(FLOW, "nitro"), (FLOW, "uniform"), (DDPM, "ddpm"), (DDPM, "nitro")])
def test_final_mean_and_variance(path, kind, name):
    noise = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    data = sample(gaussian(path), noise, path, steps=100, sampler=name, grid=kind)
    tolerance = 0.03 if name == "euler" else 0.015
    assert data.mean().item() == pytest.approx(MEAN, abs=tolerance)
    assert data.std().item() == pytest.approx(STD, abs=tolerance)


@pytest.mark.parametrize(("path", "kind"), [(FLOW, "nitro"), (FLOW, "uniform"), (DDPM, "ddpm")])
def test_second_order_beats_euler_at_twenty_steps(path, kind):
    grid = timestep_grid(20, kind)
    first = error(path, euler, grid)
    assert error(path, heun, grid) < 0.6 * first
    assert error(path, dpm_solver, grid) < 0.6 * first


def test_euler_on_the_flow_is_the_plain_loop():
    x = noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    grid, predict = timestep_grid(7, "uniform"), gaussian(FLOW)
    for now, then in zip(grid[:-1], grid[1:], strict=True):
        x = x + (then - now) / 1000 * predict(x, now)
    torch.testing.assert_close(euler(predict, noise, grid, FLOW), x, rtol=1e-5, atol=1e-5)


def test_heun_on_the_flow_is_the_plain_loop():
    x = noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    grid, predict = timestep_grid(7, "nitro"), gaussian(FLOW)
    for now, then in zip(grid[:-1], grid[1:], strict=True):
        step, v = (then - now) / 1000, predict(x, now)
        x = x + step * (v if then == 0 else (v + predict(x + step * v, then)) / 2)
    torch.testing.assert_close(heun(predict, noise, grid, FLOW), x, rtol=1e-5, atol=1e-5)


def test_euler_on_the_flow_is_diffusers_euler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(9)
    x = noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(gaussian(FLOW)(x, t), t, x).prev_sample
    torch.testing.assert_close(sample(gaussian(FLOW), noise, FLOW, steps=9), x, rtol=1e-5, atol=1e-5)


def test_euler_on_ddpm_is_diffusers_ddim():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    x = noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(gaussian(DDPM)(x, t.float()), t, x).prev_sample
    grid = torch.cat([scheduler.timesteps.float(), torch.zeros(1)])
    torch.testing.assert_close(euler(gaussian(DDPM), noise, grid, DDPM), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("path", [FLOW, DDPM], ids=["flow", "ddpm"])
@pytest.mark.parametrize("steps", [1, 2, 12, 20])
def test_dpm_solver_is_diffusers_on_its_own_grid(path, steps):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(**path.diffusers_config())
    scheduler.set_timesteps(steps)
    own = scheduler.sigmas * 1000 if path is FLOW else torch.cat([scheduler.timesteps.float(), torch.zeros(1)])
    x = noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for t, now in zip(scheduler.timesteps, own, strict=False):
        x = scheduler.step(gaussian(path)(x, now), t, x).prev_sample
    if path is DDPM:
        assert torch.equal(own, timestep_grid(steps, "ddpm"))
    torch.testing.assert_close(dpm_solver(gaussian(path), noise, own, path), x, rtol=2e-3, atol=2e-3)


def test_nitro_grid_is_the_released_one():
    # diffusers 0.32.2's FlowMatchEulerDiscreteScheduler, shift 1, 4 steps: its timesteps, its sigmas
    timesteps = torch.tensor([1000.0, 667.0, 334.0, 1.0])
    torch.testing.assert_close(timestep_grid(4)[:-1], timesteps, rtol=0, atol=1e-4)
    sigmas = torch.tensor([1.0, 0.667, 0.334, 0.001, 0.0])
    torch.testing.assert_close(FLOW.alpha_sigma(timestep_grid(4))[1], sigmas, rtol=0, atol=1e-7)
    twenty = timestep_grid(20)
    assert twenty[1].item() == pytest.approx(947.4211, abs=1e-3)
    assert twenty[-3:].tolist() == pytest.approx([53.5789, 1.0, 0.0], abs=1e-3)


def test_other_grids():
    assert timestep_grid(4, "uniform").tolist() == [1000.0, 750.0, 500.0, 250.0, 0.0]
    assert timestep_grid(4, "ddpm").tolist() == [999.0, 749.0, 500.0, 250.0, 0.0]
    assert timestep_grid(1).tolist() == [1000.0, 0.0]
    shifted = timestep_grid(4, "uniform", shift=3.0)
    torch.testing.assert_close(shifted, torch.tensor([1000.0, 900.0, 750.0, 500.0, 0.0]))
    for kind in ("nitro", "uniform", "ddpm"):
        for steps in (1, 2, 20, 999):
            grid = timestep_grid(steps, kind)
            assert grid.shape == (steps + 1,) and grid.dtype == torch.float32 and grid[-1] == 0
            assert (grid.diff() < 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: timestep_grid(0), r"\bsteps\b.*\b0\b"),
        (lambda: timestep_grid(4, "karras"), "'karras'.*uniform.*ddpm"),
        (lambda: timestep_grid(4, shift=-1.0), "shift"),
        (lambda: timestep_grid(4, "ddpm", shift=2.0), "shift"),
        (lambda: timestep_grid(1000, "ddpm"), "999"),
        (lambda: sample(None, torch.zeros(1), FLOW, sampler="euler_a"), "'euler_a'.*euler.*heun.*dpm_solver"),
        (lambda: euler(None, torch.zeros(1), torch.tensor([1000.0, 500.0]), FLOW), r"timesteps.*\[1000\.0, 500\.0\]"),
        (lambda: euler(None, torch.zeros(1), torch.tensor([0.0, 1000.0]), FLOW), r"timesteps.*\[0\.0, 1000\.0\]"),
        (lambda: euler(None, torch.zeros(1), torch.tensor([0.0]), FLOW), r"timesteps.*\[0\.0\]"),
    ],
)
def test_arguments_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("name", "calls"), [("euler", 5), ("heun", 9), ("dpm_solver", 5)])
def test_calls_callback_and_dtype(name, calls):
    seen, steps = [], []

    def predict(x, t):
        seen.append((x.dtype, t.ndim, t.device.type, t.item()))
        return gaussian(FLOW)(x, t).bfloat16()

    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    data = sample(predict, noise, FLOW, steps=5, sampler=name, callback=lambda i, n: steps.append((i, n)))
    assert data.dtype == torch.float32 and not data.requires_grad and data.isfinite().all()
    assert steps == [(i, 5) for i in range(1, 6)]
    assert len(seen) == calls and {entry[:3] for entry in seen} == {(torch.float32, 0, "cpu")}
    assert all(entry[3] > 0 for entry in seen)  # the network is never asked at clean data
    assert SAMPLERS[name](predict, noise, timestep_grid(5), FLOW).requires_grad
