"""`emmdit fit` and `emmdit validate`: LightningCLI with the suite's defaults."""

from __future__ import annotations

import copy
import os
import sys
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from datamodules import TextImageDataModule
from lightning_modules.callbacks import (
    EMA,
    Checkpoint,
    DataLineage,
    ImageGrid,
    MLflowSystemMetrics,
    NonFinite,
    ProgressBar,
    SaveConfig,
    Summary,
    Throughput,
)
from lightning_modules.commands.config_files import ConfigParser, config_files, default_run_dir


class SuiteCLI(LightningCLI):
    """LightningCLI with the suite's callbacks as sections of the YAML, one seed, and one folder for each run.

    A config file may name its base files (`config_files.py`). The run folder is `trainer.default_root_dir`; left out,
    it is `runs/` and the name of the last config file below `experiments/`. Checkpoints, config, images and the MLflow
    run id all lie in it.
    """

    def __init__(self, args: Any = None, run: bool = True, exit_on_error: bool = True) -> None:
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        self._arguments = list(sys.argv[1:] if args is None else args)
        super().__init__(
            LightningModule,
            TextImageDataModule,
            parser_class=ConfigParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            trainer_defaults={
                "use_distributed_sampler": False,
                "max_epochs": -1,
                "check_val_every_n_epoch": None,  # val_check_interval counts steps
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "callbacks": [MLflowSystemMetrics(), DataLineage(), LearningRateMonitor("step"), Summary()],
                "logger": {"class_path": "lightning_modules.mlflow_logger.MLflowLogger"},
            },
            # Without abbreviations: `--trainer.max_step 3` is an error, as the same key in a YAML is.
            parser_kwargs={"parser_mode": "omegaconf+", "exit_on_error": exit_on_error, "allow_abbrev": False}
            | {name: {"allow_abbrev": False} for name in self.subcommands()},
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        commands = LightningCLI.subcommands()
        return {name: commands[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        sections = {"checkpoint": Checkpoint, "ema": EMA, "samples": ImageGrid, "non_finite": NonFinite}
        for name, callback in (sections | {"throughput": Throughput, "progress": ProgressBar}).items():
            parser.add_lightning_class_args(callback, name)
        # Without versions: a second run in the same folder must own last.ckpt.
        defaults = {"save_last": "link", "every_n_train_steps": 1000, "enable_version_counter": False}
        parser.set_defaults({f"checkpoint.{key}": value for key, value in defaults.items()})
        for target in ("model", "data"):
            parser.link_arguments("seed_everything", f"{target}.init_args.seed", compute_fn=int)

    def _parse_ckpt_path(self) -> None:
        """No-op: hyperparameters in a checkpoint must not override the YAML of a resume."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = default_run_dir(config_files(self._arguments))
        self._saved_config = copy.deepcopy(config)  # without the paths derived below: they follow the run folder
        run_dir = str(config.trainer.default_root_dir)
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = os.path.join(run_dir, "checkpoints")
        logger = config.trainer.logger
        if hasattr(logger, "class_path") and "save_dir" in logger.init_args and logger.init_args.save_dir is None:
            logger.init_args.save_dir = run_dir
        if config.trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"trainer.precision {config.trainer.precision} keeps the weights themselves in 16 bit, in which "
                "training from scratch loses its small updates: use bf16-mixed (float32 weights, bfloat16 compute)."
            )

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer = super().instantiate_trainer(**kwargs)
        if not getattr(self.model, "ema", True):
            trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, EMA)]
        for callback in trainer.callbacks:
            if isinstance(callback, SaveConfig):
                callback.config = self._saved_config
        return trainer
