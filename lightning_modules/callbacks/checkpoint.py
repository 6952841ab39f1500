"""Checkpoints at intervals of training steps, and always one of the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from emmdit.weights import last_checkpoint
from lightning_modules.checkpoint_io import LocalCheckpointIO, check_optimizers, link, optimizer_names
from lightning_modules.parallel import FSDP2Strategy

UNPICKLING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)  # what they find in a sharded checkpoint


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, counting `pl_module.training_steps`, which also saves when training ends.

    Lightning's own counts the steps of all optimizers together, and leaves out the steps after the last interval: of
    1,100 steps with a checkpoint every 400, an export would be the state of step 800.

    No kill between two system calls loses a run: the new checkpoint is written, a new link renamed over `last.ckpt`,
    and only then is the old checkpoint deleted. `--ckpt_path last` falls back to the newest whole checkpoint, and
    refuses to start from zero in a folder that holds checkpoints. Files are written and read by `LocalCheckpointIO`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outdated: list[str] = []
        self._resumed: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, UNPICKLING) and not isinstance(strategy, FSDP2Strategy):
            raise ValueError(
                f"trainer.strategy: {type(strategy).__name__} reads checkpoints by running what they hold: use "
                "lightning_modules.parallel.FSDP2Strategy (-c experiments/trainer/fsdp_8gpu.yaml)."
            )
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = LocalCheckpointIO(trainer)
        elif not isinstance(strategy.checkpoint_io, LocalCheckpointIO):
            raise ValueError(
                f"trainer.plugins: {type(strategy.checkpoint_io).__name__} writes checkpoints in an order that a kill "
                "can break: leave it out."
            )
        super().setup(trainer, pl_module, stage)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizers"] = optimizer_names(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resumed = {key: checkpoint[key] for key in ("optimizers", "optimizer_states") if key in checkpoint}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed and not trainer.strategy.restore_checkpoint_after_setup:
            check_optimizers(self._resumed, trainer)
        self._resumed = {}

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
        if trainer.is_global_zero and Path(filepath).absolute() != Path(linkpath).absolute():
            link(Path(filepath), Path(linkpath))
        trainer.strategy.barrier()

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        if self.dirpath is None or "://" in str(self.dirpath):  # not on a local file system
            return super()._find_last_checkpoints(trainer)
        found = last_checkpoint(Path(self.dirpath))
        return set() if found is None else {str(found)}
