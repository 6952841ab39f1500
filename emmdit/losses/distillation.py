"""Distillation of attention (EDiT / MM-EDiT, arXiv 2503.16726; papers.md A7): match the teacher's prediction, and what
its attention layers give out."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from emmdit.encoders.base import as_dtype, frozen
from emmdit.flow import flow_loss
from emmdit.losses.base import LossComponent, TrainingStep
from emmdit.networks import attention_layers, attention_outputs
from emmdit.types import Condition


@dataclass
class TeacherOutput:
    """`prediction` (B, C, H, W) float32; `attention`: name of the layer -> its outputs (B, tokens, width)."""

    prediction: Tensor
    attention: dict[str, tuple[Tensor, ...]]


class Teacher:
    """A frozen network, in a type of its own whatever the trainer's precision. One pass gives all that is compared.

    Not an nn.Module: so it is in no state dict, optimizer or average of the module that holds it.
    """

    def __init__(self, network: nn.Module, dtype: str | torch.dtype = "bfloat16") -> None:
        self.dtype = as_dtype(dtype)
        self.network = network.to(self.dtype).requires_grad_(False).eval()

    def to(self, device: torch.device) -> Self:
        if next(self.network.parameters()).device.type != device.type:  # shards lie where they belong already
            self.network.to(device)
        return self

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition, attention: bool = True) -> TeacherOutput:
        """x_t (B, C, H, W), t (B,) on the 0..1000 scale; `attention`: keep its layers' outputs, too."""
        condition = {
            key: value.to(self.dtype) if value.is_floating_point() else value for key, value in condition.items()
        }
        outputs = attention_outputs(self.network) if attention else nullcontext({})
        with frozen(x_t.device), outputs as kept:
            prediction = self.network(x_t.to(self.dtype), timestep=t, **condition).sample
        return TeacherOutput(prediction[:, : x_t.shape[1]].float(), kept)


class OutputDistillation(LossComponent):
    """Mean squared distance between the student's and the teacher's prediction, weighted by timestep as the task is."""

    name = "output"

    def __call__(self, step: TrainingStep) -> Tensor:
        return flow_loss(step.prediction, step.teacher.prediction, step.weight).mean()


class FeatureDistillation(LossComponent):
    """Distance between the outputs of the attention layers of student and teacher: the mean over all layers, and over
    image and prompt in joint attention.

    Args:
        weight: 0.5 in LinFusion's recipe, the nearest one that is documented.
        relative: a layer's squared distance is divided by the teacher's mean square in the sample, so that layers of
            any scale count alike and one weight fits any network [ours: the paper's form is not known, LinFusion's is
            plain].
    """

    name = "features"

    def __init__(self, weight: float = 0.5, relative: bool = True) -> None:
        super().__init__(weight)
        self.relative = relative

    def __call__(self, step: TrainingStep) -> Tensor:
        pairs = (
            pair
            for name, wanted in step.teacher.attention.items()
            for pair in zip(step.attention[name], wanted, strict=True)
        )
        return torch.stack([self.distance(own, wanted) for own, wanted in pairs]).mean()

    def distance(self, own: Tensor, wanted: Tensor) -> Tensor:
        """Mean over samples, each by itself, so that it is the same however a batch is split over ranks."""
        wanted = wanted.float()
        distance = (own.float() - wanted).square().mean(dim=(1, 2))
        return (distance / wanted.square().mean(dim=(1, 2)).clamp_min(1e-12) if self.relative else distance).mean()

    def check(self, denoiser: nn.Module) -> None:
        attention_layers(denoiser)
