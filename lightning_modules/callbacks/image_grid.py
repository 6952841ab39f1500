"""Sample grids during training, from fixed prompts and seeds: a PNG in the run folder and in the tracker."""

from __future__ import annotations

import math
import os
from pathlib import Path

from jsonargparse.typing import register_type
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from emmdit.files import grid, save_png
from lightning_modules.callbacks.throughput import Throughput


class PromptList(list):
    """Prompts, given as a list or as the path of a text file with one prompt a line.

    A path in a YAML file is relative to that file. It is read when the YAML is parsed, so that the saved configuration
    of a run holds the prompts themselves.
    """

    def __init__(self, prompts: list[str] | str | os.PathLike[str]) -> None:
        if isinstance(prompts, str | os.PathLike):
            if not Path(prompts).is_file():
                raise ValueError(
                    f"There is no prompt file {prompts}: give the path of a text file, or a list of prompts."
                )
            lines = Path(prompts).read_text(encoding="utf-8").splitlines()
            prompts = [line.strip() for line in lines if line.strip()]
        super().__init__(prompts)


register_type(PromptList, serializer=list)


class ImageGrid(Callback):
    """Samples `prompts` every `every_n_steps` training steps and when training ends.

    The work is shared over ranks; each makes the same number of forward passes (the list is padded). Image i always has
    seed `seed + i`, so grids of a run, and of different runs, can be laid side by side.

    Args:
        prompts: a list, or a text file with one prompt a line; None turns the callback off.
        every_n_steps: 0: only at the end.
        columns: of the grid.
        weights: which of "ema" and "raw" to show; None: EMA if available. Several give one file each.
        steps, guidance: in place of the model's own sampling settings.
        scale: integer factor by which the grid is enlarged, for small images.
    """

    def __init__(
        self,
        prompts: PromptList | None = None,
        every_n_steps: int = 1000,
        columns: int = 4,
        weights: list[str] | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        scale: int = 1,
    ) -> None:
        self.prompts = None if prompts is None else PromptList(prompts)
        self.every_n_steps, self.columns = every_n_steps, columns
        self.weights, self.seed, self.scale = weights or [None], seed, scale
        self.settings = {k: v for k, v in (("steps", steps), ("guidance", guidance)) if v is not None}
        self._last = -1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args) -> None:
        step = pl_module.training_steps
        if self.every_n_steps and step % self.every_n_steps == 0:
            self.save_grid(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save_grid(trainer, pl_module)

    def save_grid(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = pl_module.training_steps
        if not self.prompts or step == self._last:
            return
        self._last = step
        Throughput.exclude(trainer)
        for weights in self.weights:
            images = self.sample(trainer, pl_module, weights)
            if trainer.is_global_zero:
                name = f"step_{step:07d}" + (f"_{weights}" if weights else "")
                path = Path(trainer.default_root_dir, "samples", f"{name}.png")
                image = grid(images, self.columns, self.scale)
                settings = {"step": step, "seed": self.seed, "prompts": self.prompts, "weights": weights or "default"}
                save_png(image, path, settings)
                for logger in trainer.loggers:
                    if hasattr(logger, "log_image"):
                        logger.log_image(f"samples_{weights}" if weights else "samples", image, step)

    def sample(self, trainer: Trainer, pl_module: LightningModule, weights: str | None) -> Tensor:
        """All images, on every rank."""
        world, rank = trainer.world_size, trainer.global_rank
        share = math.ceil(len(self.prompts) / world)
        numbers = [min(i, len(self.prompts) - 1) for i in range(rank * share, (rank + 1) * share)]
        with trainer.precision_plugin.forward_context():
            images = pl_module.sample(
                [self.prompts[i] for i in numbers], [self.seed + i for i in numbers], weights=weights, **self.settings
            )
        images = images.float().contiguous()
        if world > 1:
            images = pl_module.all_gather(images).flatten(0, 1)
        return images[: len(self.prompts)].cpu()
