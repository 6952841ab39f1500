"""The flow-matching loss and its weight by timestep; auxiliary losses (REPA, distillation) lie in `emmdit.losses`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, distributed, nn

from emmdit.flow.paths import Path


def flow_loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample, (B, ...) -> (B,), in float32; ``weight`` (B,) multiplies it."""
    if prediction.shape != target.shape:
        raise ValueError(
            f"Prediction and target must have one shape, but have {tuple(prediction.shape)} and {tuple(target.shape)}."
        )
    loss = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return loss if weight is None else loss * weight


class TimestepWeight(ABC):
    """How much the loss at a timestep counts."""

    @abstractmethod
    def __call__(self, path: Path, t: Tensor, loss: Tensor) -> Tensor:
        """Weights (B,), float32, of samples at timesteps ``t`` (B,), 0..1000, with unweighted losses ``loss`` (B,)."""


class MinSNR(TimestepWeight):
    """Weight of a timestep's loss: the error of x0 counts min(SNR, gamma) times (Hang et al. 2023, arXiv 2303.09556).

    For noise prediction that is min(SNR, gamma) / SNR: constant in the noise, falling where the signal is stronger than
    gamma. For any path, the error of the prediction is turned into that of x0 by the path itself.

    Args:
        gamma: 5 in the paper; smaller ones leave more of the training to high noise, which decides on layout.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if not 0 < gamma < math.inf:
            raise ValueError(f"gamma must be a finite number above 0, but is {gamma}.")
        self.gamma = gamma

    def __call__(self, path: Path, t: Tensor, loss: Tensor) -> Tensor:
        t = t.double()
        alpha, sigma = path.coefficients(t)
        of_x0 = path.to_x0(torch.zeros_like(t), torch.ones_like(t), t).square()
        return ((alpha / sigma).square().clamp(max=self.gamma) * of_x0).float()


class RelativeLoss(nn.Module, TimestepWeight):
    """Each timestep's loss counts in relation to what it usually is: weight 1 / (its running mean).

    The loss of a denoiser differs by orders of magnitude between timesteps, and the largest ones, near noise, can
    hardly be reduced. EDM2 (arXiv 2312.02696) learns that mean by a small network; here it is a table over equal
    intervals of t, which needs no rate. It belongs to the checkpoint; the mean of all ranks counts.

    Args:
        bins: intervals of the table.
        decay: of the running mean, at each batch that has a sample in the interval.
    """

    def __init__(self, bins: int = 20, decay: float = 0.95) -> None:
        super().__init__()
        if bins < 1 or not 0 <= decay < 1:
            raise ValueError(f"RelativeLoss needs bins >= 1 and 0 <= decay < 1, got bins {bins}, decay {decay}.")
        self.bins, self.decay = bins, decay
        self.register_buffer("mean", torch.zeros(bins))  # zero: no sample yet

    @torch.no_grad()
    def forward(self, path: Path, t: Tensor, loss: Tensor) -> Tensor:
        index = (t * (self.bins / 1000)).long().clamp(0, self.bins - 1)
        sums = torch.zeros(2, self.bins, device=loss.device)
        sums[0].index_add_(0, index, loss.float())
        sums[1].index_add_(0, index, torch.ones_like(loss, dtype=torch.float32))
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        latest = sums[0] / sums[1].clamp_min(1)
        updated = torch.where(self.mean > 0, self.decay * self.mean + (1 - self.decay) * latest, latest)
        self.mean.copy_(torch.where((sums[1] > 0) & latest.isfinite(), updated, self.mean))
        return 1 / self.mean[index].clamp_min(torch.finfo(torch.float32).tiny)
