"""Distillation of a linear attention student from its teacher: EDiT, MM-EDiT, hybrid E-MMDiT."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from emmdit.encoders import ImageCodec, TextConditioner
from emmdit.losses import LossComponent, TeacherDistillation
from emmdit.networks import linearize, train_only
from emmdit.weights import check_source, load_weights
from lightning_modules.denoiser_module import DenoiserFactory
from lightning_modules.text_to_image import TextToImage


class AttentionDistillation(TextToImage):
    """`TextToImage` of the student that `linearize` makes of a teacher, with the loss component that owns the teacher.

    The denoiser that is trained, averaged, saved, sampled and exported is the student; it starts from the teacher's
    weights. Where output_weight and feature_weight are zero there is no teacher beside it.

    Args:
        denoiser: class path and arguments of the teacher.
        codec, text: the teacher's own, since both see the same; further arguments as for `TextToImage`.
        teacher: the teacher's weights: a run folder, Lightning checkpoint, diffusers folder, hub id or Nitro-E file.
        attention: choices of `linearize`; none: the paper's form.
        train: which parameters: "new" (those without a counterpart in the teacher), "attention" or "all".
        teacher_weights, teacher_dtype, output_weight, feature_weight, relative_features: see
            `emmdit.losses.TeacherDistillation`.
        components: further losses.
    """

    def __init__(
        self,
        denoiser: DenoiserFactory,
        codec: ImageCodec,
        text: TextConditioner,
        teacher: str,
        attention: dict[str, Any] | None = None,
        train: Literal["new", "attention", "all"] = "attention",
        teacher_weights: Literal["ema", "raw"] | None = None,
        teacher_dtype: str = "bfloat16",
        output_weight: float = 0.5,
        feature_weight: float = 0.5,
        relative_features: bool = True,
        components: list[LossComponent] | None = None,
        **kwargs: Any,
    ) -> None:
        self.teacher_source, self.teacher_weights = teacher, teacher_weights
        components = list(components or [])
        if output_weight or feature_weight:
            components.append(
                TeacherDistillation(
                    teacher, teacher_weights, teacher_dtype, output_weight, feature_weight, relative_features
                )
            )
        self.teacher_factory, self.attention, self.part = denoiser, attention or {}, train
        super().__init__(lambda: linearize(denoiser(), **self.attention), codec, text, components=components, **kwargs)
        with torch.device("meta"):
            train_only(self.denoiser_factory(), train)  # raises where there is no such part

    def configure_model(self) -> None:
        if self.denoiser is None:
            check_source(self.teacher_source)
        super().configure_model()

    def initial_denoiser(self) -> nn.Module:
        """The teacher, linearized: weights with a counterpart are the teacher's, new ones depend on the seed alone."""
        teacher = self.teacher_factory()
        load_weights(teacher, self.teacher_source, self.teacher_weights)
        return self.seeded(lambda: linearize(teacher, **self.attention))

    def freeze(self, denoiser: nn.Module) -> None:
        train_only(denoiser, self.part)
