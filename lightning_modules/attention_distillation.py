"""A linear attention student learns from the teacher that it was made of: EDiT, MM-EDiT, hybrid E-MMDiT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from emmdit.encoders import ImageCodec, TextConditioner
from emmdit.encoders.base import as_dtype
from emmdit.losses import FeatureDistillation, LossComponent, OutputDistillation, Teacher, TrainingStep
from emmdit.networks import attention_outputs, linearize, train_only
from emmdit.weights import check_source, load_weights
from lightning_modules.parallel import parallelise
from lightning_modules.text_to_image import DenoiserFactory, TextToImage


class AttentionDistillation(TextToImage):
    """Teacher and student on the same noised latents, timesteps and captions; three weighted losses (papers.md A7).

    The denoiser that is trained, averaged, saved, sampled and exported is the student. The teacher stays outside: in no
    checkpoint, in `teacher_dtype`, sharded as the student is. One pass of it serves all losses, and there is none where
    only the task counts.

    Args:
        denoiser: class path and arguments of the teacher; `linearize` makes the student of it.
        codec, text, path, ...: as in `TextToImage`; the teacher's own, since both see the same.
        teacher: the teacher's weights: a run folder, Lightning checkpoint, diffusers folder, hub id or Nitro-E file.
        teacher_weights: "ema" or "raw" of a checkpoint; None: the average if there is one.
        teacher_dtype: type it computes in.
        attention: fields of `emmdit.networks.AttentionChoices`, or a `baseline`; none: the paper's form.
        train: which parameters: "new" (those without a counterpart in the teacher), "attention" or "all".
        task_weight: of the loss that the teacher was trained with (noise prediction, flow).
        output_weight: of the distance between both predictions.
        feature_weight: of the distance between the outputs of all attention layers.
        relative_features: see `FeatureDistillation`.
        components: further losses.
        init_from: weights of the student (of the stage before), in place of the teacher's.
    """

    def __init__(
        self,
        denoiser: DenoiserFactory,
        codec: ImageCodec,
        text: TextConditioner,
        teacher: str,
        teacher_weights: Literal["ema", "raw"] | None = None,
        teacher_dtype: str = "bfloat16",
        attention: dict[str, Any] | None = None,
        train: Literal["new", "attention", "all"] = "attention",
        task_weight: float = 1.0,
        output_weight: float = 0.5,
        feature_weight: float = 0.5,
        relative_features: bool = True,
        components: list[LossComponent] | None = None,
        **kwargs: Any,
    ) -> None:
        if task_weight < 0 or task_weight + output_weight + feature_weight == 0:
            raise ValueError("The weights of task, output and features must not be negative, nor all be zero.")
        distillation = [OutputDistillation(output_weight), FeatureDistillation(feature_weight, relative_features)]
        distillation = [component for component in distillation if component.weight]
        self.distils, self.compares_layers = bool(distillation), bool(feature_weight)
        choices = attention or {}
        super().__init__(
            lambda: linearize(denoiser(), **choices),
            codec,
            text,
            components=[*distillation, *(components or [])],
            **kwargs,
        )
        self.teacher_factory, self.attention = denoiser, choices
        self.teacher_source, self.teacher_weights = teacher, teacher_weights
        self.teacher_dtype = as_dtype(teacher_dtype)
        self.part, self.task_weight = train, task_weight
        self.teacher: Teacher | None = None
        with torch.device("meta"):
            train_only(self.denoiser_factory(), self.part)  # raises where there is no such part

    # -- building ------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if self.denoiser is not None:
            return
        check_source(self.teacher_source)
        super().configure_model()
        if self.teacher is not None:
            parallelise(self.teacher.network, self.compile_blocks, self.device_mesh, trained=False)

    def initial_denoiser(self) -> nn.Module:
        """The teacher, linearized: all weights that have a counterpart are the teacher's, the new ones depend on the
        seed alone."""
        teacher = self.teacher_factory()
        load_weights(teacher, self.teacher_source, self.teacher_weights)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            student = linearize(copy.deepcopy(teacher) if self.distils else teacher, **self.attention)
        train_only(student, self.part)
        if self.distils:
            self.teacher = Teacher(teacher, self.teacher_dtype)
        return student

    def _move_frozen(self) -> None:
        super()._move_frozen()
        if self.teacher is not None:
            self.teacher.to(self.device)

    # -- training ------------------------------------------------------------------------------------

    def forward_step(self, batch: dict[str, Any]) -> TrainingStep:
        if not self.distils:
            return super().forward_step(batch)
        # Two thirds of a sample's memory are the outputs of the layers: kept only where a loss reads them.
        with attention_outputs(self.denoiser) if self.compares_layers else nullcontext({}) as attention:
            step = super().forward_step(batch)
        step.attention = attention
        step.teacher = self.teacher(step.x_t, step.t, step.condition, self.compares_layers)
        return step

    def networks(self) -> dict[str, Callable]:
        """Beside the student's weights, the teacher: its validation loss is the line to reach."""
        networks = super().networks()
        return networks if self.teacher is None else networks | {"teacher": self._predict_as_teacher}

    def _predict_as_teacher(self, x_t: Tensor, timestep: Tensor, **condition: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.teacher(x_t, timestep, condition, attention=False).prediction)
