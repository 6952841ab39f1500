"""Flow-matching training of a text-to-image denoiser on captioned images or latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emmdit.data import Batch
from emmdit.encoders import ImageCodec, TextConditioner
from emmdit.flow import LogitNormalGrid, TimestepSampler, TimestepWeight, flow_loss
from emmdit.losses import LossInputs
from emmdit.networks.flops import forward_flops
from emmdit.seeding import step_noise
from lightning_modules.denoiser_module import DenoiserFactory, DenoiserModule
from lightning_modules.parallel import attention_kernels


class TextToImage(DenoiserModule):
    """Flow matching (or epsilon prediction) of any diffusers-style denoiser, and auxiliary losses.

    Args:
        denoiser, codec, text: see `DenoiserModule`, which also takes all further arguments.
        timesteps: how timesteps are drawn, by default as in the released recipe.
        timestep_weight: of the loss at each timestep, such as `emmdit.flow.RelativeLoss`; all alike by default.
        caption_dropout: probability of training on the empty prompt.
        task_weight: of the loss against the path's own target.
    """

    def __init__(
        self,
        denoiser: DenoiserFactory,
        codec: ImageCodec,
        text: TextConditioner,
        timesteps: TimestepSampler | None = None,
        timestep_weight: TimestepWeight | None = None,
        caption_dropout: float = 0.1,
        task_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if not 0 <= caption_dropout < 1:
            raise ValueError(f"caption_dropout is a probability below 1, got {caption_dropout}.")
        super().__init__(denoiser, codec, text, **kwargs)
        self.timesteps = timesteps or LogitNormalGrid()
        self.timestep_weight = timestep_weight
        self.caption_dropout, self.task_weight = caption_dropout, task_weight
        weights = [weight for component in self.components.values() for weight in component.weights.values()]
        if task_weight < 0 or task_weight + sum(weights) == 0:
            raise ValueError(f"task_weight {task_weight} must not be negative, nor zero where no other loss counts.")
        self.flops_per_sample: int | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs = self.forward_step(batch)
        error = flow_loss(inputs.prediction, inputs.target)
        if self.timestep_weight is not None:
            inputs.weight = self.timestep_weight(self.path, inputs.t, error.detach())
        losses = {"task": (error if inputs.weight is None else error * inputs.weight).mean()}
        total = self.task_weight * losses["task"]
        for component in self.components.values():
            for name, value in component.by_name(inputs).items():
                losses[name] = value
                total = total + component.weights[name] * value
        self.samples_seen += len(inputs.x0) * self.trainer.world_size
        parts = dict(losses) if self.components else {}
        if inputs.weight is not None:  # whose curve is comparable with that of other weights
            parts["unweighted"] = error.mean()
        self.log_training({name: value.detach() for name, value in {"loss": total, **parts}.items()}, len(inputs.x0))
        return total

    def forward_step(self, batch: Batch) -> LossInputs:
        """Noise, timesteps and dropout are drawn for the global batch and cut to this rank's rows: the step is the same
        on any number of ranks."""
        x0 = self.latents(batch)
        world = self.trainer.world_size
        total = len(x0) * world
        rows = slice(self.global_rank, None, world)  # the loader assigns positions to ranks in the same strided order
        noise = step_noise(x0.shape[1:], rows, total, self.random("noise", x0.device))
        t = self.timesteps(total, self.random("timesteps"))[rows].to(x0.device)
        drop = torch.rand(total, generator=self.random("dropout"))[rows] < self.caption_dropout
        condition = self.condition(batch["caption"], drop, batch.get("condition"))

        x_t = self.path.interpolate(x0, noise, t)
        with attention_kernels(x0.device):
            output = self.denoiser(x_t, timestep=t, **condition).sample
        prediction = output[:, : x0.shape[1]].float()  # PixArt also predicts a variance, behind the prediction
        target = self.path.target(x0, noise, t)
        return LossInputs(batch, x0, noise, t, x_t, condition, target, prediction)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Count the FLOPs of a training step on one sample, for MFU: three forward passes of the denoiser alone."""
        if self.flops_per_sample is None:
            if "latents" in batch:
                shape = batch["latents"].shape[1:]
            else:
                sides = (side // self.codec.downsample for side in batch["image"].shape[2:])
                shape = (self.codec.latent_channels, *sides)
            condition = self.condition(batch["caption"][:1])
            self.flops_per_sample = 3 * forward_flops(self.denoiser_factory, (1, *shape), condition)
