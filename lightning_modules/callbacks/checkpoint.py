"""Checkpoints at intervals of training steps, and always one of the end."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, counting `pl_module.training_steps`, which also saves when training ends.

    Lightning's own counts the steps of all optimizers together, and leaves out the steps after the last interval: of
    1,100 steps with a checkpoint every 400, an export would be the state of step 800.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if pl_module.automatic_optimization:  # one optimizer: Lightning counts alike, and knows monitors and timers
            super().on_train_batch_end(trainer, pl_module, *args)
            return
        every, step = self._every_n_train_steps, pl_module.training_steps
        if every >= 1 and step % every == 0 and not self._should_skip_saving_checkpoint(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run and self._last_global_step_saved != trainer.global_step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        candidates = super()._monitor_candidates(trainer)
        step = candidates["step"]
        return candidates | {"step": step.new_tensor(trainer.lightning_module.training_steps)}
