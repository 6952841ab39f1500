"""Distillation of a linear attention student from its teacher (arXiv 2503.16726; docs/papers.md, A7)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from emmdit.encoders.base import as_dtype, frozen
from emmdit.flow import flow_loss
from emmdit.losses.base import LossComponent, LossInputs
from emmdit.networks import attention_layers, teacher_of
from emmdit.networks.hooks import OutputRecorder
from emmdit.types import Condition
from emmdit.weights import check_source, load_weights


class TeacherDistillation(LossComponent):
    """Match the teacher's prediction (`output`) and the outputs of its attention layers (`features`).

    The teacher is the network that the student was made of, loaded once more: in no checkpoint, in a type of its own
    whatever the trainer's precision, sharded as the student is. One pass of it, on the same noised latents, timesteps
    and captions, serves both losses.

    Args:
        teacher: its weights: a run folder, Lightning checkpoint, diffusers folder, hub id or Nitro-E file.
        teacher_weights: "ema" or "raw" of a checkpoint; None: EMA if available.
        dtype: type the teacher computes in.
        output_weight: of the mean squared distance between both predictions, weighted by timestep as the task is.
        feature_weight: of the distance between the outputs of the attention layers, averaged over layers and, in joint
            attention, over image and prompt. 0.5 in LinFusion's recipe, the nearest one that is documented.
        relative_features: divide a layer's squared distance by the teacher's mean square in the sample, so that layers
            of any scale count alike and one weight fits any network [ours: the paper's form is not known, LinFusion's
            is plain].
    """

    name = "distillation"

    def __init__(
        self,
        teacher: str,
        teacher_weights: Literal["ema", "raw"] | None = None,
        dtype: str = "bfloat16",
        output_weight: float = 0.5,
        feature_weight: float = 0.5,
        relative_features: bool = True,
    ) -> None:
        super().__init__(output=output_weight, features=feature_weight)
        if not output_weight + feature_weight:
            raise ValueError("output_weight and feature_weight are both zero: leave the distillation out.")
        self.source, self.source_weights, self.dtype = teacher, teacher_weights, as_dtype(dtype)
        self.relative = relative_features

    def check(self, denoiser: nn.Module) -> None:
        attention_layers(denoiser)

    def attach(self, denoiser: nn.Module) -> None:
        check_source(self.source)
        network = teacher_of(denoiser)
        load_weights(network, self.source, self.source_weights)
        network.to(self.dtype).requires_grad_(False).eval()
        self.teacher = SimpleNamespace(network=network)  # out of reach of nn.Module: neither saved nor optimized
        # Layer outputs are two thirds of a sample's memory: kept only where a loss reads them.
        self.student_layers = self.teacher_layers = None
        if self.weights["features"]:
            self.student_layers = OutputRecorder(attention_layers(denoiser))
            self.teacher_layers = OutputRecorder(attention_layers(network), when="always")

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        prediction = self.predict(inputs.x_t, inputs.t, inputs.condition)
        losses = {"output": flow_loss(inputs.prediction, prediction, inputs.weight).mean()}
        if self.student_layers is not None:
            losses["features"] = feature_distance(self.student_layers.take(), self.teacher_layers.take(), self.relative)
        return {name: loss for name, loss in losses.items() if self.weights[name]}

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The teacher's prediction (B, C, H, W), float32; x_t (B, C, H, W), t (B,) on the 0..1000 scale."""
        condition = {
            key: value.to(self.dtype) if value.is_floating_point() else value for key, value in condition.items()
        }
        with frozen(x_t.device):
            prediction = self.teacher.network(x_t.to(self.dtype), timestep=t, **condition).sample
        return prediction[:, : x_t.shape[1]].float()

    def frozen_networks(self) -> list[nn.Module]:
        return [self.teacher.network]

    def references(self) -> dict[str, Callable[..., Any]]:
        def teacher(x_t: Tensor, timestep: Tensor, **condition: Tensor) -> SimpleNamespace:
            prediction = self.predict(x_t, timestep, condition)
            if self.teacher_layers is not None:
                self.teacher_layers.take()
            return SimpleNamespace(sample=prediction)

        return {"teacher": teacher}

    def move(self, device: torch.device) -> None:
        network = self.teacher.network
        if next(network.parameters()).device.type != device.type:  # shards lie where they belong already
            network.to(device)


def feature_distance(
    student: dict[str, tuple[Tensor, ...]], teacher: dict[str, tuple[Tensor, ...]], relative: bool = True
) -> Tensor:
    """Mean over layers of the squared distance between their outputs (B, tokens, width); see `TeacherDistillation`.

    A mean over samples, each by itself, so that it is the same however a batch is split over ranks.
    """
    distances = []
    for name, targets in teacher.items():
        for output, target in zip(student[name], targets, strict=True):
            target = target.float()
            distance = (output.float() - target).square().mean(dim=(1, 2))
            if relative:
                distance = distance / target.square().mean(dim=(1, 2)).clamp_min(1e-12)
            distances.append(distance.mean())
    return torch.stack(distances).mean()
