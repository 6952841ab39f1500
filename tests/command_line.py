"""The command line in tests: experiment files by name, parsed and instantiated without training."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import datasets
import pytest

from lightning_modules.commands.fit import SuiteCLI

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SHAPES = "shapes/emmdit.yaml"
EDIT, MM_EDIT, HYBRID = "shapes/edit.yaml", "shapes/mm_edit.yaml", "shapes/emmdit_hybrid.yaml"
STAGES = ("emmdit/512_stage1.yaml", "emmdit/512_stage2.yaml", "emmdit/1024.yaml")
ON_CPU = ["--trainer.accelerator=cpu"]


class Parsed(SuiteCLI):
    """The command line without the training behind it."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def cli(*args: str, command: str | None = None) -> SuiteCLI:
    """`emmdit fit ARGS`, parsed and instantiated; without a command as notebooks do it."""
    if command is None:
        return SuiteCLI(args=list(args), run=False, exit_on_error=False)
    return Parsed(args=[command, *args], exit_on_error=False)


def files(*names: str | Path) -> list[str]:
    return [part for name in names for part in ("-c", str(EXPERIMENTS / name))]


def change(text: str, name: str = "change.yaml") -> list[str]:
    """`text` as a file to lay over others."""
    Path(name).write_text(text)
    return ["-c", str(Path(name).absolute())]


def model_args(run: SuiteCLI):
    return (run.config[run.subcommand] if run.subcommand else run.config).model.init_args


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and caches land in the test's folder. Import it where it is needed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["emmdit"])  # Lightning warns of arguments beside its own
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
