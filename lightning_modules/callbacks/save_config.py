"""The resolved configuration of a run: in its folder, as an MLflow artifact, and as parameters of its loggers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from emmdit.config_text import REFERENCE, flatten_config, mask_secrets
from emmdit.files import atomic_path
from lightning_modules.mlflow_logger import MLflowLogger
from lightning_modules.runs import numbered_configs


class SaveConfig(SaveConfigCallback):
    """For `LightningCLI(save_config_callback=SaveConfig)`; Lightning's own stops at a file that exists.

    `config.yaml` in the run folder is what the run began with. A resume with other settings writes
    `config-1.yaml`, `config-2.yaml`, ...; `runs.latest_config` finds the last. A fresh start in a used folder
    moves older files to `*.yaml.old`. Only `fit` writes, as training starts; secrets are masked in all
    places. The run's folder and checkpoint are left out of the file, which may be given with -c for another run.
    """

    interpolations: dict[str, str] = {}  # "${...}" of the files by their keys

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass  # too early: whether this is a resume is known only once the checkpoint is read

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder = trainer.log_dir  # broadcasts, so on every rank
        if trainer.is_global_zero and not self.already_saved:
            self.save_config(trainer, pl_module, "fit")
        self.already_saved = True

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        text = mask_secrets(portable(text, self.interpolations))
        path = None
        if self._folder is not None:
            path = write_config(Path(self._folder), text, resume=bool(trainer.ckpt_path))
        params = flatten_config(self.config)
        params.pop("config", None)  # the names of the files it was read from
        for logger in trainer.loggers:
            logger.log_hyperparams(params)
            if isinstance(logger, MLflowLogger) and path is not None:
                logger.log_text(text, path.name)


def portable(text: str, interpolations: dict[str, str]) -> str:
    """The text of a config without what belongs to one run (its folder, its checkpoint), and with its `${...}`.

    Given with -c it trains a run of its own, in which what follows another key still follows it.
    """
    config = yaml.safe_load(text)
    for section, key in ((config, "ckpt_path"), (config.get("trainer", {}), "default_root_dir")):
        if key in section:
            section[key] = None
    for name, value in interpolations.items():
        section, _, key = name.rpartition(".")
        target, source = _at(config, section), _at(config, REFERENCE.fullmatch(value)[1])
        if isinstance(target, dict) and key in target and target[key] == source:
            target[key] = value
    head = [line for line in text.splitlines() if line.startswith("#")]  # the version of Lightning
    return "\n".join([*head, yaml.safe_dump(config, sort_keys=False, allow_unicode=True)])


def _at(config: Any, name: str) -> Any:
    for key in name.split(".") if name else ():
        config = config.get(key) if isinstance(config, dict) else None
    return config


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
    with atomic_path(path) as part:
        part.write_text(text)
    return path


def _comparable(text: str) -> str:
    """Without the checkpoint path, in which every resume differs."""
    return re.sub(r"(?m)^ckpt_path:.*\n?", "", text)
