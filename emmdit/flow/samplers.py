"""From noise to data along dx = x0_hat dalpha + noise_hat dsigma, the probability-flow ODE of any `Path`.

Each sampler is a pure function ``(predict, x, timesteps, path, callback=None) -> x``:

- ``predict(x, t)`` answers the network's prediction for ``x`` (B, ...) at the 0-d CPU tensor ``t`` (see
  `guidance.guided`);
- ``timesteps`` are n + 1 falling values on the 0..1000 scale, ending at 0. The last one means clean data
  (alpha 1, sigma 0) on every path, and the network is never asked there;
- ``callback(i, n)``, if given, is called after step i of n, counted from 1.

The state is float32 at least, whatever the network computes in. Numbers of steps are small, so coefficients
stay Python floats and cost no device synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from emmdit.flow.paths import Path, at_least_float32
from emmdit.flow.timesteps import shift_timesteps

Predict = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, int], None]

GRIDS = ("nitro", "uniform", "ddpm")


def timestep_grid(steps: int, kind: str = "nitro", shift: float = 1.0) -> Tensor:
    """The (steps + 1,) float32 timesteps of a sampling run, falling to 0.

    - "nitro": ``steps`` values from 1000 to 1, then 0, the grid of diffusers' FlowMatchEulerDiscreteScheduler
      and so of the released model. The last step is nearly a no-op (sigma 0.001 to 0): 20 steps do the work
      of 19.
    - "uniform": steps of equal length from 1000 to 0.
    - "ddpm": from 999 to 0, rounded: diffusers' "linspace" spacing, in use for PixArt. For `EpsilonDDPM`,
      whose networks know the integers 0..999 alone.

    ``shift`` moves "nitro" and "uniform" towards noise. It is applied once (diffusers shifts its lower end
    twice).
    """
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, but is {steps}.")
    if kind == "ddpm":
        if shift != 1.0:
            raise ValueError(f"The 'ddpm' grid takes no shift, but shift is {shift}: leave it at 1, or take 'uniform'.")
        if steps > 999:
            raise ValueError(f"The 'ddpm' grid has at most 999 steps, but steps is {steps}.")
        return torch.linspace(999, 0, steps + 1, dtype=torch.float64).round().float()
    if kind == "nitro":
        grid = torch.cat([torch.linspace(1000, 1, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    elif kind == "uniform":
        grid = torch.linspace(1000, 0, steps + 1, dtype=torch.float64)
    else:
        raise ValueError(f"There is no timestep grid {kind!r}: choose one of {', '.join(GRIDS)}.")
    return shift_timesteps(grid, shift).float()


def euler(predict: Predict, x: Tensor, timesteps: Tensor, path: Path, callback: Callback | None = None) -> Tensor:
    """First order: x' = alpha' x0_hat + sigma' noise_hat. Euler on a rectified flow, DDIM on a DDPM path."""
    x, t, alpha, sigma = _prepare(x, timesteps, path)
    n = len(t) - 1
    for i in range(n):
        prediction = predict(x, t[i])
        x0, noise = path.to_x0(x, prediction, t[i]), path.to_noise(x, prediction, t[i])
        x = alpha[i + 1] * x0 + sigma[i + 1] * noise
        if callback is not None:
            callback(i + 1, n)
    return x


def heun(predict: Predict, x: Tensor, timesteps: Tensor, path: Path, callback: Callback | None = None) -> Tensor:
    """Second order, 2n - 1 predictions: the Euler step's x0_hat and noise_hat averaged with those at its end.

    The trapezoidal rule in alpha for x0_hat and in sigma for noise_hat; on a rectified flow this is the usual
    mean of two velocities. The last step is Euler's, as in Karras et al. 2022 (arXiv 2206.00364).
    """
    x, t, alpha, sigma = _prepare(x, timesteps, path)
    n = len(t) - 1
    for i in range(n):
        prediction = predict(x, t[i])
        x0, noise = path.to_x0(x, prediction, t[i]), path.to_noise(x, prediction, t[i])
        ahead = alpha[i + 1] * x0 + sigma[i + 1] * noise
        if i + 1 < n:
            prediction = predict(ahead, t[i + 1])
            x0 = (x0 + path.to_x0(ahead, prediction, t[i + 1])) / 2
            noise = (noise + path.to_noise(ahead, prediction, t[i + 1])) / 2
            x = x + (alpha[i + 1] - alpha[i]) * x0 + (sigma[i + 1] - sigma[i]) * noise
        else:
            x = ahead
        if callback is not None:
            callback(i + 1, n)
    return x


def dpm_solver(predict: Predict, x: Tensor, timesteps: Tensor, path: Path, callback: Callback | None = None) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095) of diffusers: second order, one prediction a step.

    diffusers makes its own grid (it starts a flow at sigma 0.999 and cuts its timesteps to integers), so the
    scheduler is given our sigmas instead, and it counts steps without looking timesteps up. Its last step is
    first order.

    One thing is mended: where the log-SNR step more than doubles, as at the end of the "nitro" grid (sigma
    0.05 to 0.001), the method would extrapolate far beyond what it knows: on Gaussian data, 20 steps came out
    worse than Euler's. Such a step is taken at first order here. The other grids have none.
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
    log_snr = [_log(a) - _log(s) for a, s in zip(alpha, sigma, strict=True)]
    for i in range(n):
        if i > 0 and log_snr[i + 1] - log_snr[i] > 2 * (log_snr[i] - log_snr[i - 1]):
            scheduler.lower_order_nums = 0  # the scheduler's count of usable earlier predictions
        prediction = predict(x, t[i]).to(x.dtype)
        x = scheduler.step(prediction, t[i], x, return_dict=False)[0]
        if callback is not None:
            callback(i + 1, n)
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {"euler": euler, "heun": heun, "dpm_solver": dpm_solver}


@torch.no_grad()
def sample(
    predict: Predict,
    noise: Tensor,
    path: Path,
    steps: int = 20,
    sampler: str = "euler",
    grid: str = "nitro",
    shift: float = 1.0,
    callback: Callback | None = None,
) -> Tensor:
    """Data from standard normal ``noise`` (B, ...), by the names of a sampler and a grid.

    The defaults are the released model's. Without gradients; call the sampler itself to differentiate
    through it.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"There is no sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}.")
    return SAMPLERS[sampler](predict, noise, timestep_grid(steps, grid, shift), path, callback)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _prepare(x: Tensor, timesteps: Tensor, path: Path) -> tuple[Tensor, Tensor, list[float], list[float]]:
    """The state, timesteps on the CPU, and alpha and sigma at each of them, the last one clean."""
    t = torch.as_tensor(timesteps).detach().cpu().float()
    if t.ndim != 1 or len(t) < 2 or t[-1] != 0 or not (t[1:] < t[:-1]).all() or t[0] > 1000:
        raise ValueError(
            f"timesteps must be two or more falling values in one row, from at most 1000 down to 0, "
            f"but are {t.tolist()}."
        )
    alpha, sigma = path.alpha_sigma(t[:-1].double())
    return at_least_float32(x), t, [*alpha.tolist(), 1.0], [*sigma.tolist(), 0.0]
