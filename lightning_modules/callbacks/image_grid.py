"""Pictures of fixed prompts and seeds during training: one PNG a time, in the run folder and in the tracker."""

from __future__ import annotations

import math
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from emmdit.files import grid, save_png
from lightning_modules.callbacks.throughput import Throughput


class ImageGrid(Callback):
    """Samples `prompts` every `every_n_steps` optimizer steps and when training ends.

    The work is shared over ranks; each makes the same number of forward passes (the list is padded). Picture i has
    seed `seed + i` for good, so grids of a run, and of different runs, can be laid side by side.

    Args:
        prompts: None turns the callback off.
        every_n_steps: 0: only at the end.
        columns: of the grid.
        weights: which of "ema" and "raw" to show; None: the average if there is one. Several give one file each.
        steps, guidance: in place of the model's own sampling settings.
        scale: enlargement of each pixel, for small pictures.
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        every_n_steps: int = 1000,
        columns: int = 4,
        weights: list[str] | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        scale: int = 1,
    ) -> None:
        self.prompts, self.every_n_steps, self.columns = prompts, every_n_steps, columns
        self.weights, self.seed, self.scale = weights or [None], seed, scale
        self.settings = {k: v for k, v in (("steps", steps), ("guidance", guidance)) if v is not None}
        self._last = -1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args) -> None:
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0:
            self.draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.draw(trainer, pl_module)

    def draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if not self.prompts or step == self._last:
            return
        self._last = step
        Throughput.exclude(trainer)
        for weights in self.weights:
            images = self.sample(trainer, pl_module, weights)
            if trainer.is_global_zero:
                name = f"step_{step:07d}" + (f"_{weights}" if weights else "")
                path = Path(trainer.default_root_dir, "samples", f"{name}.png")
                picture = grid(images, self.columns, self.scale)
                settings = {
                    "step": step,
                    "seed": self.seed,
                    "prompts": self.prompts,
                    "weights": weights or "default",
                }
                save_png(picture, path, settings)
                log_image(trainer, picture, key=f"samples_{weights}" if weights else "samples", step=step)

    def sample(self, trainer: Trainer, pl_module: LightningModule, weights: str | None) -> Tensor:
        """All pictures, on every rank."""
        world, rank = trainer.world_size, trainer.global_rank
        share = math.ceil(len(self.prompts) / world)
        numbers = [min(i, len(self.prompts) - 1) for i in range(rank * share, (rank + 1) * share)]
        with trainer.precision_plugin.forward_context():
            images = pl_module.sample(
                [self.prompts[i] for i in numbers],
                [self.seed + i for i in numbers],
                weights=weights,
                **self.settings,
            )
        images = images.float().contiguous()
        if world > 1:
            images = pl_module.all_gather(images).flatten(0, 1)
        return images[: len(self.prompts)].cpu()


def log_image(trainer: Trainer, picture: Image.Image, key: str, step: int) -> None:
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key, picture, step)
