"""One MLflow run per training: begun lazily, continued by a resume, ended with the right status."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from mlflow.tracking import MlflowClient
from torch.utils.data import DataLoader

from emmdit.config_text import flatten_config, mask_secrets
from lightning_modules.callbacks.mlflow_system import MLflowSystemMetrics
from lightning_modules.mlflow_logger import MLflowLogger
from lightning_modules.mlflow_runs import metric_history, read_training_record, training_record


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory) -> Path:
    """A store with its tables: making them takes seconds, copying the file nothing."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}")
    return path


@pytest.fixture(autouse=True)
def store(request, tmp_path, empty_store) -> None:
    if not request.node.get_closest_marker("slow"):
        shutil.copy(empty_store, tmp_path / "mlflow.db")


class Toy(pl.LightningModule):
    def __init__(self, stop: BaseException | None = None, stop_at: int = 2) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.stop, self.stop_at = stop, stop_at

    def training_step(self, batch, batch_idx):
        if self.stop is not None and self.global_step == self.stop_at:
            if self.stop is signal.SIGTERM:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                raise self.stop
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    folder: Path | None, steps: int, ckpt_path=None, model: Toy | None = None, callbacks=(), params=None, **options
):
    logger = MLflowLogger(folder, experiment_name="test")
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        logger=logger,
        callbacks=[ModelCheckpoint(every_n_train_steps=2, save_last=True), *callbacks],
        accelerator="cpu",
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    if params:
        logger.log_hyperparams(params)
    trainer.fit(model or Toy(), DataLoader(torch.randn(8, 2), batch_size=2), ckpt_path=ckpt_path)
    return logger


def runs() -> list:
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    return client.search_runs([client.get_experiment_by_name("test").experiment_id])


def test_fit_then_resume_is_one_run(tmp_path):
    folder = tmp_path / "runs" / "a"
    first = fit(folder, 4, params={"lr": 0.1})
    (run,) = runs()
    assert run.info.status == "FINISHED" and run.info.run_name == "a"
    assert json.loads((folder / "mlflow_run.json").read_text())["run_id"] == run.info.run_id == first.run_id
    assert run.data.params == {"lr": "0.1"} and "command" in run.data.tags
    # the run folder, not the MLflow ids, decides where checkpoints are
    assert run.data.tags["checkpoint"] == str(folder / "checkpoints" / "last.ckpt")
    assert Path(run.data.tags["checkpoint"]).exists()

    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            run_id = trainer.logger.run_id
            trainer.logger._sender.flush()  # the status is sent in the background
            seen.append(trainer.logger.experiment.get_run(run_id).info.status)

    fit(folder, 7, ckpt_path="last", callbacks=[Look()])
    (run,) = runs()
    assert seen == ["RUNNING"] * 3
    assert run.info.status == "FINISHED" and run.data.tags["resume.count"] == "1"
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == list(range(7))


def test_fresh_fit_in_the_same_folder_is_a_new_run(tmp_path):
    first, second = fit(tmp_path / "a", 2).run_id, fit(tmp_path / "a", 2).run_id
    assert first != second and len(runs()) == 2
    assert json.loads((tmp_path / "a" / "mlflow_run.json").read_text())["run_id"] == second


