"""Sample grids during training, from fixed prompts and seeds: a PNG in the run folder and in the tracker."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

from jsonargparse.typing import register_type
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from emmdit.files import grid, save_png
from lightning_modules.callbacks.stop import check_signals
from lightning_modules.callbacks.survive import Failed, survives, together
from lightning_modules.callbacks.throughput import Throughput
from lightning_modules.denoiser_module import DenoiserModule


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
            try:
                lines = Path(prompts).read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError:
                raise ValueError(f"The prompt file {prompts} is not UTF-8 text: save it as UTF-8.") from None
            found = [line.strip() for line in lines if line.strip()]
            if not found:
                raise ValueError(f"The prompt file {prompts} is empty: write one prompt a line.")
            prompts = found
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"Prompts must be text, not {list(prompts)}: quote each of them.")
        super().__init__(prompts)


register_type(PromptList, serializer=list)


class ImageGrid(Callback):
    """Samples `prompts` every `every_n_steps` training steps and when training ends.

    The work is shared over ranks; each makes the same number of forward passes (the list is padded). Image i always has
    seed `seed + i`, so grids of a run, and of different runs, can be laid side by side. A grid that fails costs a
    warning; the command line draws it after the checkpoint of its step.

    Args:
        prompts: a list, or a text file with one prompt a line; None turns the callback off.
        every_n_steps: 0: only at the end.
        columns: of the grid.
        weights: which of "ema" and "raw" to show; None: EMA if available. Several give one file each.
        steps, guidance: in place of the model's own sampling settings.
        scale: integer factor by which the grid is enlarged, for small images.
    """

    after_checkpoint = True  # of the same step: the command line orders callbacks by it

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
        for name, value, least in (("every_n_steps", every_n_steps, 0), ("columns", columns, 1), ("scale", scale, 1)):
            if value < least:
                raise ValueError(f"samples.{name} must be at least {least}, not {value}.")
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

    def check(self, pl_module: LightningModule) -> None:
        """Raise a ValueError for prompts and settings that the module cannot sample, before anything is allocated."""
        if self.prompts:
            check_sampling(pl_module, self.prompts, self.weights, self.settings)

    def save_grid(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = pl_module.training_steps
        if not self.prompts or step == self._last:
            return
        self._last = step
        for weights in self.weights:
            what = f"The image grid of step {step}"
            with Throughput.paused(trainer), suppress(Failed):
                check_signals(trainer, pl_module)
                images = self.sample(trainer, pl_module, weights, what)
                if trainer.is_global_zero and not trainer.fast_dev_run:
                    with survives(what):
                        self._write(trainer, images, step, weights)

    def _write(self, trainer: Trainer, images: Tensor, step: int, weights: str | None) -> None:
        name = f"step_{step:07d}" + (f"_{weights}" if weights else "")
        path = Path(trainer.default_root_dir, "samples", f"{name}.png")
        image = grid(images, self.columns, self.scale)
        settings = {"step": step, "seed": self.seed, "prompts": self.prompts, "weights": weights or "default"}
        save_png(image, path, settings)
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image(f"samples_{weights}" if weights else "samples", image, step)

    def sample(self, trainer: Trainer, pl_module: LightningModule, weights: str | None, what: str) -> Tensor:
        """All images, on every rank; `Failed` on every rank if one could not make its share."""
        world, rank = trainer.world_size, trainer.global_rank
        share = math.ceil(len(self.prompts) / world)
        numbers = [min(i, len(self.prompts) - 1) for i in range(rank * share, (rank + 1) * share)]
        prompts, seeds = [self.prompts[i] for i in numbers], [self.seed + i for i in numbers]

        def share_of_rank() -> Tensor:
            with trainer.precision_plugin.forward_context():
                return pl_module.sample(prompts, seeds, weights=weights, **self.settings)

        images = together(trainer, what, share_of_rank).float().contiguous()
        if world > 1:
            images = pl_module.all_gather(images).flatten(0, 1)
        return images[: len(self.prompts)].cpu()


def check_sampling(
    pl_module: LightningModule, prompts: list[str], weights: list[str | None], settings: dict[str, float]
) -> None:
    """Raise a ValueError for what `pl_module.sample` would refuse, as far as it can be known without its weights."""
    if not isinstance(pl_module, DenoiserModule):
        return
    for kind in weights:
        if kind not in (None, "raw", "ema") or (kind == "ema" and not pl_module.ema):
            raise ValueError(f"This run has no {kind!r} weights: ask for raw, or for ema if the run keeps an EMA.")
    pl_module.sampling.replace(**settings)
    pl_module.text.check(prompts)
