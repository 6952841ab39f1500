"""`emmdit fit` and `emmdit validate`: LightningCLI with the suite's defaults."""

from __future__ import annotations

import copy
import os
import sys
from argparse import RawDescriptionHelpFormatter
from typing import Any

import torch
from jsonargparse import DefaultHelpFormatter, set_parsing_settings
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules import TextImageDataModule
from emmdit.weights import check_source
from lightning_modules.callbacks import (
    EMA,
    Checkpoint,
    DataLineage,
    ImageGrid,
    MLflowSystemMetrics,
    NonFinite,
    ProgressBar,
    SaveConfig,
    StopSignals,
    Summary,
    Throughput,
)
from lightning_modules.callbacks.survive import make_survivable
from lightning_modules.commands.config_errors import USER_ERRORS, one_line
from lightning_modules.commands.config_files import (
    ConfigParser,
    as_clones,
    check_sections,
    config_files,
    interpolations,
    place_of,
    reference_at_fault,
    with_bases,
)
from lightning_modules.commands.ranks import rank_zero
from lightning_modules.commands.run_folder import RunFolder, run_dir_of

SECTIONS = {"checkpoint": Checkpoint, "ema": EMA, "samples": ImageGrid}
SECTIONS |= {"non_finite": NonFinite, "throughput": Throughput, "progress": ProgressBar}
TITLES = {
    "model": "the way of training (--model.help CLASS lists its arguments)",
    "data": "the training data (--data.help CLASS lists its arguments)",
    "trainer": "Lightning's Trainer",
}
HELP = {
    "fit": """Train, in the run folder runs/NAME of experiments/NAME.yaml.

examples:
  emmdit fit -c experiments/quickstart.yaml
  emmdit fit -c experiments/quickstart.yaml --ckpt_path last            resume, or start where there is nothing yet
  emmdit fit -c experiments/shapes/emmdit.yaml -c experiments/trainer/gpu.yaml --trainer.max_steps 1000

Several -c files are merged, the later ones win; each key is also an option, and wins over the files.
`--print_config` shows the whole configuration, `--model.help CLASS` the arguments of a class (so --data.help).""",
    "validate": """Validation losses of a checkpoint; prints them, and writes nothing.

example:
  emmdit validate -c runs/quickstart/config.yaml --ckpt_path last""",
}


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """jsonargparse's, with the lines of a description as they are."""


