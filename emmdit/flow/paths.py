"""Paths from data to noise, x_t = alpha(t) x0 + sigma(t) noise, and what the network predicts on them.

``t`` is on the 0..1000 scale, a number or of shape () or (B,); ``x0``, ``noise``, ``x_t`` and ``prediction`` have the
batch first. All results are float32 at least, also when the network answers in bfloat16.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor


class Path(ABC):
    """A Gaussian path and its prediction target. A new one fills in the five methods below."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) with the shape of the floating-point ``t``."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict at x_t."""

    @abstractmethod
    def to_x0(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The data that the prediction implies."""

    @abstractmethod
    def to_noise(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The noise that the prediction implies."""

    @abstractmethod
    def diffusers_config(self) -> dict:
        """The keyword arguments that describe this path to a diffusers scheduler."""

    def alpha_sigma(self, t: Tensor, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), float32 at least, shaped like ``t``, or to broadcast against ``like`` (B, ...)."""
        t = at_least_float32(torch.as_tensor(t))
        if like is not None:
            if t.ndim > 1 or (t.ndim == 1 and t.shape[0] not in (1, like.shape[0])):
                raise ValueError(
                    f"t must be a scalar or hold one timestep for each of the {like.shape[0]} samples, "
                    f"but its shape is {tuple(t.shape)}."
                )
            if t.ndim == 1:
                t = t.to(like.device).reshape(-1, *[1] * (like.ndim - 1))
            elif t.device.type != "cpu":  # a CPU scalar mixes with any device as it is
                t = t.to(like.device)
        return self.coefficients(t)

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma noise."""
        alpha, sigma = self.alpha_sigma(t, like=x0)
        return alpha * at_least_float32(x0) + sigma * at_least_float32(noise)


class RectifiedFlow(Path):
    """Straight path: x_t = (1 - s) x0 + s noise, s = t / 1000.

    >>> path = RectifiedFlow()
    >>> x_t = path.interpolate(x0, noise, t)
    >>> loss = flow_loss(network(x_t, t, **condition).sample, path.target(x0, noise, t))

    Args:
        prediction: "velocity", noise - x0, as released; no conversion divides, so all hold at both ends. "x0": the
            data, which have fewer degrees of freedom than noise (Li and He 2025, arXiv 2511.13720); the noise that
            they imply is known above s = 0 only.
    """

    def __init__(self, prediction: Literal["velocity", "x0"] = "velocity") -> None:
        if prediction not in ("velocity", "x0"):
            raise ValueError(f"prediction must be 'velocity' or 'x0', but is {prediction!r}.")
        self.prediction = prediction

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t / 1000
        return 1 - sigma, sigma

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        x0 = at_least_float32(x0)
        return x0 if self.prediction == "x0" else at_least_float32(noise) - x0

    def to_x0(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        prediction = at_least_float32(prediction)
        if self.prediction == "x0":
            return prediction
        _, sigma = self.alpha_sigma(t, like=x_t)
        return at_least_float32(x_t) - sigma * prediction

    def to_noise(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(t, like=x_t)
        if self.prediction == "x0":
            return (at_least_float32(x_t) - alpha * at_least_float32(prediction)) / sigma
        return at_least_float32(x_t) + alpha * at_least_float32(prediction)

    def diffusers_config(self) -> dict:
        kind = {"velocity": "flow_prediction", "x0": "sample"}[self.prediction]
        return {"use_flow_sigmas": True, "prediction_type": kind}


class EpsilonDDPM(Path):
    """The DDPM path: x_t = sqrt(abar) x0 + sqrt(1 - abar) noise. The network predicts the noise.

    The defaults are PixArt's (linear betas 0.0001..0.02, 1000 steps). With 1000 steps ``t`` is the integer
    0..999 that the network was trained on, the index of diffusers' ``alphas_cumprod``; with N steps the index
    is t N / 1000. Between two integers log(abar) is interpolated linearly; beyond the last index its value
    holds, so 1000 reads as 999. t = 0 is the first noise level of training (sigma 0.01), not clean data:
    samplers end on clean data by themselves.

    Args:
        num_train_timesteps: length of the beta table.
        beta_start, beta_end: first and last beta, both inside (0, 1).
        beta_schedule: "linear" in beta, or "scaled_linear", linear in sqrt(beta) (Stable Diffusion's).
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
    ) -> None:
        if num_train_timesteps < 2:
            raise ValueError(f"num_train_timesteps must be 2 or more, but is {num_train_timesteps}.")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(
                f"beta_start and beta_end must satisfy 0 < beta_start <= beta_end < 1, "
                f"but are {beta_start} and {beta_end}."
            )
        if beta_schedule not in ("linear", "scaled_linear"):
            raise ValueError(f"beta_schedule must be 'linear' or 'scaled_linear', but is {beta_schedule!r}.")
        self.num_train_timesteps = num_train_timesteps
        self.beta_start = beta_start
        self.beta_end = beta_end
        self.beta_schedule = beta_schedule
        power = 1.0 if beta_schedule == "linear" else 0.5
        ends = beta_start**power, beta_end**power
        betas = torch.linspace(*ends, num_train_timesteps, dtype=torch.float64) ** (1 / power)
        # The logarithm, because near data 1 - abar loses its digits in float32 and expm1(log abar) does not.
        self._log_abar = torch.log1p(-betas).cumsum(0)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        last = self.num_train_timesteps - 1
        index = (t * (self.num_train_timesteps / 1000)).clamp(0, last)
        below = index.floor().clamp(max=last - 1)
        table = self._log_abar.to(t.dtype).to(t.device)
        log_abar = torch.lerp(table[below.long()], table[below.long() + 1], index - below)
        return torch.exp(log_abar / 2), torch.sqrt(-torch.expm1(log_abar))

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return at_least_float32(noise)

    def to_x0(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        # alpha never is zero, but with the default betas it falls to 0.0064: errors grow by its inverse.
        alpha, sigma = self.alpha_sigma(t, like=x_t)
        return (at_least_float32(x_t) - sigma * at_least_float32(prediction)) / alpha

    def to_noise(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        return at_least_float32(prediction)

    def diffusers_config(self) -> dict:
        return {
            "num_train_timesteps": self.num_train_timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": self.beta_schedule,
            "prediction_type": "epsilon",
        }


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()
