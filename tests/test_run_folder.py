"""Signals that stop a training, used and locked run folders, clones of a run, and work that must not end a run."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
import torch
from lightning.pytorch import Callback

from emmdit.weights import checkpoint_state, find_checkpoint
from lightning_modules.callbacks import Checkpoint, ImageGrid, StopSignals
from lightning_modules.callbacks.survive import make_survivable
from lightning_modules.commands.main import main
from lightning_modules.commands.run_folder import LOCK
from lightning_modules.runs import read_config
from tests.command_line import EXPERIMENTS, ON_CPU, cli, files
from tests.command_line import elsewhere as elsewhere
from tests.toy import Metrics, Toy, trainer

TINY = [
    *files("quickstart.yaml"),
    *ON_CPU,
    "--model.init_args.denoiser.init_args.num_attention_heads=2",
    "--model.init_args.denoiser.init_args.attention_head_dim=16",
    "--model.init_args.denoiser.init_args.block_groups=[1,1,1]",
    "--data.init_args.batch_size=4",
    "--data.init_args.validation_samples=16",
    "--data.init_args.num_workers=0",
    "--trainer.val_check_interval=3",
    "--trainer.log_every_n_steps=1",
    "--samples.prompts=null",
]


class Send(Callback):
    """Sends this process a signal at a step, in the training step or in the first batch of its validation."""

    def __init__(self, signum: int, step: int, validation: bool) -> None:
        self.signum, self.step, self.validation = signum, step, validation

    def on_train_batch_start(self, trainer, pl_module, *args) -> None:
        if not self.validation and pl_module.training_steps + 1 == self.step:
            os.kill(os.getpid(), self.signum)

    def on_validation_batch_start(self, trainer, pl_module, *args) -> None:
        if self.validation and pl_module.training_steps == self.step:
            os.kill(os.getpid(), self.signum)


def emmdit(*args: str) -> int:
    try:
        main(list(args))
    except SystemExit as end:
        return end.code or 0
    return 0


def fit(folder: str | Path, *args: str, steps: int = 4) -> int:
    return emmdit("fit", *TINY, f"--trainer.default_root_dir={folder}", f"--trainer.max_steps={steps}", *args)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps, with two batches of validation at step 3."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder.parent}/mlflow.db")
        patch.setattr(sys, "argv", ["emmdit"])
        assert fit(folder, steps=5) == 0
    return folder


# -- signals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "signum, status, validation",
    [
        (signal.SIGTERM, 143, True),
        pytest.param(signal.SIGTERM, 143, False, marks=pytest.mark.slow),
        (signal.SIGINT, 130, False),
    ],
)
def test_a_signal_saves_and_ends_and_the_resume_is_exact(
    signum: int, status: int, validation: bool, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    send = f"{{class_path: tests.test_run_folder.Send, init_args: {{signum: {int(signum)}, step: 3, validation: "
    assert fit("broken", f"--trainer.callbacks+={send}{str(validation).lower()}}}}}", steps=5) == status
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("emmdit fit: saved"))
    assert "step=3.ckpt at step 3;" in line and "--ckpt_path last" in line
    store = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (run,) = store.search_runs(["1"])
    assert run.info.status == "KILLED"
    assert fit("broken", "--ckpt_path=last", steps=5) == 0
    (run,) = store.search_runs(["1"])
    assert run.info.status == "FINISHED"
    a, b = (checkpoint_state(find_checkpoint(folder)) for folder in (trained, Path("broken")))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    theirs = mlflow.MlflowClient(f"sqlite:///{trained.parent}/mlflow.db")
    curves = [
        [(m.step, m.value) for m in client.get_metric_history(client.search_runs(["1"])[0].info.run_id, "train/loss")]
        for client in (store, theirs)
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 5
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_signal_ends_at_once_and_an_early_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    killed, stop = [], StopSignals()
    monkeypatch.setattr(os, "kill", lambda pid, signum: killed.append((pid, signum)))
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with pytest.raises(KeyboardInterrupt):
        stop._handle(signal.SIGINT, None)
    stop._handle(signal.SIGTERM, None)
    assert killed == [(os.getpid(), signal.SIGTERM)]  # nothing to save yet
    stop._armed = True
    stop._handle(signal.SIGINT, None)
    assert len(killed) == 1 and stop.signum == signal.SIGINT
    stop._handle(signal.SIGINT, None)
    assert killed[1:] == [(os.getpid(), signal.SIGINT)]


def test_an_interrupted_command_ends_in_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_modules.commands.export.export", interrupt)
    assert emmdit("export", "--ckpt", "x", "--out", "y") == 130
    assert "Traceback" not in capsys.readouterr().err


# -- used and locked folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", ["checkpoints/a.ckpt", "checkpoints/last.ckpt", "config-3.yaml", "mlflow_run.json"])
def test_a_used_folder_is_refused_and_left_as_it_is(sign: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "used" / sign
    file.parent.mkdir(parents=True)
    file.symlink_to("gone.ckpt") if "last" in sign else file.write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    assert fit("used") == 2
    error = capsys.readouterr().err
    assert all(words in error for words in (str(sign), "--ckpt_path last", "--trainer.default_root_dir"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_of_another_run_does_not_open_a_used_folder(trained: Path, capsys: pytest.CaptureFixture) -> None:
    Path("used").mkdir()
    Path("used/config.yaml").write_text("{}")
    assert fit("used", f"--ckpt_path={find_checkpoint(trained)}") == 2
    assert "used/config.yaml" in capsys.readouterr().err


def test_a_running_training_keeps_others_out(trained: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted(trained.rglob("*"))
    with (trained / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert fit(trained, "--ckpt_path=last", steps=9) == 2
    error = capsys.readouterr().err
    assert "Another training" in error and str(trained) in error
    assert sorted(trained.rglob("*")) == before


def test_a_repeated_command_and_last_in_an_empty_folder(trained: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint, told = find_checkpoint(trained), (trained / "train.json").read_text()
    for steps in (5, 2):
        assert fit(trained, "--ckpt_path=last", steps=steps) == 0
        out = capsys.readouterr().out
        assert "Nothing to do" in out and "step 5" in out and f"max_steps is {steps}" in out and "Next" not in out
    assert find_checkpoint(trained) == checkpoint and (trained / "train.json").read_text() == told
    assert fit("used", "--trainer.fast_dev_run=1") == 0  # writes nothing, so nothing is in its way
    assert not Path("used").exists() or [path.name for path in Path("used").iterdir()] == []
    assert fit("new", "--ckpt_path=last", "--trainer.logger=false", steps=1) == 0
    out = capsys.readouterr().out
    assert "new/checkpoints" in out and "zero" in out


def test_validate_needs_a_checkpoint_and_writes_nothing(trained: Path, capsys: pytest.CaptureFixture) -> None:
    config, before = str(trained / "config.yaml"), {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    for args, words in (
        ((), "--ckpt_path last"),
        (("--ckpt_path=last", "--trainer.default_root_dir=empty"), "empty/checkpoints"),
        (("--ckpt_path=nowhere.ckpt",), "nowhere.ckpt"),
    ):
        assert emmdit("validate", "-c", config, *args) == 2
        assert words in capsys.readouterr().err
    assert emmdit("validate", "-c", config, "--ckpt_path=last") == 0
    assert "val/loss_ema" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*")} == before
    assert not list(Path.cwd().iterdir())


# -- clones --------------------------------------------------------------------------------------------------


def test_a_clone_has_a_folder_of_its_own_and_follows_its_max_steps(trained: Path) -> None:
    config = str(trained / "config.yaml")
    text = Path(config).read_text()
    assert "total: ${trainer.max_steps}" in text and str(trained) not in text
    assert read_config(trained)["model"]["init_args"]["scheduler"]["init_args"]["total"] == 5
    clone = cli("-c", config, "--trainer.max_steps=3000", command="fit")
    assert clone.config.fit.model.init_args.scheduler.init_args.total == 3000
    assert clone.trainer.default_root_dir == str(trained.with_name("whole-2"))
    resumed = cli("-c", config, "--ckpt_path=last", command="fit")
    assert resumed.trainer.default_root_dir == str(trained)
    Path("other.yaml").write_text("trainer: {max_steps: 7}\n")
    changed = cli("-c", config, "-c", "other.yaml", command="fit")
    assert changed.trainer.default_root_dir == "runs/other"
    named = cli("-c", config, "--trainer.default_root_dir=here", command="fit")
    assert named.trainer.default_root_dir == "here"


def test_the_config_of_an_older_version_does_not_take_its_folder_along(trained: Path, tmp_path: Path) -> None:
    old = tmp_path / "runs" / "x" / "config-1.yaml"
    old.parent.mkdir(parents=True)
    text = (trained / "config.yaml").read_text()
    text = text.replace("default_root_dir: null", f"default_root_dir: {old.parent}").replace(
        "ckpt_path: null", "ckpt_path: last"
    )
    old.write_text(text)
    assert f"default_root_dir: {old.parent}" in text and "ckpt_path: last" in text
    assert cli(f"-c{old}", command="fit").trainer.default_root_dir == str(old.with_name("x").parent.parent / "x-2")


# -- work beside the training --------------------------------------------------------------------------------


def test_a_failing_grid_evaluation_or_logger_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such\nword")

    logger = Metrics(tmp_path)
    monkeypatch.setattr(logger, "log_metrics", fail)
    make_survivable(logger)
    grid = ImageGrid(["a"], every_n_steps=2)
    callbacks = [grid, Checkpoint(tmp_path / "c", every_n_train_steps=1, filename="{step}")]
    toy = Toy()
    toy.sample = fail
    with pytest.warns(UserWarning) as told:
        trainer(tmp_path, callbacks, max_steps=3, logger=logger, enable_checkpointing=True).fit(toy)
    texts = [str(warning.message) for warning in told]
    assert toy.training_steps == 3 and find_checkpoint(tmp_path / "c").name == "step=3.ckpt"
    assert any("grid of step 2" in text and "no such word" in text for text in texts)
    assert any("Metrics.log_metrics" in text for text in texts)


def test_checkpoints_are_saved_before_what_may_fail_and_wrong_prompts_are_refused(
    capsys: pytest.CaptureFixture,
) -> None:
    prompts = "{class_path: emmdit.evaluation.GenEvalPrompts, init_args: {first: 1}}"
    evaluation = "{class_path: lightning_modules.callbacks.Evaluation, init_args: {metrics: [], prompts: %s}}"
    options = (*files("quickstart.yaml"), *ON_CPU)
    order = [type(one) for one in cli(*options, command="fit").trainer.callbacks]
    assert order.index(Checkpoint) < order.index(StopSignals) < order.index(ImageGrid) == len(order) - 1
    for wrong, words in (
        ("--samples.prompts=[a dog]", "'dog'"),
        ("--samples.weights=[emu]", "'emu'"),
        ("--samples.columns=0", "samples.columns"),
        (f"--trainer.callbacks+={evaluation % prompts}", "bench"),  # GenEval's words are not those of the shapes
    ):
        assert emmdit("fit", *options, wrong, "--trainer.default_root_dir=new") == 2
        assert words in capsys.readouterr().err
    assert not Path("new").exists()


# -- ranks ---------------------------------------------------------------------------------------------------


def ranks(folder: Path, *args: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "lightning_modules", "fit", *TINY, f"--trainer.default_root_dir={folder}"]
    command += [
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--progress.every=0",
        "--trainer.max_steps=10000",
        *args,
    ]
    return subprocess.Popen(
        [*command, *args],
        cwd=EXPERIMENTS.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def gone(group: int, seconds: float) -> bool:
    """Whether no process of a group is left, after a while."""
    for _ in range(int(seconds * 10)):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_an_occupied_port_is_one_sentence_and_leaves_no_rank_behind(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        run = ranks(tmp_path / "run", MASTER_PORT=port)
        output = run.communicate(timeout=200)[0]
    assert run.returncode == 2 and port in output and "MASTER_PORT" in output and "Traceback" not in output
    assert gone(run.pid, 10)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_stop_together_whichever_got_the_signal(rank: int, tmp_path: Path) -> None:
    run = ranks(tmp_path / "run", "--trainer.val_check_interval=9000")
    lines = []
    for line in run.stdout:
        lines.append(line)
        if line.startswith("step 3/"):
            children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
            target = run.pid if rank == 0 else next(int(pid) for pid in children if "LOCAL_RANK=1" in environ(pid))
            os.kill(target, signal.SIGTERM)
    assert run.wait(60) == 143, "".join(lines)
    (step,) = re.findall(r"saved .* at step (\d+);", "".join(lines))
    assert find_checkpoint(tmp_path / "run").name == f"epoch=0-step={step}.ckpt"
    assert gone(run.pid, 10)


def environ(pid: str) -> str:
    return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")


@pytest.mark.slow
def test_ranks_end_with_rank_zero(tmp_path: Path) -> None:
    run = ranks(tmp_path / "run")
    for line in run.stdout:
        if line.startswith("step 2/"):
            os.kill(run.pid, signal.SIGKILL)
            break
    assert run.wait(60) == -9 and gone(run.pid, 15)
