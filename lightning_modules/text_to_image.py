"""Training a text-to-image denoiser from captions and images: binds the core to Lightning, computes nothing itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import ModelMixin
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from emmdit.encoders import ImageCodec, TextConditioner
from emmdit.flow import (
    LogitNormalGrid,
    Path,
    RectifiedFlow,
    TimestepSampler,
    TimestepWeight,
    flow_loss,
)
from emmdit.generate import Sampling, generate
from emmdit.losses import LossComponent, TrainingStep
from emmdit.networks.flops import forward_flops
from emmdit.optim import parameter_groups
from emmdit.seeding import generator, step_noise
from emmdit.types import Condition
from emmdit.weights import check_source, load_weights
from lightning_modules.parallel import attention_kernels, parallelise

DenoiserFactory = Callable[[], ModelMixin]
VALIDATION_TIMESTEPS = tuple(1000 * (k + 0.5) / 8 for k in range(8))


class TextToImage(LightningModule):
    """Flow matching (or epsilon prediction) of any diffusers-style denoiser on captioned images or latents.

    Args:
        denoiser: class path and arguments of the network; built in `configure_model`.
        codec: frozen image codec. Batches with `image` are encoded by it; it also decodes the samples.
        text: frozen text conditioner.
        optimizer, scheduler: as Lightning's CLI gives them (AdamW, none); the scheduler steps once per optimizer step.
        path: rectified flow by default.
        timesteps: how timesteps are drawn, by default as in the released recipe.
        timestep_weight: of the loss at each timestep, such as `emmdit.flow.MinSNR`; all alike by default.
        components: auxiliary losses such as `emmdit.losses.REPA`.
        caption_dropout: probability of training on the empty prompt.
        ema: keep an average of the weights (the EMA callback moves it).
        sampling: defaults for pictures made from this network; exported with it.
        seed: of noise, timesteps and dropout: pure functions of (seed, samples seen).
        init_from: weights to start from: a run folder, Lightning checkpoint, diffusers folder or Nitro-E file.
        compile: compile each block in place.
        gradient_checkpointing: recompute each block in the backward pass.
    """

    task_weight = 1.0  # of the loss against the path's own target

    def __init__(
        self,
        denoiser: DenoiserFactory,
        codec: ImageCodec,
        text: TextConditioner,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        path: Path | None = None,
        timesteps: TimestepSampler | None = None,
        timestep_weight: TimestepWeight | None = None,
        components: list[LossComponent] | None = None,
        caption_dropout: float = 0.1,
        ema: bool = True,
        sampling: Sampling | None = None,
        seed: int = 0,
        init_from: str | None = None,
        compile: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= caption_dropout < 1:
            raise ValueError(f"caption_dropout is a probability below 1, got {caption_dropout}.")
        self.denoiser_factory = denoiser
        self.codec, self.text = codec, text
        # Not as the default of the argument: a config that names another class would keep AdamW's own defaults in it.
        self.optimizer, self.scheduler = optimizer or torch.optim.AdamW, scheduler
        self.path = path or RectifiedFlow()
        self.timesteps = timesteps or LogitNormalGrid()
        self.timestep_weight = timestep_weight
        self.components = components or []
        self.caption_dropout, self.ema, self.seed = caption_dropout, ema, seed
        self.sampling = sampling or Sampling()
        self.init_from, self.compile_blocks, self.gradient_checkpointing = (
            init_from,
            compile,
            gradient_checkpointing,
        )
        self.denoiser: nn.Module | None = None
        self.ema_denoiser: nn.Module | None = None
        self.samples_seen = 0
        self.last_batch: dict[str, Any] = {}
        self.flops_per_sample: int | None = None
        with torch.device("meta"):  # contradictions show here, before a weight is allocated or a model loaded
            self.check(self.denoiser_factory())

    # -- building ------------------------------------------------------------------------------------

    def build_denoiser(self) -> nn.Module:
        """The network on the current device, its initial weights a function of the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            denoiser = self.denoiser_factory()
        self.check(denoiser)
        return denoiser

    def check(self, denoiser: nn.Module) -> None:
        """Raise a ValueError with one sentence when network, codec, text and components contradict each other."""
        config = denoiser.config
        if config.in_channels != self.codec.latent_channels:
            raise ValueError(
                f"The denoiser takes {config.in_channels} latent channels, but {type(self.codec).__name__} gives "
                f"{self.codec.latent_channels}: set in_channels and out_channels to {self.codec.latent_channels}."
            )
        if (config.out_channels or config.in_channels) < self.codec.latent_channels:  # more: a predicted variance
            raise ValueError(
                f"The denoiser predicts {config.out_channels} channels of the {self.codec.latent_channels} that "
                f"{type(self.codec).__name__} has: set out_channels to {self.codec.latent_channels}."
            )
        width = getattr(config, "caption_channels", None) or getattr(config, "joint_attention_dim", None)
        if width is not None and width != self.text.caption_channels:
            raise ValueError(
                f"The denoiser takes text features of width {width}, but {type(self.text).__name__} gives "
                f"{self.text.caption_channels}: make them equal."
            )
        if hasattr(denoiser, "check_sizes"):
            denoiser.check_sizes(config.sample_size, config.sample_size, self.text.max_length)
        for component in self.components:
            component.check(denoiser)
        wanted = {key for component in self.components for key in component.network_kwargs}
        if getattr(denoiser, "repa_projector", None) is not None and "return_repa" not in wanted:
            raise ValueError(
                "The denoiser has a REPA projector that no loss trains: add emmdit.losses.REPA to the components or "
                "set repa_feature_dim to null."
            )

    def configure_model(self) -> None:
        if self.denoiser is not None:  # Lightning calls this hook more than once
            return
        if self.init_from is not None:
            check_source(self.init_from)
        self.denoiser = self.initial_denoiser()
        if self.init_from is not None:
            load_weights(self.denoiser, self.init_from)
        if self.ema:
            self.ema_denoiser = copy.deepcopy(self.denoiser).requires_grad_(False).eval()
        if self.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        for network in filter(None, (self.denoiser, self.ema_denoiser)):
            parallelise(network, self.compile_blocks, self.device_mesh, trained=network is self.denoiser)

    def initial_denoiser(self) -> nn.Module:
        """What training starts from, where `init_from` names nothing else."""
        return self.build_denoiser()

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(parameter_groups(self.denoiser))
        if self.scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"},
        }

    def on_fit_start(self) -> None:
        self._move_frozen()

    def on_validation_start(self) -> None:
        self._move_frozen()

    def _move_frozen(self) -> None:
        self.codec.to(self.device)
        self.text.to(self.device)
        for component in self.components:
            component.to(self.device)

    # -- training ------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        step = self.forward_step(batch)
        task = flow_loss(step.prediction, step.target, step.weight).mean()
        losses = {"task": task.detach()} if self.components else {}
        loss = self.task_weight * task
        for component in self.components:
            value = component(step)
            losses[component.name] = value.detach()
            loss = loss + component.weight * value
        self.last_batch = batch
        self.samples_seen += len(step.x0) * self.trainer.world_size
        self._log_training({"loss": loss.detach(), **losses}, len(step.x0))
        return loss

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count the FLOPs of a training step on one sample, for MFU: three forward passes of the denoiser alone."""
        if self.flops_per_sample is None:
            if "latents" in batch:
                shape = batch["latents"].shape[1:]
            else:
                shape = (
                    self.codec.latent_channels,
                    *(n // self.codec.downsample for n in batch["image"].shape[2:]),
                )
            condition = self.condition(batch["caption"][:1])
            self.flops_per_sample = 3 * forward_flops(self.denoiser_factory, (1, *shape), condition)

    def _log_training(self, values: dict[str, Tensor], batch_size: int) -> None:
        """Means over all ranks, in one small collective, and only at steps that are logged."""
        if self.trainer._logger_connector.should_update_logs:
            means = self.trainer.strategy.reduce(torch.stack(list(values.values())), reduce_op="mean")
            self.log_dict(
                {f"train/{name}": mean for name, mean in zip(values, means, strict=True)},
                batch_size=batch_size,
            )

    def forward_step(self, batch: dict[str, Any]) -> TrainingStep:
        """Noise, timesteps and dropout are drawn for the global batch and cut to this rank's rows (DESIGN 4.5)."""
        x0 = self.latents(batch)
        world = self.trainer.world_size
        total = len(x0) * world
        rows = slice(self.global_rank, None, world)  # the loader deals positions out in the same way
        noise = step_noise(x0.shape[1:], rows, total, self.random("noise", x0.device))
        t = self.timesteps(total, self.random("timesteps"))[rows].to(x0.device)
        drop = torch.rand(total, generator=self.random("dropout"))[rows] < self.caption_dropout
        condition = self.condition(batch["caption"], drop, batch.get("condition"))

        x_t = self.path.interpolate(x0, noise, t)
        extra = {key: value for component in self.components for key, value in component.network_kwargs.items()}
        with attention_kernels(x0.device):
            output = self.denoiser(x_t, timestep=t, **condition, **extra)
        # Networks that also predict a variance (PixArt) put it behind the prediction.
        prediction = output.sample[:, : x0.shape[1]].float()
        target = self.path.target(x0, noise, t)
        weight = None if self.timestep_weight is None else self.timestep_weight(self.path, t)
        return TrainingStep(batch, x0, noise, t, x_t, condition, target, prediction, output, weight)

    def random(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        return generator(self.seed, purpose, self.samples_seen, device)

    def latents(self, batch: dict[str, Any]) -> Tensor:
        return batch["latents"].float() if "latents" in batch else self.codec.encode(batch["image"])

    def condition(self, captions: list[str], drop: Tensor | None = None, stored: Condition | None = None) -> Condition:
        """Text conditions in the network's precision; rows marked in `drop (B,)`, on the CPU, get the empty prompt.

        `stored` conditions of the captions, precomputed, spare running the text encoder.
        """
        condition = self.text(captions) if stored is None else stored
        if drop is not None and drop.any():
            null = self.text.null(len(captions))
            condition = {
                key: torch.where(drop.view(-1, *[1] * (value.ndim - 1)).to(value.device), null[key], value)
                for key, value in condition.items()
            }
        return {
            key: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for key, value in condition.items()
        }

    # -- validation ----------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss at eight fixed timesteps with a noise that belongs to the sample, on both sets of weights."""
        x0 = self.latents(batch)
        condition = self.condition(batch["caption"], stored=batch.get("condition"))
        noise = torch.stack(
            [
                torch.randn(x0.shape[1:], generator=generator(self.seed, "validation", int(sample_id)))
                for sample_id in batch["sample_id"]
            ]
        ).to(x0.device)
        for name, network in self.networks().items():
            losses = []
            for timestep in VALIDATION_TIMESTEPS:
                t = torch.full((len(x0),), timestep, device=x0.device)
                output = network(self.path.interpolate(x0, noise, t), timestep=t, **condition)
                loss = flow_loss(output.sample[:, : x0.shape[1]].float(), self.path.target(x0, noise, t)).mean()
                losses.append(loss)
                self._log_validation(f"val/{name}_t{timestep:03.0f}", loss, len(x0))
            self._log_validation(f"val/loss_{name}", torch.stack(losses).mean(), len(x0))

    def _log_validation(self, name: str, value: Tensor, batch_size: int) -> None:
        self.log(name, value, batch_size=batch_size, sync_dist=True, on_epoch=True, on_step=False)

    def networks(self) -> dict[str, Callable]:
        """All that validation compares, by name."""
        networks = {"raw": self.denoiser, "ema": self.ema_denoiser}
        return {name: network for name, network in networks.items() if network is not None}

    # -- sampling ------------------------------------------------------------------------------------

    def network(self, weights: str | None = None) -> nn.Module:
        """`ema` or `raw` weights; None: the average if there is one."""
        if weights is None:
            return self.denoiser if self.ema_denoiser is None else self.ema_denoiser
        if weights not in ("ema", "raw") or (weights == "ema" and self.ema_denoiser is None):
            raise ValueError(f"This run has no {weights!r} weights: ask for ema (if it keeps an average) or raw.")
        return self.ema_denoiser if weights == "ema" else self.denoiser

    @torch.no_grad()
    def sample(self, prompts: list[str], seeds: list[int], weights: str | None = None, **settings: Any) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1]. Every rank must call it, with equally many prompts."""
        network = self.network(weights)
        training = network.training
        network.eval()
        try:
            return generate(
                network,
                self.codec,
                self.text,
                prompts,
                seeds,
                path=self.path,
                sampling=self.sampling.replace(**settings),
                device=self.device,
            )
        finally:
            network.train(training)

    # -- checkpoints ---------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["samples_seen"] = self.samples_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.samples_seen = checkpoint["samples_seen"]
