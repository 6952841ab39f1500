"""Interface of auxiliary losses: components of a training step, chosen by configuration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emmdit.data import Batch
from emmdit.types import Condition


@dataclass
class LossInputs:
    """What a training step has computed when the losses are called.

    Shapes: `x0`, `noise`, `x_t`, `target`, `prediction` (B, C, H, W); `t` (B,) on the 0..1000 scale; `weight` (B,), of
    each sample's timestep, where timesteps are weighted.
    """

    batch: Batch
    x0: Tensor
    noise: Tensor
    t: Tensor
    x_t: Tensor
    condition: Condition
    target: Tensor
    prediction: Tensor
    weight: Tensor | None = None


class LossComponent(nn.Module, ABC):
    """One or several weighted terms of the training loss, with a life of their own.

    1. `check(denoiser)`: on the meta device, before anything is allocated.
    2. `attach(denoiser)`: once, before compilation and sharding: install hooks, build trainable modules (ordinary
       submodules: optimized, sharded and saved under `components.<name>`, left out of exports), load a teacher.
    3. The call: `LossInputs` -> a scalar, or several by name. Each gives a curve `train/<name>`.

    What is frozen (a teacher, a vision encoder) is not a submodule, so that no checkpoint holds it; `move` brings it to
    the device of training.
    """

    name: str
    weights: Mapping[str, float]
    """Weight of each loss in the sum, by the names that the call gives; a scalar has the component's own name."""

    def __init__(self, **weights: float) -> None:
        super().__init__()
        for key, weight in weights.items():
            if not weight >= 0:
                raise ValueError(f"The weight {key} of {type(self).__name__} must not be negative, got {weight}.")
        self.weights = weights

    def check(self, denoiser: nn.Module) -> None:  # noqa: B027 - nothing to check is fine
        """Raise a ValueError with one sentence when this network cannot serve the component."""

    def attach(self, denoiser: nn.Module) -> None:  # noqa: B027
        """Install hooks in the network, build trainable modules, load frozen ones."""

    @abstractmethod
    def forward(self, inputs: LossInputs) -> Tensor | dict[str, Tensor]:
        """The unweighted losses, scalars."""

    def by_name(self, inputs: LossInputs) -> dict[str, Tensor]:
        """The same, always as {name: scalar}."""
        value = self(inputs)
        return value if isinstance(value, dict) else {self.name: value}

    def frozen_networks(self) -> list[nn.Module]:
        """Frozen networks to compile and shard as the denoiser is."""
        return []

    def references(self) -> dict[str, Callable[..., Any]]:
        """Predictors, called like the denoiser, whose validation loss stands beside the trained network's."""
        return {}

    def move(self, device: torch.device) -> None:  # noqa: B027
        """Move frozen parts to the device of training."""
