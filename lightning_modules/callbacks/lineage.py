"""Records in the tracker which data a run saw, under which license."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer


class DataLineage(Callback):
    """Logs each of `datamodule.provenances()` as a dataset input of the run."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        provenances = getattr(trainer.datamodule, "provenances", list)()
        for logger in trainer.loggers:
            if hasattr(logger, "log_dataset"):
                for provenance in provenances:
                    logger.log_dataset(**provenance, context="training")
