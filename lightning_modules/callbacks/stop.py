"""SIGTERM and Ctrl-C: a checkpoint at the next step boundary, then an exit status that is not zero."""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_modules.commands.ranks import started_by_rank_zero

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals(Callback):
    """Ends a training on SIGTERM (exit status 143) or Ctrl-C (130) with a checkpoint; a second signal ends it at once.

    All ranks stop at the same step, whichever of them got the signal: after each step they compare a number on their
    hosts (gloo), so that no GPU is waited for. Validation and evaluation are left where they
    are. Before training and after it, signals do what they always do. SIGUSR1 stays Lightning's, which requeues a SLURM
    job.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._armed = False
        self._saving = False
        self._previous: dict[int, Any] = {}
        self._last_step = -1
        self._loops: dict[str, Any] | None = None  # of the training, at the step that a validation belongs to
        self._pid = os.getpid()
        self._hosts: Any = None  # process group of the ranks' hosts

    # -- signals -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the loader's processes are forked: they inherit the handlers, and must outlive a Ctrl-C."""
        if stage == "fit":
            self._pid = os.getpid()
            self._install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = pl_module.training_steps
        self._install()  # again: Lightning has put its own before ours
        if trainer.world_size > 1:
            self._hosts = torch.distributed.new_group(backend="gloo")
        self._armed = True

    def _install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                previous = signal.signal(signum, self._handle)
                self._previous.setdefault(signum, previous)

    def _handle(self, signum: int, frame: Any) -> None:
        if os.getpid() != self._pid:  # a process of the loader: the training it works for ends it
            if signum == signal.SIGTERM:
                self._end(signum)
        elif self._armed and not self.signum:
            self.signum = signum
            name = "SIGTERM" if signum == signal.SIGTERM else "Ctrl-C"
            os.write(2, f"\n{name}: saving a checkpoint after this step; a second one ends at once.\n".encode())
        elif signum == signal.SIGINT and not self.signum:
            raise KeyboardInterrupt
        else:
            self._end(signum)

    @staticmethod
    def _end(signum: int) -> None:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        self._armed = False
        if threading.current_thread() is threading.main_thread():
            for signum, handler in self._previous.items():
                signal.signal(signum, handler)
        self._previous.clear()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._armed = False  # until `teardown` or the end: a signal now ends at once

    # -- step boundaries ---------------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if pl_module.training_steps != self._last_step:  # else a micro batch of gradient accumulation
            self._last_step = pl_module.training_steps
            self.check(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            # A checkpoint saved in mid validation is to be resumed as if it had been saved at the end of its step.
            self._loops = copy.deepcopy(trainer.fit_loop.state_dict())
            for count in ("current", "total"):
                self._loops["epoch_loop.batch_progress"][count]["completed"] -= 1

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if self._loops is not None:
            self.check(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loops = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._saving and self._loops is not None:
            checkpoint["loops"]["fit_loop"] = self._loops

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.signum:
            raise SIGTERMException(self._status(self.signum))

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and end, on every rank, if one of them got a signal. A collective, between steps of the network."""
        signum = self.signum
        if trainer.world_size > 1:
            flag = torch.tensor(signum)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._hosts)
            signum = int(flag)
        if not signum:
            return
        self.signum, self._saving = signum, True
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        if progress.completed < progress.processed:  # Lightning would log the values of this step after the callbacks
            trainer._logger_connector.update_train_step_metrics()
        step, checkpoint = pl_module.training_steps, trainer.checkpoint_callback
        told = f"stopped at step {step:,} without a checkpoint, since checkpoints are off"
        if isinstance(checkpoint, ModelCheckpoint) and not trainer.fast_dev_run:
            checkpoint.on_train_end(trainer, pl_module)  # saves, unless this step has been
            path = checkpoint.last_model_path or checkpoint.best_model_path
            told = f"saved {Path(path).resolve()} at step {step}; continue with --ckpt_path last"
        if trainer.is_global_zero:
            print(f"emmdit fit: {told}.", file=sys.stderr, flush=True)
        raise SIGTERMException(self._status(signum))

    @staticmethod
    def _status(signum: int) -> int:
        """Lightning kills rank zero when a process that it started ends with an error, so those end without one."""
        return 0 if started_by_rank_zero() else 128 + signum


def check_signals(trainer: Trainer, pl_module: LightningModule) -> None:
    """`StopSignals.check` for callbacks that work for long; every rank must call it equally often."""
    for callback in trainer.callbacks:
        if isinstance(callback, StopSignals):
            callback.check(trainer, pl_module)
