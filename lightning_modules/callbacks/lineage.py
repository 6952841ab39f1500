"""Records in the tracker which data a run saw, under which licence."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer


class DataLineage(Callback):
    """Logs `datamodule.provenance()` as a data set input of the run."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        provenance = getattr(trainer.datamodule, "provenance", None)
        if provenance is None:
            return
        for logger in trainer.loggers:
            if hasattr(logger, "log_dataset"):
                logger.log_dataset(**provenance(), context="training")
