"""What a run leaves for its reader: the loss curve in the run folder, and a last word on where everything is."""

from __future__ import annotations

import csv
import os
import shutil
import sys
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from mlflow import MlflowClient

from lightning_modules.mlflow_logger import MLflowLogger

CURVES = ("train/loss", "val/loss_ema", "val/loss_raw")
PARTS = ("train/task", "train/output", "train/features", "train/repa", "val/loss_teacher")  # where there are some


class Summary(Callback):
    """When training ends, writes `curve.csv` and `curve.png` and prints where everything is and what to try next.

    The curves come from the tracker's history, so that a resumed run gives one curve.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        run_dir = Path(trainer.default_root_dir)
        logger = next((logger for logger in trainer.loggers if isinstance(logger, MLflowLogger)), None)
        lines = [f"\nRun folder   {run_dir}"]
        if logger is not None:
            curve = history(logger.experiment, logger.run_id)
            write_csv(curve, run_dir / "curve.csv")
            if any(curve.values()):
                plot(curve, run_dir / "curve.png")
                lines.append(f"Loss curve   {run_dir / 'curve.png'}  (curve.csv)")
        pictures = sorted((run_dir / "samples").glob("step_*.png"))
        if pictures:
            lines.append(f"Pictures     {pictures[-1]}")
        checkpoint = trainer.checkpoint_callback.last_model_path if trainer.checkpoint_callback else ""
        if checkpoint:
            lines.append(f"Checkpoint   {checkpoint}")
        if logger is not None:
            lines.append(f"MLflow run   {logger.run_id} in {logger.tracking_uri}")
        prompt = "a photo of a red circle and a blue square"
        lines += [
            "\nNext:",
            f'  {program("emmdit")} sample --ckpt {run_dir} --prompt "{prompt}" --num-images 8 --out out',
            f"  {program('emmdit')} export --ckpt {run_dir} --out exported",
            f"  {program('mlflow')} ui --backend-store-uri {logger.tracking_uri if logger else 'sqlite:///mlflow.db'}",
        ]
        print("\n".join(lines), flush=True)


def program(name: str) -> str:
    """How to call a command of this environment: its name where the environment is activated, else its path."""
    return name if shutil.which(name) else os.path.relpath(Path(sys.executable).with_name(name))


def history(client: MlflowClient, run_id: str) -> dict[str, dict[int, float]]:
    """{metric: {step: value}}; of steps that were made twice (after a resume) the later value."""
    curves = {}
    for name in CURVES + PARTS:
        points = sorted(client.get_metric_history(run_id, name), key=lambda point: point.timestamp)
        if not points and name in PARTS:
            continue
        curves[name] = dict(sorted({point.step: point.value for point in points}.items()))
    return curves


def write_csv(curves: dict[str, dict[int, float]], path: Path) -> None:
    """One row a step, one column a curve, empty where a curve has no point."""
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
        if curve:
            axes.plot(
                list(curve),
                list(curve.values()),
                label=name,
                lw=1,
                alpha=0.6 if name.startswith("train") else 1,
            )
    axes.set(xlabel="optimizer step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