def test_last_without_a_checkpoint_is_a_new_run(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mlflow_run.json").write_text('{"run_id": "none"}')
    fit(tmp_path / "a", 2, ckpt_path="last")  # nothing to resume from: Lightning warns and starts over
    assert len(runs()) == 1


@pytest.mark.parametrize(
    "stop,raises,status",
    [
        (ValueError("x"), ValueError, "FAILED"),
        (KeyboardInterrupt(), SystemExit, "KILLED"),
        (signal.SIGTERM, BaseException, "KILLED"),
    ],
)
def test_status_of_a_run_that_dies(tmp_path, stop, raises, status):
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(raises):
            fit(tmp_path / "a", 6, model=Toy(stop))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it after Ctrl-C
    (run,) = runs()
    assert run.info.status == status
    fit(tmp_path / "a", 6, ckpt_path="last")
    (run,) = runs()
    assert run.info.status == "FINISHED"


def test_changed_parameters_on_resume_are_a_tag(tmp_path):
    fit(tmp_path / "a", 2, params={"optimizer": {"lr": 0.1}, "width": 8})
    fit(tmp_path / "a", 4, ckpt_path="last", params={"optimizer": {"lr": 0.2}, "width": 8, "new": 1})
    (run,) = runs()
    assert run.data.params == {"optimizer.lr": "0.1", "width": "8", "new": "1"}
    assert run.data.tags["changed_params"] == "optimizer.lr: 0.1 -> 0.2"


def test_validate_adds_to_the_run_and_leaves_its_status(tmp_path):
    class Validated(Toy):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", 1.5)

    fit(tmp_path / "a", 2)
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (run,) = runs()
    client.update_run(run.info.run_id, status="RUNNING")  # say another process still trains
    logger = MLflowLogger(tmp_path / "a", experiment_name="test")
    trainer = pl.Trainer(logger=logger, accelerator="cpu", enable_progress_bar=False)
    loader = DataLoader(torch.randn(4, 2))
    trainer.validate(Validated(), loader, ckpt_path=str(tmp_path / "a" / "checkpoints" / "last.ckpt"), verbose=False)
    (run,) = runs()
    assert run.data.metrics["val/loss"] == 1.5 and run.info.status == "RUNNING"


def test_images_text_and_data_sets(tmp_path, monkeypatch):
    working_folder = tmp_path / "elsewhere"
    working_folder.mkdir()
    monkeypatch.chdir(working_folder)
    logger = MLflowLogger(tmp_path / "a", experiment_name="test")
    logger.log_image("samples", torch.zeros(4, 3, 8, 8), step=3)
    logger.log_image("samples/one", torch.zeros(3, 8, 8), step=3)
    logger.log_text("hf_token: abc\n", "notes.txt")
    logger.log_dataset("bare", "nowhere", "", context="validation")
    for _ in range(2):  # a resume logs it again
        logger.log_dataset("shapes", "synthetic://shapes", "Apache-2.0", "0123abcd")
    logger.log_metrics({"a": 1.0}, step=0)
    logger.log_metrics({"a": 2.0, "nan": float("nan")}, step=0)
    logger.finalize("success")
    client = logger.experiment
    (run,) = runs()
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"images", "notes.txt"} <= names
    assert len(client.list_artifacts(run.info.run_id, "images")) == 4  # PNG and preview of each
    data, bare = sorted(run.inputs.dataset_inputs, key=lambda entry: -len(entry.tags))
    assert bare.dataset.name == "bare"
    assert data.dataset.name == "shapes" and {t.key: t.value for t in data.tags}["license"] == "Apache-2.0"
    assert [m.value for m in client.get_metric_history(run.info.run_id, "a")] == [1.0, 2.0]
    # artifacts lie beside the database, and nothing lands in the working folder
    assert (
        tmp_path / "mlartifacts" / "test" / run.info.run_id / "artifacts" / "notes.txt"
    ).read_text() == "hf_token: ***\n"
    assert not list(working_folder.iterdir())


def test_the_run_folder_is_the_trainers_by_default(tmp_path):
    fit(None, 2, default_root_dir=tmp_path / "b")
    assert (tmp_path / "b" / "mlflow_run.json").exists() and (tmp_path / "b" / "checkpoints" / "last.ckpt").exists()
    assert runs()[0].info.run_name == "b"


def test_system_metrics(tmp_path):
    class Wait(pl.Callback):
        def on_train_end(self, *args):
            import time

            time.sleep(1.0)

    fit(tmp_path / "a", 2, callbacks=[Wait(), MLflowSystemMetrics(interval=0.2, samples=1)])
    (run,) = runs()
    assert "system/cpu_utilization_percentage" in run.data.metrics


def test_construction_touches_no_store(tmp_path, empty_store):
    database = tmp_path / "new" / "store.db"
    logger = MLflowLogger(tmp_path / "a", tracking_uri=f"sqlite:///{database}")
    assert logger.save_dir == str(tmp_path / "a") and not database.parent.exists()
    assert logger.experiment is not None and not database.exists()
    assert logger.experiment.search_experiments() and database.exists()


