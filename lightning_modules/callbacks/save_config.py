"""The resolved configuration of a run: in its folder, as an MLflow artifact, and as parameters of its loggers."""

from __future__ import annotations

import re
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from emmdit.config_text import flatten_config, mask_secrets
from lightning_modules.mlflow_logger import MLflowLogger
from lightning_modules.runs import numbered_configs


class SaveConfig(SaveConfigCallback):
    """For `LightningCLI(save_config_callback=SaveConfig)`; Lightning's own stops at a file that exists.

    `config.yaml` in the run folder is what the run began with. A resume with other settings writes
    `config-1.yaml`, `config-2.yaml`, ...; `runs.latest_config` finds the last. A fresh start in a used folder
    moves older files to `*.yaml.old`. Only `fit` writes, as training starts; secrets are masked in all
    places.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass  # too early: whether this is a resume is known only once the checkpoint is read

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder = trainer.log_dir  # broadcasts, so on every rank
        if trainer.is_global_zero and not self.already_saved:
            self.save_config(trainer, pl_module, "fit")
        self.already_saved = True

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        text = mask_secrets(self.parser.dump(self.config, skip_none=False))
        path = None
        if self._folder is not None:
            path = write_config(Path(self._folder), text, resume=bool(trainer.ckpt_path))
        params = flatten_config(self.config)
        params.pop("config", None)  # the names of the files it was read from
        for logger in trainer.loggers:
            logger.log_hyperparams(params)
            if isinstance(logger, MLflowLogger) and path is not None:
                logger.log_text(text, path.name)


def write_config(folder: Path, text: str, resume: bool) -> Path | None:
    """Write the config beside earlier ones; the path written, or None if the latest says the same already."""
    folder.mkdir(parents=True, exist_ok=True)
    existing = numbered_configs(folder)
    path = folder / "config.yaml"
    if resume and existing:
        number, latest = existing[-1]
        if _comparable(latest.read_text()) == _comparable(text):
            return None
        path = folder / f"config-{number + 1}.yaml"
    else:
        for _, old in existing:
            if _comparable(old.read_text()) != _comparable(text):
                old.replace(old.with_suffix(".yaml.old"))
            else:
                old.unlink()
    path.write_text(text)
    return path


def _comparable(text: str) -> str:
    """Without the checkpoint path, in which every resume differs."""
    return re.sub(r"(?m)^ckpt_path:.*\n?", "", text)
