"""MLflow runs of finished trainings: their curves, time and losses; and an evaluation added to one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from lightning_modules.mlflow_logger import RUN_FILE, MLflowLogger, git_tags


def metric_history(client: MlflowClient, run_id: str, name: str) -> dict[int, float]:
    """{step: value} of a metric, by step; of a step made twice (after a resume) the later value."""
    points = sorted(client.get_metric_history(run_id, name), key=lambda point: point.timestamp)
    return dict(sorted({point.step: point.value for point in points}.items()))


def training_record(client: MlflowClient, run_id: str, steps: int) -> dict[str, float | None]:
    """Time and last validation losses of a training of so many steps.

    `seconds_per_step` is the mean over the windows of the Throughput callback: without validation, sampling and
    checkpoints, but with whatever else slowed the machine down. `seconds` is all steps at that speed, so that a resume
    does not change it. Both are None without the callback.
    """
    times = metric_history(client, run_id, "throughput/seconds_per_step").values()
    per_step = mean(times) if times else None
    losses = {name: metric_history(client, run_id, f"val/{name}") for name in ("loss_ema", "loss_raw")}
    last = {name: [value for step, value in curve.items() if step <= steps][-1:] for name, curve in losses.items()}
    return {
        "seconds": None if per_step is None else per_step * steps,
        "seconds_per_step": per_step,
        **{f"val_{name}": value for name, values in last.items() for value in values},
    }


def read_training_record(run: Path, steps: int) -> dict[str, Any]:
    """`train.json` of a run folder (see `Summary`) if it is of so many steps, else what the run's tracker knows.

    Raises:
        OSError, MlflowException: the run has neither, or its tracker does not answer.
    """
    file = run / "train.json"
    if file.is_file() and (record := json.loads(file.read_text()))["steps"] == steps:
        return record
    known = json.loads((run / RUN_FILE).read_text())
    return {"steps": steps, **training_record(MlflowClient(known["tracking_uri"]), known["run_id"], steps)}


def log_evaluation(
    run: Path | None, metrics: Mapping[str, float], step: int, report: Path, about: Mapping[str, Any]
) -> None:
    """Log metrics, as `eval/NAME`, and the report to the MLflow run of a training, or to a new run if there is none.

    A store that does not answer costs a warning, not the evaluation.

    Args:
        run: run folder, whose `mlflow_run.json` names the run and its store; None: there is none.
        step: training step that was evaluated.
        about: what was evaluated, parameters of a new run.
    """
    record = run / RUN_FILE if run is not None else None
    known = json.loads(record.read_text()) if record is not None and record.is_file() else {}
    logger = MLflowLogger(
        save_dir=report.parent,
        experiment_name=known.get("experiment_name", "emmdit"),
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or known.get("tracking_uri"),
    )
    try:
        client, run_id = logger.experiment, known.get("run_id")
        if run_id is None or not _active(client, run_id):
            experiment = client.get_experiment_by_name(logger._experiment_name)
            run_id = client.create_run(
                experiment.experiment_id, tags=git_tags(), run_name=report.parent.name
            ).info.run_id
            client.log_batch(run_id, params=[Param(key, str(value)[:500]) for key, value in about.items()])
            client.set_terminated(run_id)
        now = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric(f"eval/{k}", float(v), now, step) for k, v in metrics.items()])
        client.log_artifact(run_id, str(report), artifact_path="evaluation")
    except (MlflowException, OSError) as error:
        rank_zero_warn(f"MLflow did not accept the evaluation: {error}")


def _active(client: MlflowClient, run_id: str) -> bool:
    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException:
        return False
