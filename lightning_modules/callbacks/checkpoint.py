"""Checkpoints at intervals of training steps, and always one of the end."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from emmdit.weights import last_checkpoint


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, counting `pl_module.training_steps`, which also saves when training ends.

    Lightning's own counts the steps of all optimizers together, and leaves out the steps after the last interval: of
    1,100 steps with a checkpoint every 400, an export would be the state of step 800.

    No kill between two system calls loses a run: the new checkpoint is written, a new link renamed over `last.ckpt`,
    and only then is the old checkpoint deleted. `--ckpt_path last` falls back to the newest whole checkpoint, and
    refuses to start from zero in a folder that holds checkpoints.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outdated: list[str] = []

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

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if self.save_last == "link":
            self._outdated.append(filepath)  # `last.ckpt` still names it
        else:
            super()._remove_checkpoint(trainer, filepath)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        super()._save_last_checkpoint(trainer, monitor_candidates)
        for path in self._outdated:
            super()._remove_checkpoint(trainer, path)
        self._outdated.clear()

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        link = Path(linkpath)
        if trainer.is_global_zero and Path(filepath).absolute() != link.absolute():
            part = link.with_name(f".{link.name}")
            part.unlink(missing_ok=True)
            part.symlink_to(os.path.relpath(filepath, link.parent))
            if link.is_dir() and not link.is_symlink():  # a folder cannot be renamed over
                shutil.rmtree(link)
            os.replace(part, link)
        trainer.strategy.barrier()

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        if self.dirpath is None or "://" in str(self.dirpath):  # not on a local file system
            return super()._find_last_checkpoints(trainer)
        found = last_checkpoint(Path(self.dirpath))
        return set() if found is None else {str(found)}
