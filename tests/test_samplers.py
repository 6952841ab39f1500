"""Samplers and schedules: for Gaussian data the best prediction is known and the ODE map affine."""

import math

import numpy as np
import pytest
import torch

from emmdit.flow import SAMPLERS, EpsilonDDPM, RectifiedFlow, dpm_solver, euler, heun, sample, schedule

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


def last(states):
    """The data at the end of a trajectory."""
    return list(states)[-1][2]


def error(path, sampler, timesteps):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    return (last(sampler(gaussian(path), x, timesteps, path)) - exact(path, x, timesteps[0])).abs().max().item()


def even_in_log_snr(path, n):
    """n timesteps at equal distances in log-SNR from 999 to 1, then clean data: singular for no sampler."""
    t = torch.linspace(999, 1, 50_000, dtype=torch.float64)
    alpha, sigma = path.alpha_sigma(t)
    log_snr = (alpha / sigma).log().numpy()
    return torch.tensor([*np.interp(np.linspace(log_snr[0], log_snr[-1], n), log_snr, t.numpy()), 0.0])


# Begins with almost no noise, so that the first-order step from there to clean data does not hide the order
FINE_DDPM = EpsilonDDPM(beta_start=1e-7)


def flow_match_euler(path, n):
    return schedule(n)


def uniform(path, n):
    return schedule(n, "uniform")


EULER, HEUN, DPM = ("euler", 1), ("heun", 2), ("dpm_solver", 2)
ORDERS = [(path, *case, even_in_log_snr) for path in (FLOW, FINE_DDPM) for case in (EULER, HEUN, DPM)]
ORDERS += [(FLOW, *case, timesteps) for case in (EULER, HEUN) for timesteps in (flow_match_euler, uniform)]


@pytest.mark.parametrize(("path", "name", "expected", "timesteps"), ORDERS)
def test_order_of_convergence(path, name, expected, timesteps):
    """Measured from 20 to 80 steps."""
    coarse, fine = (error(path, SAMPLERS[name], timesteps(path, n)) for n in (20, 80))
    assert math.log(coarse / fine, 4) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize(("path", "kind"), [(FLOW, "flow_match_euler"), (FLOW, "uniform"), (DDPM, "ddpm")])
def test_second_order_beats_euler_at_twenty_steps(path, kind):
    timesteps = schedule(20, kind)
    first = error(path, euler, timesteps)
    assert first < 0.2  # of data around MEAN with a spread of STD
    assert error(path, heun, timesteps) < 0.6 * first
    assert error(path, dpm_solver, timesteps) < 0.6 * first


@pytest.mark.parametrize("sampler", [euler, heun])
@pytest.mark.parametrize("kind", ["uniform", "flow_match_euler"])
def test_euler_and_heun_on_the_flow_are_the_plain_loop(sampler, kind):
    x = noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps, predict = schedule(7, kind), gaussian(FLOW)
    for now, then in zip(timesteps[:-1], timesteps[1:], strict=True):
        step, v = (then - now) / 1000, predict(x, now)
        x = x + step * (v if then == 0 or sampler is euler else (v + predict(x + step * v, then)) / 2)
    torch.testing.assert_close(last(sampler(predict, noise, timesteps, FLOW)), x, rtol=1e-5, atol=1e-5)


def test_euler_is_diffusers_euler_on_the_flow_and_ddim_on_ddpm():
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    ddim = DDIMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False, timestep_spacing="trailing")
    for path, scheduler, tolerance in ((FLOW, FlowMatchEulerDiscreteScheduler(shift=1.0), 1e-5), (DDPM, ddim, 1e-3)):
        scheduler.set_timesteps(20)
        x = noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            x = scheduler.step(gaussian(path)(x, t.float()), t, x).prev_sample
        timesteps = schedule(20) if path is FLOW else torch.cat([scheduler.timesteps.float(), torch.zeros(1)])
        torch.testing.assert_close(sample(gaussian(path), noise, path, timesteps), x, rtol=tolerance, atol=tolerance)


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
        assert torch.equal(own, schedule(steps, "ddpm"))
    torch.testing.assert_close(sample(gaussian(path), noise, path, own, "dpm_solver"), x, rtol=2e-3, atol=2e-3)


def test_flow_match_euler_is_the_released_schedule():
    # diffusers 0.32.2's FlowMatchEulerDiscreteScheduler, shift 1, 4 steps: its timesteps, its sigmas
    timesteps = torch.tensor([1000.0, 667.0, 334.0, 1.0])
    torch.testing.assert_close(schedule(4)[:-1], timesteps, rtol=0, atol=1e-4)
    sigmas = torch.tensor([1.0, 0.667, 0.334, 0.001, 0.0])
    torch.testing.assert_close(FLOW.alpha_sigma(schedule(4))[1], sigmas, rtol=0, atol=1e-7)
    twenty = schedule(20)
    assert twenty[1].item() == pytest.approx(947.4211, abs=1e-3)
    assert twenty[-3:].tolist() == pytest.approx([53.5789, 1.0, 0.0], abs=1e-3)


