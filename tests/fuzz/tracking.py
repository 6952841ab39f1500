"""Readers of what a run folder holds for MLflow: its record, and the journal that waits to be sent."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from tests.fuzz.tables import encoded
from tests.fuzz.target import target, write_json


def make_record(folder: Path) -> None:
    write_json(folder / "mlflow_run.json", {"run_id": "a" * 32, "uid": "b" * 32, "tracking_uri": "sqlite:///x.db"})
    write_json(folder / "train.json", {"steps": 3, "seconds": 1.5, "val_loss_ema": 0.5})


@target(make_record, cost=0.5)
def mlflow_record(folder: Path) -> None:
    from lightning_modules.mlflow_store import read_record

    read_record(folder)


@target(make_record, cost=0.5)
def training_record(folder: Path) -> None:
    from lightning_modules import mlflow_runs

    with mock.patch.object(mlflow_runs, "metric_history", lambda *_: {}), mock.patch.object(mlflow_runs, "connect"):
        mlflow_runs.read_training_record(folder, 3)


def make_journal(folder: Path) -> None:
    from base64 import b64encode

    from lightning_modules.mlflow_journal import JOURNAL, Journal

    journal = Journal(folder / f"{JOURNAL}.jsonl", {"run": {"uid": "b" * 32, "experiment": "x"}})
    journal.append({"metrics": {"loss": 0.5}, "step": 1, "time": 1})
    journal.append({"params": {"lr": "0.1"}})
    journal.append({"tags": {"a": "b"}})
    journal.append({"resumed": "c", "tags": {"a": "b"}})
    journal.append({"dataset": {"name": "x", "uri": "y", "digest": "z"}})
    journal.append({"text": "a/b.txt", "data": b64encode(b"hello").decode()})
    journal.append({"image": "samples", "id": "1", "step": 1, "time": 1, "data": b64encode(encoded()).decode()})
    journal.append({"status": "FINISHED", "time": 1})
    journal.close()


@target(make_journal, cost=4)
def mlflow_journal(folder: Path) -> None:
    from lightning_modules.mlflow_journal import JOURNAL, Journal
    from lightning_modules.mlflow_store import deliver

    client = mock.Mock()
    info, data = SimpleNamespace(lifecycle_stage="active"), SimpleNamespace(params={}, tags={})
    client.get_run.return_value = SimpleNamespace(info=info, data=data)
    journal = Journal(folder / f"{JOURNAL}.jsonl")
    try:
        while True:
            entries, mark = journal.pending()
            deliver(client, "a" * 32, entries)
            journal.sent(mark)
            if not entries:
                break
    finally:
        journal.close()
