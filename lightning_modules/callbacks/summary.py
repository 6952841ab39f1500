"""Summary of a finished training: loss curves and a record in the run folder, and what to do next."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from emmdit.config_text import mask_secrets
from emmdit.files import atomic_path
from emmdit.provenance import git_commit, hardware
from lightning_modules.callbacks.image_grid import ImageGrid
from lightning_modules.callbacks.survive import survives
from lightning_modules.mlflow_logger import MLflowLogger
from lightning_modules.mlflow_runs import RECORDED, training_record

CURVES = ("train/loss", "val/loss_ema", "val/loss_raw")
PARTS = ("train/task", "train/output", "train/features", "train/repa", "val/loss_teacher")  # where there are some
PROMPT = "a photo of a lighthouse"  # for data without captions


class Summary(Callback):
    """When training ends, writes `curve.csv`, `curve.png` and `train.json` and prints where everything is.

    The numbers come from the tracker's history, so that a resumed run gives one curve. `emmdit evaluate` copies
    `train.json` (steps, seconds, last validation losses, hardware, command) into the ledger's row.
    """

    def __init__(self) -> None:
        self.caption = ""  # the first one seen
        self._first_step = 0
        self._commits: list[str] = []  # that the run was trained at

    def state_dict(self) -> dict[str, Any]:
        return {"commits": self._commits}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._commits = state_dict["commits"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = pl_module.training_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:  # the code is read at the start: by the end the checkout may have moved on
            self._commits = list(dict.fromkeys([*self._commits, git_commit() or "unknown"]))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.caption and isinstance(batch, dict):
            self.caption = next(iter(batch.get("caption") or ()), "")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        if pl_module.training_steps == self._first_step:
            print(nothing_done(trainer, pl_module.training_steps), flush=True)
            return
        with survives("The summary of the training"):
            self.write(trainer, pl_module)

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files and print where they are."""
        run_dir = Path(trainer.default_root_dir)
        logger = next((logger for logger in trainer.loggers if isinstance(logger, MLflowLogger)), None)
        lines = [f"\nRun folder   {run_dir}"]
        if logger is not None:
            history = logger.history({*CURVES, *PARTS, *RECORDED})
            curves = {name: history[name] for name in CURVES + PARTS if history[name] or name in CURVES}
            write_csv(curves, run_dir / "curve.csv")
            record = {
                "steps": pl_module.training_steps,
                **training_record(history.__getitem__, pl_module.training_steps),
                "hardware": hardware(trainer.strategy.root_device),
                "devices": trainer.world_size,
                "commit": ", ".join(self._commits),
                "command": mask_secrets(shlex.join(["emmdit", *sys.argv[1:]])),
            }
            with atomic_path(run_dir / "train.json") as part:
                part.write_text(json.dumps(record, indent=1) + "\n")
            if any(curves.values()):
                plot(curves, run_dir / "curve.png")
                lines.append(f"Loss curve   {run_dir / 'curve.png'}  (curve.csv)")
        grids = sorted((run_dir / "samples").glob("step_*.png"))
        if grids:
            lines.append(f"Samples      {grids[-1]}")
        checkpoint = trainer.checkpoint_callback.last_model_path if trainer.checkpoint_callback else ""
        if checkpoint:
            lines.append(f"Checkpoint   {checkpoint}")
        if logger is not None:
            where = mask_secrets(logger.tracking_uri)
            waiting = shlex.join(["emmdit", "runs", "sync", str(run_dir)]) if logger.waiting else ""
            lines.append(f"MLflow run   {logger.run_id or 'not made yet'} in {where}")
            lines += [f"MLflow log   waits in {logger.waiting}; when MLflow is back: {waiting}"] if waiting else []
        store = logger.tracking_uri if logger else "sqlite:///mlflow.db"
        prompts = [c.prompts[0] for c in trainer.callbacks if isinstance(c, ImageGrid) and c.prompts]
        prompt = next(iter(prompts), textwrap.shorten(self.caption, 120, placeholder="") or PROMPT)
        commands = [
            ("emmdit", "sample", "--ckpt", str(run_dir), "--prompt", prompt, "--num_images", "8", "--out", "out"),
            ("emmdit", "export", "--ckpt", str(run_dir), "--out", "exported"),
        ]
        commands = (commands if checkpoint else []) + [("mlflow", "ui", "--backend-store-uri", store)]
        lines += ["\nNext:", *(f"  {shlex.join([program(name), *rest])}" for name, *rest in commands)]
        print("\n".join(lines), flush=True)


def nothing_done(trainer: Trainer, step: int) -> str:
    """Why a training that has ended has made no step."""
    if step and 0 <= trainer.max_steps <= step:
        return (
            f"Nothing to do: the checkpoint {trainer.ckpt_path} is of step {step:,}, and trainer.max_steps is "
            f"{trainer.max_steps:,}; --trainer.max_steps with a larger number trains on."
        )
    return f"Nothing was trained: training ended at step {step:,}, where it began (see trainer.max_epochs, max_time)."


def program(name: str) -> str:
    """How to call a command of this environment: its name where the environment is activated, else its path."""
    return name if shutil.which(name) else os.path.relpath(Path(sys.executable).with_name(name))


def write_csv(curves: dict[str, dict[int, float]], path: Path) -> None:
    """One row per step, one column per curve, empty where a curve has no point."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *curves])
        for step in sorted({step for curve in curves.values() for step in curve}):
            writer.writerow([step, *(f"{curve[step]:.6g}" if step in curve else "" for curve in curves.values())])


def plot(curves: dict[str, dict[int, float]], path: Path) -> None:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), label=name, lw=1, alpha=0.6 if name.startswith("train") else 1)
    axes.set(xlabel="optimizer step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