def test_other_schedules():
    assert schedule(4, "uniform").tolist() == [1000.0, 750.0, 500.0, 250.0, 0.0]
    assert schedule(4, "ddpm").tolist() == [999.0, 749.0, 500.0, 250.0, 0.0]
    assert schedule(1).tolist() == [1000.0, 0.0]
    shifted = schedule(4, "uniform", shift=3.0)
    torch.testing.assert_close(shifted, torch.tensor([1000.0, 900.0, 750.0, 500.0, 0.0]))
    for kind in ("flow_match_euler", "uniform", "ddpm"):
        for steps in (1, 2, 20, 999):
            timesteps = schedule(steps, kind)
            assert timesteps.shape == (steps + 1,) and timesteps.dtype == torch.float32 and timesteps[-1] == 0
            assert (timesteps.diff() < 0).all()


def test_a_schedule_may_list_its_timesteps():
    expected = [1000.0, 900.0, 700.5, 0.0]
    for given in ([1000, 900, 700.5], (1000, 900, 700.5, 0)):
        assert schedule(timesteps=given).tolist() == schedule(3, given).tolist() == expected
    assert schedule().shape == (21,)  # a name has 20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedule(0), "steps"),
        (lambda: schedule(4, "karras"), "'karras'.*flow_match_euler.*uniform.*ddpm"),
        (lambda: schedule(4, shift=-1.0), "shift"),
        (lambda: schedule(4, "ddpm", shift=2.0), r"ddpm.*2\.0"),
        (lambda: schedule(1000, "ddpm"), "999"),
        (lambda: schedule(4, [1000, 500]), r"\b2\b.*\b4\b"),
        (lambda: schedule(None, [1000, 500], 3.0), r"shift.*3\.0"),
        (lambda: schedule(None, [500, 1000]), r"\[500\.0, 1000\.0, 0\.0\]"),
        (lambda: schedule(None, [1000, float("nan")]), "nan"),
        (lambda: schedule(None, [1001, 500]), "1001"),
        (lambda: schedule(None, []), r"\[0\.0\]"),
        (lambda: sample(None, torch.zeros(1), FLOW, schedule(4), "euler_a"), "'euler_a'.*euler.*heun.*dpm_solver"),
        (lambda: sample(None, torch.zeros(1), FLOW, torch.tensor([1000.0, 500.0])), r"\[1000\.0, 500\.0\]"),
        (lambda: sample(None, torch.zeros(1), FLOW, torch.tensor([0.0])), r"\[0\.0\]"),
    ],
)
def test_arguments_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("name", "calls"), [("euler", 5), ("heun", 9), ("dpm_solver", 5)])
def test_calls_and_dtype(name, calls):
    seen = []

    def predict(x, t):
        seen.append((x.dtype, t.ndim, t.device.type, t.item()))
        return gaussian(FLOW)(x, t).bfloat16()

    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    data = sample(predict, noise, FLOW, schedule(5), name)
    assert data.dtype == torch.float32 and not data.requires_grad and data.isfinite().all()
    assert len(seen) == calls and {entry[:3] for entry in seen} == {(torch.float32, 0, "cpu")}
    assert all(entry[3] > 0 for entry in seen)  # the network is never asked at clean data
    assert last(SAMPLERS[name](predict, noise, schedule(5), FLOW)).requires_grad


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_trajectory_is_every_state_with_its_prediction(name):
    noise, timesteps = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), schedule(5, "uniform")
    states = list(SAMPLERS[name](gaussian(FLOW), noise, timesteps, FLOW))
    assert [state[:2] for state in states] == list(enumerate(timesteps.tolist()))
    assert torch.equal(states[0][2], noise) and states[-1][3] is None
    assert torch.equal(states[-1][2], sample(gaussian(FLOW), noise, FLOW, timesteps, name))
    for _, t, x, prediction in states[:-1]:
        assert torch.equal(prediction, gaussian(FLOW)(x, torch.tensor(t)))
    *_, before, end = states  # the last step is first order in all of them, from that state and prediction
    torch.testing.assert_close(end[2], FLOW.to_x0(before[2], before[3], before[1]), rtol=1e-4, atol=1e-4)


def test_asking_stops_where_the_caller_stops():
    asked = []
    states = euler(lambda x, t: asked.append(t.item()) or x, torch.zeros(1), schedule(4, "uniform"), FLOW)
    assert next(states)[1] == 1000.0 and next(states)[1] == 750.0 and asked == [1000.0, 750.0]
