"""The flow-matching loss and its weight by timestep; auxiliary losses (REPA, distillation) lie in `emmdit.losses`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

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
    def __call__(self, path: Path, t: Tensor) -> Tensor:
        """``t`` (B,) on the 0..1000 scale -> weights (B,), float32, on the device of ``t``."""


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

    def __call__(self, path: Path, t: Tensor) -> Tensor:
        t = t.double()
        alpha, sigma = path.coefficients(t)
        of_x0 = path.to_x0(torch.zeros_like(t), torch.ones_like(t), t).square()
        return ((alpha / sigma).square().clamp(max=self.gamma) * of_x0).float()