class SuiteCLI(LightningCLI):
    """LightningCLI with the suite's callbacks as sections of the YAML, one seed, and one folder for each run.

    A config file may name its base files (`config_files.py`). The run folder is `trainer.default_root_dir`; left out,
    it is `runs/` and the name of the last config file below `experiments/`. Checkpoints, config, images and the MLflow
    run id all lie in it.
    """

    def __init__(self, args: Any = None, run: bool = True, exit_on_error: bool = True) -> None:
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        args = self._arguments = as_clones(list(sys.argv[1:] if args is None else args))
        callbacks = [MLflowSystemMetrics(), DataLineage(), LearningRateMonitor("step"), Summary(), StopSignals()]
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
                "callbacks": callbacks,
                "logger": {"class_path": "lightning_modules.mlflow_logger.MLflowLogger"},
            },
            # Without abbreviations: `--trainer.max_step 3` is an error, as the same key in a YAML is.
            parser_kwargs={
                "parser_mode": "omegaconf+",
                "exit_on_error": exit_on_error,
                "allow_abbrev": False,
                "formatter_class": HelpFormatter,
            }
            | {name: {"allow_abbrev": False} for name in self.subcommands()},
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        commands = LightningCLI.subcommands()
        return {name: commands[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name, callback in SECTIONS.items():
            parser.add_lightning_class_args(callback, name)
        # Without versions: a second run in the same folder must own last.ckpt.
        defaults = {"save_last": "link", "every_n_train_steps": 1000, "enable_version_counter": False}
        parser.set_defaults({f"checkpoint.{key}": value for key, value in defaults.items()})
        for target in ("model", "data"):
            parser.link_arguments("seed_everything", f"{target}.init_args.seed", compute_fn=int)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """The suite's own sections come first in the help, Lightning's long list of the Trainer last."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.usage = f"emmdit {subcommand} -c FILE [-c FILE ...] [--KEY VALUE ...]"
        parser.description = HELP[subcommand]
        for name, group in parser.groups.items():
            group.title = f"{name}, {TITLES[name]}" if name in TITLES else f"{name}: {group.title}"
        parser._action_groups.sort(key=lambda group: group is parser.groups["trainer"])
        return parser

    def _parse_ckpt_path(self) -> None:
        """No-op: hyperparameters in a checkpoint must not override the YAML of a resume."""

    def before_instantiate_classes(self) -> None:
        """Everything that can be known to be wrong before a class is built, and the paths of the run folder."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        check_trainer(config.trainer)
        check_optimizer(config.model.get("init_args", {}).get("optimizer"))
        if config.throughput.window < 1 or config.non_finite.limit < 1:
            raise ValueError("throughput.window and non_finite.limit must be at least 1.")
        files = config_files(self._arguments)
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = run_dir_of(files, self.subcommand, config.get("ckpt_path"))
        self._saved_config = copy.deepcopy(config)  # without the paths derived below: they follow the run folder
        run_dir = str(config.trainer.default_root_dir)
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = os.path.join(run_dir, "checkpoints")
        if self.subcommand:
            self._folders = RunFolder(run_dir, str(config.checkpoint.dirpath))
            config.ckpt_path = self._folders.start(self.subcommand, config.ckpt_path, bool(config.trainer.fast_dev_run))
        if self.subcommand == "validate":
            config.trainer.logger = False  # it prints, and writes nothing
        logger = config.trainer.logger
        if hasattr(logger, "class_path") and "save_dir" in logger.init_args and logger.init_args.save_dir is None:
            logger.init_args.save_dir = run_dir

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        files = config_files(with_bases(self._arguments))
        check_sections(files, ("trainer", *SECTIONS))
        try:
            super().parse_arguments(parser, args)
        except Exception as error:
            told = one_line(error)
            if type(error).__module__.startswith("omegaconf"):
                raise ValueError(reference_at_fault(told, files)) from error
            place = place_of(told, files, self._arguments)
            raise ValueError(f"{place}: {told}" if place else told) from error

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if not 0 <= int(seed) < 2**32:
            raise ValueError(f"seed_everything must be between 0 and {2**32 - 1}, not {seed}.")
        super()._set_seed()

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (*USER_ERRORS, MisconfigurationException):
            raise
        except Exception as error:  # arguments that a class did not expect, and did not check
            raise ValueError(one_line(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer = super().instantiate_trainer(**kwargs)
        if getattr(self.model, "init_from", None) is not None:
            check_source(self.model.init_from)
        for callback in trainer.callbacks:
            if _after_checkpoint(callback) and self.subcommand != "validate":
                callback.check(self.model)
            if isinstance(callback, SaveConfig):
                callback.config = self._saved_config
                callback.interpolations = interpolations(config_files(with_bases(self._arguments)), self._arguments)
        unused = [EMA] * (not getattr(self.model, "ema", True)) + [LearningRateMonitor] * (not trainer.loggers)
        callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, tuple(unused))]
        trainer.callbacks = sorted(callbacks, key=_place)
        for logger in trainer.loggers:
            make_survivable(logger)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        with rank_zero(), self._folders.held(subcommand == "fit" and not self.trainer.fast_dev_run):
            try:
                super()._run_subcommand(subcommand)
            finally:
                for callback in self.trainer.callbacks:
                    if isinstance(callback, StopSignals):
                        callback.restore()


def _place(callback: Callback) -> int:
    """The checkpoint of a step is saved before what may fail or take long, and before a signal ends the run."""
    if _after_checkpoint(callback):
        return 3
    return 2 if isinstance(callback, StopSignals) else isinstance(callback, LightningCheckpoint)


def _after_checkpoint(callback: Callback) -> bool:
    return getattr(callback, "after_checkpoint", False)


def check_trainer(trainer: Any) -> None:
    """Raise a ValueError for settings of the Trainer that train nothing, train wrongly, or that it does not check."""
    if trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"trainer.accelerator is {trainer.accelerator}, but there is no GPU that this torch can use: add "
            "-c experiments/trainer/cpu.yaml after the other files, or install a torch for the GPU."
        )
    if trainer.precision in ("bf16-true", "16-true"):
        raise ValueError(
            f"trainer.precision {trainer.precision} keeps the weights themselves in 16 bit, in which "
            "training from scratch loses its small updates: use bf16-mixed (float32 weights, bfloat16 compute)."
        )
    for name in ("accumulate_grad_batches", "log_every_n_steps", "num_nodes", "num_sanity_val_steps"):
        value, least = trainer.get(name), -1 if name == "num_sanity_val_steps" else 1
        if value is not None and value < least:
            raise ValueError(f"trainer.{name} must be at least {least}, not {value}.")
    if trainer.gradient_clip_val is not None and trainer.gradient_clip_val < 0:
        raise ValueError(f"trainer.gradient_clip_val must be at least 0, not {trainer.gradient_clip_val}.")
    for name in ("max_steps", "max_epochs", "limit_train_batches", "val_check_interval"):
        value = trainer.get(name)
        if not isinstance(value, bool | str) and value is not None and (value == 0 or value < 0 and "max" not in name):
            raise ValueError(f"trainer.{name} must be above 0, not {value}: nothing would be trained or validated.")


def check_optimizer(optimizer: Any) -> None:
    """Raise a ValueError that names the setting; torch's own names it in its own words, and lets NaN pass."""
    settings = optimizer.get("init_args", {}) if hasattr(optimizer, "get") else {}
    for name in ("lr", "eps", "weight_decay"):
        value = settings.get(name)
        if isinstance(value, int | float) and not 0 <= value < float("inf"):
            raise ValueError(f"model.optimizer.{name} must be a finite number of at least 0, not {value}.")
