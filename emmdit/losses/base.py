"""What an auxiliary loss sees and gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from emmdit.types import Condition

if TYPE_CHECKING:
    from emmdit.losses.distillation import TeacherOutput


@dataclass
class TrainingStep:
    """Everything one training step has computed.

    Shapes: `x0`, `noise`, `x_t`, `target`, `prediction` (B, C, H, W); `t` (B,) on the 0..1000 scale.
    `output` is the network's whole output object, `weight` (B,) that of each sample's timestep, where they differ.
    In a distillation there are also the outputs of the network's `attention` layers, (B, tokens, width) by name, and
    the same of the `teacher`.
    """

    batch: dict[str, Any]
    x0: Tensor
    noise: Tensor
    t: Tensor
    x_t: Tensor
    condition: Condition
    target: Tensor
    prediction: Tensor
    output: Any
    weight: Tensor | None = None
    attention: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    teacher: TeacherOutput | None = None


class LossComponent(ABC):
    """A weighted term of the training loss, and its curve `train/<name>`.

    `network_kwargs` are passed to the denoiser in the training step (say, to return features).
    """

    name: str = "component"
    network_kwargs: dict[str, Any] = {}

    def __init__(self, weight: float) -> None:
        if weight < 0:
            raise ValueError(f"The weight of {type(self).__name__} must not be negative, got {weight}.")
        self.weight = weight

    @abstractmethod
    def __call__(self, step: TrainingStep) -> Tensor:
        """The unweighted loss, a scalar."""

    def check(self, denoiser: nn.Module) -> None:
        """Raise a ValueError when this network can not serve the component. Called before training."""
        return None

    def to(self, device: torch.device) -> None:
        """Move frozen parts to the device of training."""
        return None
