"""MLflow runs of finished trainings: their curves, time and losses; and an evaluation added to one."""

from __future__ import annotations

import base64
import math
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from mlflow.tracking import MlflowClient

from emmdit.config_text import mask_secrets
from emmdit.files import read_json, resolved
from lightning_modules.mlflow_sender import Sender
from lightning_modules.mlflow_store import RUN_FILE, connect, describe, git_tags, read_record, store_address

LAST = ("loss_ema", "loss_raw", "caption_gain")  # of val/, in a training's record
RECORDED = ("throughput/seconds_per_step", *(f"val/{name}" for name in LAST))
Points = list[tuple[int, int, float]]  # (time in ms, step, value)


def metric_history(client: MlflowClient, run_id: str, name: str) -> dict[int, float]:
    """{step: value} of a metric, by step; of a step made twice (after a resume) the later value."""
    return _by_step([(point.timestamp, point.step, point.value) for point in client.get_metric_history(run_id, name)])


def _by_step(points: Points) -> dict[int, float]:
    return dict(sorted({step: value for _, step, value in sorted(points, key=lambda point: point[0])}.items()))


def curves(client: MlflowClient | None, sender: Sender, names: Iterable[str]) -> dict[str, dict[int, float]]:
    """Curves of a sender's run: what the store knows, if there is one and it answers, and what waits in the journal."""
    found: dict[str, Points] = {name: [] for name in names}
    try:
        for name in found if client is not None else ():
            found[name] = [(p.timestamp, p.step, p.value) for p in client.get_metric_history(sender.run_id, name)]
    except Exception as error:  # of any library below MLflow
        sender.trouble = sender.trouble or describe(error)
    for entry in sender.waiting("metrics"):
        for name in found.keys() & entry["metrics"].keys():
            found[name].append((entry["time"], entry["step"], entry["metrics"][name]))
    return {name: _by_step(points) for name, points in found.items()}


def training_record(history: Callable[[str], Mapping[int, float]], steps: int) -> dict[str, float | None]:
    """Time and last validation losses of a training of so many steps; `history` gives the curve of a metric.

    `seconds_per_step` is the mean over the windows of the Throughput callback: without validation, sampling and
    checkpoints, but with whatever else slowed the machine down. `seconds` is all steps at that speed, so that a resume
    does not change it. Both are None without the callback.
    """
    times = history("throughput/seconds_per_step").values()
    per_step = mean(times) if times else None
    losses = {name: history(f"val/{name}") for name in LAST}
    last = {
        name: [value for step, value in curve.items() if step <= steps and math.isfinite(value)][-1:]
        for name, curve in losses.items()
    }
    return {
        "seconds": None if per_step is None else per_step * steps,
        "seconds_per_step": per_step,
        **{f"val_{name}": value for name, values in last.items() for value in values},
    }


def read_training_record(run: Path, steps: int) -> dict[str, Any]:
    """`train.json` of a run folder (see `Summary`) if it is of so many steps, else what the user's tracker knows.

    Raises:
        OSError: the run has neither, or the tracker does not answer; in one sentence.
    """
    file = run / "train.json"
    try:
        if file.is_file() and (record := read_json(file))["steps"] == steps:
            return record
    except (ValueError, TypeError, KeyError) as error:
        raise OSError(f"{file} is damaged: remove it.") from error
    try:
        known = read_record(run) or {}
        if not known.get("run_id"):
            raise ValueError(f"{run / RUN_FILE} names no run that MLflow knows.")
        history = partial(metric_history, connect(store_address()), known["run_id"])
        return {"steps": steps, **training_record(history, steps)}
    except Exception as error:  # of any library below MLflow
        raise OSError(f"{describe(error)}") from error


def log_evaluation(
    run: Path | None, metrics: Mapping[str, float], step: int, report: Path, about: Mapping[str, Any]
) -> None:
    """Log metrics, as `eval/NAME`, and the report to the MLflow run of a training, or to a new run if there is none.

    It goes to the user's store, whatever store the run folder names. If that does not work, it waits in a journal
    beside the report, with a warning; nothing is raised.

    Args:
        run: run folder, whose `mlflow_run.json` names the run; None: there is none.
        step: training step that was evaluated.
        about: what was evaluated, parameters of a new run.
    """
    try:
        known = read_record(run) if run is not None else None
    except ValueError as error:
        known = None
        rank_zero_warn(f"{error} This evaluation is logged to an MLflow run of its own.")
    known = known or {}
    name = known.get("experiment_name")
    own = {
        "uid": uuid.uuid4().hex,
        "of": {key: known.get(key) for key in ("uid", "run_id", "tracking_uri")},
        "experiment": name if isinstance(name, str) else "emmdit",
        "name": resolved(report.parent).name,
        "tags": git_tags(),
        "params": {key: mask_secrets(str(value)) for key, value in about.items()},
        "start_time": int(time.time() * 1000),
        "status": "FINISHED",
    }
    numbers = {f"eval/{key}": float(value) for key, value in metrics.items()}
    try:
        sender = Sender(store_address(), own, report.parent)
        sender.append({"metrics": numbers, "step": step, "time": own["start_time"]})
        text = base64.b64encode(report.read_bytes()).decode()
        sender.append({"text": "evaluation/report.html", "data": text})
        sent = sender.close()
        for remark in sender.remarks:
            rank_zero_warn(remark)
        if not sent:
            rank_zero_warn(sender.message(report.parent))
    except OSError as error:
        rank_zero_warn(f"The evaluation could not be logged: {error}")
