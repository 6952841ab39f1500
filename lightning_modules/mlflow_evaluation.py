"""What goes from a training's MLflow run to its evaluation, and back."""

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

from emmdit.weights import checkpoint_progress, find_checkpoint
from lightning_modules.mlflow_logger import RUN_FILE, MLflowLogger, git_tags


def log_evaluation(
    run: Path | None, metrics: Mapping[str, float], step: int, report: Path, about: Mapping[str, Any]
) -> None:
    """Log metrics, as `eval/NAME`, and the report to the MLflow run of a training, or to a new run if there is none.

    A store that does not answer costs a warning, not the evaluation.

    Args:
        run: run folder, whose `mlflow_run.json` names the run and its store; None: there is none.
        step: of the training that was evaluated.
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
        client = logger.experiment
        run_id = _existing(client, known.get("run_id"))
        if run_id is None:
            experiment = client.get_experiment_by_name(logger._experiment_name)
            created = client.create_run(experiment.experiment_id, tags=git_tags(), run_name=report.parent.name)
            run_id = created.info.run_id
            client.log_batch(run_id, params=[Param(key, str(value)[:500]) for key, value in about.items()])
            client.set_terminated(run_id)
        now = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric(f"eval/{k}", float(v), now, step) for k, v in metrics.items()])
        client.log_artifact(run_id, str(report), artifact_path="evaluation")
    except (MlflowException, OSError) as error:
        rank_zero_warn(f"MLflow did not take the evaluation: {error}")


def history(run: Path) -> dict[str, float | None]:
    """Time and losses of a finished run, from its tracker.

    `seconds_per_step` is the mean over the windows of the Throughput callback: without validation, pictures and
    checkpoints, but with whatever else slowed the machine down. `seconds` is all steps at that speed, so that a resume
    does not change it.
    """
    record = json.loads((run / RUN_FILE).read_text())
    client = MlflowClient(record["tracking_uri"])

    def curve(name: str) -> list[float]:
        points = sorted(client.get_metric_history(record["run_id"], name), key=lambda point: point.timestamp)
        return [value for _, value in sorted({point.step: point.value for point in points}.items())]  # the later try's

    times, losses = curve("throughput/seconds_per_step"), {k: curve(f"val/loss_{k}") for k in ("ema", "raw")}
    per_step = mean(times) if times else None
    return {
        "seconds": None if per_step is None else per_step * checkpoint_progress(find_checkpoint(run))["step"],
        "seconds_per_step": per_step,
        **{f"val_loss_{name}": values[-1] for name, values in losses.items() if values},
    }


def _existing(client: Any, run_id: str | None) -> str | None:
    if run_id is None:
        return None
    try:
        return run_id if client.get_run(run_id).info.lifecycle_stage == "active" else None
    except MlflowException:
        return None
