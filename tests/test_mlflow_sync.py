"""What a run folder may do to MLflow: damaged or foreign records and journals, and evaluations of a run."""

# ruff: noqa: F811 (fixtures of the other module are parameters here)

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from lightning_modules.commands.main import main
from lightning_modules.mlflow_journal import find_journals
from lightning_modules.mlflow_runs import log_evaluation, read_training_record
from lightning_modules.mlflow_store import read_record
from tests.test_mlflow_faults import (  # noqa: F401
    Server,
    check_whole,
    fit,
    impatient,
    only_run,
    server,
    sync,
    tables,
)


@pytest.mark.parametrize("text", ["", '{"run_id": "12', "[]", '{"run_id": 7}', '{"run_id": "../x"}', "\0" * 50])
def test_a_damaged_record_is_named_and_replaced(tmp_path: Path, tables: Path, text: str) -> None:
    shutil.copy(tables, tmp_path / "mlflow.db")
    run, uri = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    fit(run, uri, steps=20)
    (run / "mlflow_run.json").write_text(text)
    logger, _, (message,) = fit(run, uri, steps=24, ckpt_path="last")
    assert str(run / "mlflow_run.json") in message and "remove it" in message and "char 0" not in message
    assert read_record(run)["run_id"] == logger.run_id
    (run / "mlflow_run.json").write_text(text)
    with pytest.raises(OSError, match="mlflow_run.json"):
        read_training_record(run, 20)


def evaluate(folder: Path, run: Path | None) -> Path:
    folder.mkdir(parents=True)
    report = folder / "report.html"
    report.write_text("<html>")
    log_evaluation(run, {"fid": 3.0}, 7, report, {"source": "http://a:hush@b"})
    return report


def test_an_evaluation_waits_for_its_training(tmp_path: Path, server: Server, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    run = tmp_path / "runs" / "run"
    server.die()
    fit(run, server.uri)
    with pytest.warns(UserWarning, match="emmdit runs sync"):
        evaluate(run / "evaluation" / "one", run)
    with pytest.warns(UserWarning, match="emmdit runs sync"):
        evaluate(tmp_path / "evaluations" / "two", None)
    server.start()
    monkeypatch.chdir(tmp_path)
    sync()
    check_whole(server.uri)
    client, training = only_run(server.uri)
    assert training.data.metrics["eval/fid"] == 3.0
    assert [f.path for f in client.list_artifacts(training.info.run_id, "evaluation")] == ["evaluation/report.html"]
    (own,) = client.search_runs([client.get_experiment_by_name("emmdit").experiment_id])
    assert own.info.run_name == "two" and own.data.params == {"source": "http://***@b"}
    assert own.info.status == "FINISHED" and not find_journals(tmp_path)


def test_a_run_folder_does_not_say_where_to_report(tmp_path: Path, tables: Path, monkeypatch) -> None:
    """The address in a stranger's record is neither asked nor sent anything."""
    shutil.copy(tables, tmp_path / "mlflow.db")
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.setblocking(False)
    run = tmp_path / "downloaded"
    run.mkdir()
    record = {"run_id": "0" * 32, "experiment_name": "test", "tracking_uri": address}
    (run / "mlflow_run.json").write_text(json.dumps(record))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=f"MLFLOW_TRACKING_URI.*{address}|{address}.*MLFLOW_TRACKING_URI"):
        evaluate(run / "evaluation" / "one", run)
    assert read_training_record(run, 5)["seconds"] is None
    fit(run, f"sqlite:///{tmp_path}/mlflow.db", steps=2)
    assert "eval/fid" in str(MlflowClient("sqlite:///mlflow.db").search_runs(["1"]))
    with pytest.raises(BlockingIOError):
        listener.accept()  # nobody came
    listener.close()


HOSTILE = [
    {"metrics": "x", "step": 1, "time": 1},
    {"metrics": {"a": 10**400, "b": "c", "d": True, "ok": 1}, "step": 1, "time": 1},
    {"metrics": {"a": 1.0}, "step": 10**30, "time": -(10**30)},
    {"params": [1]},
    {"params": {"a": {"b": 1}, "": "x"}},
    {"tags": None},
    {"text": "/etc/cron.d/x", "data": "eA=="},
    {"text": "a/../../../x", "data": "eA=="},
    {"text": 5},
    {"text": "fine.txt", "data": "not base64"},
    {"image": "../x", "data": "eA==", "id": "../..", "step": 1, "time": 1},
    {"image": "x", "data": "eA==", "id": "abc", "step": 1, "time": 1},
    {"dataset": 7},
    {"dataset": {"name": ["x"]}},
    {"status": ["FINISHED"]},
    {"status": "NONSENSE"},
    {"resumed": {}, "tags": 5},
    {"artifact": "/etc/passwd"},
]


def test_entries_of_a_stranger(tmp_path: Path, tables: Path, capsys) -> None:
    shutil.copy(tables, tmp_path / "mlflow.db")
    run = tmp_path / "downloaded"
    run.mkdir()
    header = {"run": {"uid": "abc", "experiment": "..", "name": 7, "tags": {"x": 1}, "start_time": "y", "of": 3}}
    lines = [json.dumps(entry) for entry in (header, *HOSTILE)]
    (run / "mlflow_journal.jsonl").write_text("\n".join([*lines, "\0garbage", ""]))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    before = {path for path in tmp_path.rglob("*") if "mlartifacts" not in path.parts}
    sync(run, "--tracking_uri", uri)
    said = capsys.readouterr().out
    assert "1 damaged lines" in said and len(said) < 2000
    (made,) = MlflowClient(uri).search_runs(["1"])
    assert made.data.metrics == {"ok": 1.0}
    after = {path for path in tmp_path.rglob("*") if "mlartifacts" not in path.parts}
    assert after - before <= {tmp_path / "mlflow.db.lock"} and not find_journals(run)


@pytest.mark.parametrize(
    "header", ["", "{}", "[]", '{"run": 5}', '{"run": {}}', '{"run": {"uid": "a\' OR 1"}}', "\xff"]
)
def test_a_foreign_journal_is_one_sentence(tmp_path: Path, capsys, header: str) -> None:
    path = tmp_path / "mlflow_journal.jsonl"
    path.write_text(header + "\n")
    with pytest.raises(SystemExit) as end:
        sync(tmp_path)
    assert end.value.code == 2 and str(path) in capsys.readouterr().err
    assert path.read_text() == header + "\n"


def test_sync_says_what_it_did(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    sync()
    assert "Nothing waits" in capsys.readouterr().out
    for arguments in (["runs", "sync", "no/such/run"], ["runs", "nonsense"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
    assert "no/such/run" in capsys.readouterr().err
