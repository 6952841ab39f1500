"""MLflow dead, silent, locked, damaged, of another version, or back again: training goes on and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from mlflow.tracking import MlflowClient
from torch.utils.data import DataLoader
from werkzeug.serving import make_server

from lightning_modules import mlflow_sender, mlflow_store
from lightning_modules.commands.main import main
from lightning_modules.mlflow_journal import find_journals
from lightning_modules.mlflow_logger import MLflowLogger
from lightning_modules.mlflow_runs import metric_history
from lightning_modules.mlflow_store import read_record

STEPS = 40


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same faults in less time."""
    monkeypatch.setattr(mlflow_sender, "BACKOFF", (0.2, 1.0))
    monkeypatch.setattr(mlflow_store, "LOCKED_SECONDS", 0.5)
    monkeypatch.setitem(mlflow_store.REQUESTS, "MLFLOW_HTTP_REQUEST_TIMEOUT", "5")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables: making them takes seconds, copying the file nothing."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}")
    return path


class Server:
    """MLflow's own server in a thread, which can die and come back at the same address."""

    def __init__(self, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{database}")
        monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", f"{database.parent}/server_artifacts")
        monkeypatch.setenv("_MLFLOW_SERVER_REGISTRY_STORE", f"sqlite:///{database}")
        from mlflow.server import app, handlers

        for name in ("_tracking_store", "_artifact_repo", "_model_registry_store"):
            monkeypatch.setattr(handlers, name, None)
        own = os.environ["MLFLOW_TRACKING_URI"]
        handlers._get_tracking_store()  # names its database in this process' environment
        monkeypatch.setenv("MLFLOW_TRACKING_URI", own)
        self.app, self.port = app, 0
        self.start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._server = make_server("127.0.0.1", self.port, self.app, threaded=True)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def die(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(tmp_path: Path, tables: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    shutil.copy(tables, tmp_path / "server.db")
    server = Server(tmp_path / "server.db", monkeypatch)
    yield server
    server.die()


class Toy(pl.LightningModule):
    """Steps of ten milliseconds, and what happens at one of them."""

    def __init__(self, events: dict[int, Callable[[], None]] | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.events, self.times = events or {}, []

    def training_step(self, batch, batch_idx):
        self.times.append(time.perf_counter())
        self.events.get(self.global_step, lambda: None)()
        time.sleep(0.01)
        self.log("train/loss", float(self.global_step))
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    folder: Path, uri: str, steps: int = STEPS, events=None, ckpt_path=None
) -> tuple[MLflowLogger, np.ndarray, list[str]]:
    """The logger, seconds of each step, and the warnings of a training."""
    logger = MLflowLogger(folder, experiment_name="test", tracking_uri=uri)
    model = Toy(events)
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        logger=logger,
        callbacks=[ModelCheckpoint(every_n_train_steps=20, save_last=True)],
        accelerator="cpu",
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    logger.log_hyperparams({"lr": 0.1})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, DataLoader(torch.randn(8, 2), batch_size=2), ckpt_path=ckpt_path)
    told = [str(warning.message) for warning in caught if "MLflow" in str(warning.message)]
    return logger, np.diff(model.times), told


def only_run(uri: str):
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    return client, run


def check_whole(uri: str, steps: int = STEPS) -> None:
    client, run = only_run(uri)
    assert metric_history(client, run.info.run_id, "train/loss") == {step: step for step in range(steps)}
    assert run.info.status == "FINISHED" and run.data.params == {"lr": "0.1"} and "checkpoint" in run.data.tags


def sync(*args: object) -> str:
    main(["runs", "sync", *map(str, args)])


HELD: list = []  # what a fault holds open


def dead(folder: Path) -> str:
    return "http://127.0.0.1:1"


def black_hole(folder: Path) -> str:
    listener = socket.create_server(("127.0.0.1", 0))
    HELD.append(listener)  # accepts by its backlog and never answers
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def foreign_server(folder: Path) -> str:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Foreign(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>another service</html>")

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Foreign)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def garbage(folder: Path) -> str:
    (folder / "store.db").write_bytes(os.urandom(4096))
    return f"sqlite:///{folder}/store.db"


def locked(folder: Path) -> str:
    connection = sqlite3.connect(folder / "mlflow.db", isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN EXCLUSIVE")
    HELD.append(connection)
    return f"sqlite:///{folder}/mlflow.db"


def read_only(folder: Path) -> str:
    return "sqlite:////proc/mlflow.db"


def other_version(folder: Path) -> str:
    with sqlite3.connect(folder / "mlflow.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'of_tomorrow'")
    connection.close()
    return f"sqlite:///{folder}/mlflow.db"


def a_folder(folder: Path) -> str:
    (folder / "store.db").mkdir()
    return f"sqlite:///{folder}/store.db"


def no_scheme(folder: Path) -> str:
    return "htp://nowhere"


FAULTS = [dead, black_hole, foreign_server, garbage, locked, read_only, other_version, a_folder, no_scheme]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_training_goes_on_without_a_store(tmp_path: Path, tables: Path, fault, monkeypatch) -> None:
    shutil.copy(tables, tmp_path / "mlflow.db")
    shutil.copy(tables, tmp_path / "healthy.db")
    address = fault(tmp_path)
    for attempt in range(3):  # on a busy machine any two measurements may differ
        _, healthy, told = fit(tmp_path / f"healthy{attempt}", f"sqlite:///{tmp_path}/healthy.db")
        assert told == [] and not find_journals(tmp_path / f"healthy{attempt}")
        run = tmp_path / f"run{attempt}"
        started = time.perf_counter()
        with monkeypatch.context() as patch:
            patch.setattr(mlflow_sender.Sender.close, "__defaults__", (2.0, 5.0))
            _, seconds, told = fit(run, address)
        assert time.perf_counter() - started < seconds.sum() + 12
        if np.median(seconds) * 0.9 < np.median(healthy) and seconds[3:].sum() < healthy[3:].sum() + 2:
            break
    else:
        pytest.fail(f"a step takes {np.median(seconds)} s without a store, {np.median(healthy)} s with one")
    (message,) = told
    assert "emmdit runs sync" in message and str(run) in message and len(message) < 1000
    assert read_record(run)["run_id"] is None

    while HELD:
        HELD.pop().close()
    shutil.copy(tables, tmp_path / "back.db")
    uri = f"sqlite:///{tmp_path}/back.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    sync(run)
    check_whole(uri)
    assert not find_journals(run) and read_record(run)["run_id"] == only_run(uri)[1].info.run_id


def test_a_server_that_dies_and_comes_back(tmp_path: Path, server: Server) -> None:
    """Dead from step 10 to step 40 of 100: the run ends with everything there."""
    events = {10: server.die, 30: lambda: time.sleep(2.0), 40: server.start}
    _, _, told = fit(tmp_path / "run", server.uri, steps=100, events=events)
    assert len(told) == 1
    check_whole(server.uri, 100)
    assert not find_journals(tmp_path / "run")
    assert "resume.count" not in only_run(server.uri)[1].data.tags


def test_a_resume_sends_what_waits(tmp_path: Path, server: Server) -> None:
    run = tmp_path / "run"
    _, _, told = fit(run, server.uri, events={10: server.die})
    assert len(told) == 1 and find_journals(run)
    server.start()
    logger, _, told = fit(run, server.uri, steps=60, ckpt_path="last")
    assert told == [] and not find_journals(run)
    check_whole(server.uri, 60)
    assert only_run(server.uri)[1].data.tags["resume.count"] == "1"
    assert logger.run_id == only_run(server.uri)[1].info.run_id


def test_a_run_begun_without_the_store_is_made_once(tmp_path: Path, server: Server, monkeypatch) -> None:
    """Also if the answer to its creation is lost, and the resume begins without the store again."""
    run, uri = tmp_path / "run", server.uri
    server.die()
    for steps in (20, 40):
        fit(run, uri, steps=steps, ckpt_path="last" if steps > 20 else None)
    server.start()
    create = MlflowClient.create_run

    def lost(self, *args, **kwargs):
        create(self, *args, **kwargs)
        raise ConnectionResetError("the answer is lost")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_run", lost)
        with pytest.raises(SystemExit) as end:
            sync(run, "--tracking_uri", uri)
        assert end.value.code == 2
    sync(run, "--tracking_uri", uri)
    check_whole(uri)
    client, made = only_run(uri)
    assert made.info.run_name == "run" and made.data.tags["resume.count"] == "1"
    assert made.info.start_time < made.info.end_time <= time.time() * 1000


def test_sending_twice_does_no_harm(tmp_path: Path, tables: Path) -> None:
    run, uri = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    logger = MLflowLogger(run, experiment_name="test", tracking_uri="http://127.0.0.1:1")
    with pytest.warns(UserWarning, match="emmdit runs sync"):
        logger.log_hyperparams({"token": "hush"})
        for step in range(5):
            logger.log_metrics({"a": step, "nan": float("nan")}, step)
        logger.log_image("samples", torch.zeros(3, 8, 8), step=3)
        logger.log_text("hf_token: hush", "notes/a.txt")
        logger.log_dataset("shapes", "http://me:hush@host", "Apache-2.0")
        logger.finalize("success")
    copies = {path: path.read_bytes() for path in find_journals(run)}
    assert len(copies) == 2 and not any(b"hush" in text for text in copies.values())
    shutil.copy(tables, tmp_path / "mlflow.db")
    for _ in range(2):
        for path, text in copies.items():
            path.write_bytes(text)
        sync(run, "--tracking_uri", uri)
    client, made = only_run(uri)
    assert [point.value for point in client.get_metric_history(made.info.run_id, "a")] == [0, 1, 2, 3, 4]
    assert len(client.list_artifacts(made.info.run_id, "images")) == 2  # PNG and preview
    assert len(client.list_artifacts(made.info.run_id, "notes")) == 1
    assert len(made.inputs.dataset_inputs) == 1


def test_an_artifact_store_may_fail_alone(tmp_path: Path, tables: Path) -> None:
    shutil.copy(tables, tmp_path / "mlflow.db")
    (tmp_path / "mlartifacts").write_text("a file where the folder should be")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    logger = MLflowLogger(tmp_path / "run", experiment_name="test", tracking_uri=uri)
    logger.log_text("x", "a.txt")
    logger.log_metrics({"a": 1.0}, 0)
    with pytest.warns(UserWarning, match="emmdit runs sync"):
        logger.finalize("success")
    _, made = only_run(uri)
    assert made.data.metrics == {"a": 1.0} and made.info.status == "FINISHED"
    (tmp_path / "mlartifacts").unlink()
    sync(tmp_path / "run", "--tracking_uri", uri)
    assert [item.path for item in MlflowClient(uri).list_artifacts(made.info.run_id)] == ["a.txt"]


def test_what_the_store_refuses_holds_nothing_up(tmp_path: Path, tables: Path) -> None:
    shutil.copy(tables, tmp_path / "mlflow.db")
    logger = MLflowLogger(tmp_path / "run", experiment_name="test", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    logger.log_metrics({"a": 1.0, "b" * 300: 2.0, "../c": 3.0}, 0)
    logger.log_text("x", "../../outside.txt")
    with pytest.warns(UserWarning, match="did not accept"):
        logger.finalize("success")
    _, made = only_run(logger.tracking_uri)
    assert made.data.metrics["a"] == 1.0 and made.info.status == "FINISHED" and not find_journals(tmp_path / "run")
    assert not list(tmp_path.rglob("outside.txt"))


@pytest.mark.slow
def test_the_commands_without_a_server(tmp_path: Path, tables: Path, monkeypatch) -> None:
    """fit, evaluate and runs sync as a user calls them; afterwards the store knows what it knows of a healthy run."""
    root = Path(__file__).parents[1]
    shutil.copy(tables, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    def emmdit(address: str, *args: object) -> str:
        environment = {**os.environ, "MLFLOW_TRACKING_URI": address, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "lightning_modules", *map(str, args)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
        return done.stderr

    sizes = ["--data.init_args.batch_size=4", "--samples.steps=2", "--trainer.max_steps=8", "--trainer.accelerator=cpu"]
    sizes += ["--trainer.log_every_n_steps=1", "--trainer.logger.init_args.experiment_name=test"]
    for name, address in (("healthy", uri), ("dead", "http://127.0.0.1:1")):
        run = tmp_path / name
        told = emmdit(address, "fit", "-c", "experiments/quickstart.yaml", *sizes, f"--trainer.default_root_dir={run}")
        assert told.count("emmdit runs sync") == (name == "dead")
    (tmp_path / "two.txt").write_text("a photo of a red circle\na photo of a cross\n")
    clip = f"{{class_path: emmdit.evaluation.CLIP, init_args: {{source: {root}/assets/shapes_clip}}}}"
    (tmp_path / "clip.yaml").write_text(
        f"prompts: {{class_path: emmdit.evaluation.PromptFile, init_args: {{path: {tmp_path}/two.txt}}}}\n"
        f"metrics: [{{class_path: emmdit.evaluation.CLIPScore, init_args: {{clip: {clip}}}}}]\n"
    )
    ledger = ["--ledger", tmp_path / "ledger.json", "--experiment", "shapes/dead"]
    emmdit("http://127.0.0.1:1", "evaluate", "--ckpt", run, "-c", tmp_path / "clip.yaml", "--steps", 2, *ledger)
    assert json.loads((tmp_path / "ledger.json").read_text())[0]["train"]["steps"] == 8
    emmdit(uri, "runs", "sync", run)

    client = MlflowClient(uri)
    known = {
        found.info.run_name: found
        for found in client.search_runs([client.get_experiment_by_name("test").experiment_id])
    }
    healthy, late = known["healthy"], known["dead"]
    assert (
        late.info.status == healthy.info.status == "FINISHED" and late.data.params.keys() == healthy.data.params.keys()
    )
    for metric in ("train/loss", "grad_norm", "epoch"):
        curves = [metric_history(client, one.info.run_id, metric) for one in (healthy, late)]
        assert curves[0] == curves[1] and len(curves[0]) == 8
    assert late.data.metrics.keys() - healthy.data.metrics.keys() == {"eval/clip_score_shapes"}
    images = [client.list_artifacts(one.info.run_id, "images") for one in (healthy, late)]
    assert len(images[0]) == len(images[1]) == 2 and late.inputs.dataset_inputs
    assert (tmp_path / "dead/curve.csv").read_text() == (tmp_path / "healthy/curve.csv").read_text()