class Store:
    """The client of a store that knows two curves of a run resumed once."""

    points = {
        "throughput/seconds_per_step": [(49, 1, 0.2), (99, 2, 9.0), (99, 4, 0.4), (149, 5, 0.3)],
        "val/loss_ema": [(149, 5, 0.11), (99, 2, 0.2)],
    }

    def get_metric_history(self, run_id: str, name: str):
        return [SimpleNamespace(step=s, timestamp=t, value=v) for s, t, v in self.points.get(name, [])]


def test_time_and_loss_of_a_training():
    """Of steps that a resume made twice the later ones count, and validation is no part of the time."""
    assert metric_history(Store(), "1", "throughput/seconds_per_step") == {49: 0.2, 99: 0.4, 149: 0.3}
    history = partial(metric_history, Store(), "1")
    found = training_record(history, 150)
    assert found == {"seconds_per_step": pytest.approx(0.3), "seconds": pytest.approx(45.0), "val_loss_ema": 0.11}
    assert training_record(history, 100)["val_loss_ema"] == 0.2


def test_the_record_in_the_run_folder_comes_first(tmp_path, monkeypatch):
    (tmp_path / "train.json").write_text('{"steps": 150, "seconds": 7.0}')
    assert read_training_record(tmp_path, 150) == {"steps": 150, "seconds": 7.0}
    monkeypatch.setattr("lightning_modules.mlflow_runs.connect", lambda uri: Store())
    (tmp_path / "mlflow_run.json").write_text('{"run_id": "1", "tracking_uri": "sqlite:///mlflow.db"}')
    assert read_training_record(tmp_path, 100)["seconds"] == pytest.approx(30.0)


SCRIPT = """
import sys
from functools import partial
from pathlib import Path
from tests.test_mlflow_logger import fit
devices = int(sys.argv[2])
fit(Path(sys.argv[1]), 2, devices=devices, strategy="ddp" if devices > 1 else "auto")
"""


def start(tmp_path: Path, name: str, devices: int) -> subprocess.Popen:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [sys.executable, str(script), str(tmp_path / name), str(devices)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("names", "devices"), [("a", 2), ("ab", 1)], ids=["two ranks", "two jobs"])
def test_two_processes_on_a_fresh_store(tmp_path, names, devices):
    processes = [start(tmp_path, name, devices) for name in names]
    for process in processes:
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output
    found = {run.info.run_name: run for run in runs()}
    assert set(found) == set(names) and len(runs()) == len(names)
    assert all(run.info.status == "FINISHED" and "train/loss" in run.data.metrics for run in found.values())


def test_flatten_config():
    config = {
        "model": {
            "class_path": "x.TextToImage",
            "init_args": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}, "size": [1, 2]},
        },
        "trainer": {
            "callbacks": [
                {"class_path": "y.EMA", "init_args": {"decay": 0.9}},
                {"class_path": "y.Twice", "init_args": {}},
                {"class_path": "z.Twice"},
            ]
        },
        "hub": {"hf_token": "abc", "token": None, "pad_token": "<pad>", "tokens": 16},
        "uri": "http://me:pw@host:5000",
        "none": None,
    }
    assert flatten_config(config) == {
        "model": "x.TextToImage",
        "model.optimizer": "torch.optim.AdamW",
        "model.optimizer.lr": 1e-3,
        "model.size": [1, 2],
        "trainer.callbacks.EMA": "y.EMA",
        "trainer.callbacks.EMA.decay": 0.9,
        "trainer.callbacks.Twice_1": "y.Twice",
        "trainer.callbacks.Twice_2": "z.Twice",
        "hub.hf_token": "***",
        "hub.token": None,
        "hub.pad_token": "<pad>",
        "hub.tokens": 16,
        "uri": "http://***@host:5000",
        "none": None,
    }


def test_mask_secrets():
    kept = "  pad_token: <pad>\n  token: null\n  prompt: a secret garden\n"
    assert mask_secrets(f"a:\n  hf_token: abc\n  - password: 'x y'\n{kept}") == (
        f"a:\n  hf_token: ***\n  - password: ***\n{kept}"
    )
    assert mask_secrets("emmdit fit --model.api_key=k --hf_token t --x 1") == (
        "emmdit fit --model.api_key=*** --hf_token *** --x 1"
    )
    assert mask_secrets("postgresql://u:p@h/db") == "postgresql://***@h/db"
