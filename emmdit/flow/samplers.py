"""Samplers: from noise to data along dx = x0_hat dalpha + noise_hat dsigma, the probability-flow ODE of any `Path`.

Each sampler is a generator ``(predict, x, timesteps, path) -> (i, t, x, prediction), ...`` over the states of its
trajectory: for i = 0..n-1 the state ``x`` (B, ...) at timestep ``t`` with the prediction made there, and at the end
``(n, 0.0, x, None)``, where ``x`` is the data. A caller may stop early; `sample` takes the last state.

- ``predict(x, t)`` returns the network's prediction for ``x`` at the 0-d CPU tensor ``t`` (see
  `guidance.classifier_free_guidance`);
- ``timesteps`` are n + 1 falling values on the 0..1000 scale, ending at 0 (`schedules.schedule`). The last one means
  clean data (alpha 1, sigma 0) on every path, and the network is never asked there.

The state is float32 at least, whatever the network computes in. Numbers of steps are small, so coefficients stay
Python floats and cost no device synchronization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from emmdit.flow.paths import Path, at_least_float32
from emmdit.flow.schedules import check_falling

Predict = Callable[[Tensor, Tensor], Tensor]
State = tuple[int, float, Tensor, Tensor | None]  # i, t, x, prediction


def euler(predict: Predict, x: Tensor, timesteps: Tensor, path: Path) -> Iterator[State]:
    """First order: x' = alpha' x0_hat + sigma' noise_hat. Euler on a rectified flow, DDIM on a DDPM path."""
    x, t, alpha, sigma = _prepare(x, timesteps, path)
    n = len(t) - 1
    for i in range(n):
        prediction = predict(x, t[i])
        yield i, t[i].item(), x, prediction
        x0, noise = path.to_x0(x, prediction, t[i]), path.to_noise(x, prediction, t[i])
        x = alpha[i + 1] * x0 + sigma[i + 1] * noise
    yield n, 0.0, x, None


def heun(predict: Predict, x: Tensor, timesteps: Tensor, path: Path) -> Iterator[State]:
    """Second order, 2n - 1 predictions: the Euler step's x0_hat and noise_hat averaged with those at its end.

    The trapezoidal rule in alpha for x0_hat and in sigma for noise_hat; on a rectified flow this is the usual
    mean of two velocities. The last step is Euler's, as in Karras et al. 2022 (arXiv 2206.00364).
    """
    x, t, alpha, sigma = _prepare(x, timesteps, path)
    n = len(t) - 1
    for i in range(n):
        prediction = predict(x, t[i])
        yield i, t[i].item(), x, prediction
        x0, noise = path.to_x0(x, prediction, t[i]), path.to_noise(x, prediction, t[i])
        ahead = alpha[i + 1] * x0 + sigma[i + 1] * noise
        if i + 1 < n:
            prediction = predict(ahead, t[i + 1])
            x0 = (x0 + path.to_x0(ahead, prediction, t[i + 1])) / 2
            noise = (noise + path.to_noise(ahead, prediction, t[i + 1])) / 2
            x = x + (alpha[i + 1] - alpha[i]) * x0 + (sigma[i + 1] - sigma[i]) * noise
        else:
            x = ahead
    yield n, 0.0, x, None


def dpm_solver(predict: Predict, x: Tensor, timesteps: Tensor, path: Path) -> Iterator[State]:
    """DPM-Solver++(2M) (arXiv 2211.01095) of diffusers: second order, one prediction a step.

    diffusers makes its own timesteps (it starts a flow at sigma 0.999 and cuts them to integers), so the scheduler is
    given our sigmas instead, and it counts steps without looking timesteps up. Its last step is first order.

    One fix: where the log-SNR step more than doubles, as at the end of "flow_match_euler" (sigma 0.05 to 0.001), the
    method would extrapolate far beyond what it knows: on Gaussian data, 20 steps were worse than Euler's. Such a step
    is taken at first order here. The other schedules have none.
    """
    # imported late: it takes seconds, and only this sampler needs it
    from diffusers import DPMSolverMultistepScheduler

    x, t, alpha, sigma = _prepare(x, timesteps, path)
    n = len(t) - 1
    config = path.diffusers_config()
    flow = config.get("use_flow_sigmas", False)
    scheduler = DPMSolverMultistepScheduler(**config)
    scheduler.set_timesteps(n)
    scheduler.sigmas = torch.tensor([s if flow else s / a for a, s in zip(alpha, sigma, strict=True)])
    scheduler.set_begin_index(0)
    log_alpha, log_sigma = torch.tensor([alpha, sigma], dtype=torch.float64).log()
    log_snr = (log_alpha - log_sigma).tolist()
    for i in range(n):
        prediction = predict(x, t[i]).to(x.dtype)
        yield i, t[i].item(), x, prediction
        if i > 0 and log_snr[i + 1] - log_snr[i] > 2 * (log_snr[i] - log_snr[i - 1]):
            scheduler.lower_order_nums = 0  # the scheduler's count of usable earlier predictions
        x = scheduler.step(prediction, t[i], x, return_dict=False)[0]
    yield n, 0.0, x, None


SAMPLERS: dict[str, Callable[..., Iterator[State]]] = {"euler": euler, "heun": heun, "dpm_solver": dpm_solver}


def trajectory(
    predict: Predict, noise: Tensor, path: Path, timesteps: Tensor, sampler: str = "euler"
) -> Iterator[State]:
    """The states of the named sampler from standard normal ``noise`` (B, ...); with gradients, where they are on."""
    if sampler not in SAMPLERS:
        raise ValueError(f"There is no sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}.")
    return SAMPLERS[sampler](predict, noise, timesteps, path)


@torch.no_grad()
def sample(predict: Predict, noise: Tensor, path: Path, timesteps: Tensor, sampler: str = "euler") -> Tensor:
    """Data from standard normal ``noise`` (B, ...): the last state of a `trajectory`, without gradients.

    >>> x = sample(predict, torch.randn(4, 32, 16, 16), RectifiedFlow(), schedule(20))
    """
    for _, _, x, _ in trajectory(predict, noise, path, timesteps, sampler):
        data = x
    return data


def _prepare(x: Tensor, timesteps: Tensor, path: Path) -> tuple[Tensor, Tensor, list[float], list[float]]:
    """The state, timesteps on the CPU, and alpha and sigma at each of them, the last one clean."""
    t = torch.as_tensor(timesteps).detach().cpu().float()
    check_falling(t.flatten().tolist())
    alpha, sigma = path.alpha_sigma(t[:-1].double())
    return at_least_float32(x), t, [*alpha.tolist(), 1.0], [*sigma.tolist(), 0.0]
