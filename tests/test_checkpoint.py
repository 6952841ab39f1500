"""Checkpoints: kills between any two system calls of a save, and what `last` falls back to."""

from __future__ import annotations

import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy

from emmdit.weights import checkpoint_progress, find_checkpoint, last_checkpoint, open_checkpoint
from lightning_modules.callbacks import Checkpoint
from lightning_modules.checkpoint_io import LocalCheckpointIO, link, remove
from tests.snapshots import snapshots
from tests.test_trust import Bomb
from tests.toy import Toy, trainer

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def fit(folder: Path, steps: int, ckpt: str | None = None) -> Toy:
    settings = dict(every_n_train_steps=1, save_last="link", filename="{step}", enable_version_counter=False)
    model, callback = Toy(), Checkpoint(dirpath=folder, **settings)
    trainer(folder, [callback], max_steps=steps, enable_checkpointing=True).fit(model, ckpt_path=ckpt)
    return model


def step_of(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True)["global_step"]


def test_no_kill_at_a_system_call_of_a_save_loses_the_run(tmp_path: Path) -> None:
    """The disk before each call of the third and the fourth save of a run: a resume loses a step at most."""
    whole, folder, steps = fit(tmp_path / "whole", 5), tmp_path / "run", []
    fit(folder, 2)
    with snapshots(folder, tmp_path / "kills") as calls:
        fit(folder, 4, "last")
    assert {"write", "fsync", "symlink", "unlink"} <= set(calls) and calls.count("replace") == 4
    assert calls.index("fsync") < calls.index("replace")  # nothing gets its name before it is on the disk
    for kill in sorted((tmp_path / "kills").iterdir(), key=lambda path: int(path.name)):
        last = last_checkpoint(kill)
        steps.append(step_of(last))
        resumed = fit(kill, 5, "last")
        assert resumed.training_steps == 5 and resumed.ids == whole.ids[4 * steps[-1] :]
        assert torch.equal(resumed.denoiser[0].weight, whole.denoiser[0].weight)
        assert not [path.name for path in kill.iterdir() if path.name.startswith(".")]  # what the kill left is gone
    assert steps == sorted(steps) and set(steps) == {2, 3, 4}
    assert len(steps) >= 7  # of each: a part, the new file, the new link; and the old file gone


KILL = """
import sys
from pathlib import Path
from tests.test_checkpoint import fit
fit(Path(sys.argv[1]), 100000)
"""


def test_a_real_kill_in_the_middle_of_saves(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILL, str(tmp_path)], cwd=ROOT, env=ENVIRONMENT, stderr=PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "last.ckpt").is_symlink() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.kill()
    process.communicate()
    step = step_of(last_checkpoint(tmp_path))
    assert step >= 1 and fit(tmp_path, step + 2, "last").training_steps == step + 2


def test_nothing_is_written_outside_the_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    fit(tmp_path / "run", 2)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["last.ckpt", "step=2.ckpt"]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    fit(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    ignored, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        with pytest.raises(OSError, match=r"step=2\.ckpt.*File too large") as error:
            fit(tmp_path, 2, "last")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", ["dangling", "missing", "truncated"])
def test_last_falls_back_to_the_newest_whole_checkpoint(tmp_path: Path, damage: str) -> None:
    fit(tmp_path, 2)
    last, newest = tmp_path / "last.ckpt", tmp_path / "step=2.ckpt"
    older = shutil.copy2(newest, tmp_path / "older.ckpt")
    os.utime(older, (1, 1))
    if damage == "truncated":
        newest.write_bytes(newest.read_bytes()[:-100])
    else:
        last.unlink()
        if damage == "dangling":
            last.symlink_to("gone.ckpt")
    expected = Path(older) if damage == "truncated" else newest
    with pytest.warns(UserWarning, match=f"last.ckpt.*{expected.name}"):
        assert find_checkpoint(tmp_path) == expected
    assert fit(tmp_path, 3, "last").training_steps == 3


def test_a_folder_without_a_whole_checkpoint_is_not_trained_over(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    (tmp_path / "step=2.ckpt").write_bytes(b"PK cut short")
    with pytest.raises(ValueError, match="step=2.ckpt"):
        fit(tmp_path, 3, "last")
    with pytest.raises(ValueError, match="step=2.ckpt"):
        find_checkpoint(tmp_path)
    assert fit(tmp_path / "empty", 1, "last").training_steps == 1  # a requeued job's first start


# ------------------------------------------------------------------------------ damage


def damaged(path: Path, damage: str) -> None:
    """Damage the checkpoint `path`, which the toy wrote."""
    content, checkpoint = path.read_bytes(), torch.load(path, weights_only=True)
    if damage in ("cut", "empty", "text", "flipped", "end flipped"):
        flip = {"flipped": len(content) // 2, "end flipped": len(content) - 5}.get(damage, 0)
        flipped = content[:flip] + bytes([content[flip] ^ 1]) + content[flip + 1 :]
        path.write_bytes({"cut": content[:-10], "empty": b"", "text": b"hello"}.get(damage, flipped))
        return
    if damage == "pickle":
        checkpoint["callbacks"] = {"bomb": Bomb(Path.touch, path.with_name("exploded"))}
    elif damage == "width":
        checkpoint["state_dict"]["denoiser.0.weight"] = torch.zeros(5, 2)
    elif damage == "no ema":
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if not key.startswith("ema_")}
    elif damage == "optimizer":
        checkpoint["optimizers"] = ["Lion"]
    elif damage == "older optimizer":
        del checkpoint["optimizers"]
        checkpoint["optimizer_states"][0]["param_groups"][0] |= {"betas": (0.9, 0.99)}
        del checkpoint["optimizer_states"][0]["param_groups"][0]["momentum"]
    elif damage != "a list":
        del checkpoint[damage]
    torch.save([1, 2] if damage == "a list" else checkpoint, path)


FOREIGN = {"width": "denoiser.0.weight", "no ema": "ema", "optimizer": "Lion.*SGD", "older optimizer": "optimizer"}
FOREIGN |= {key: key for key in ("samples_seen", "optimizer_states", "loops", "state_dict")}
FOREIGN |= {"pickle": "readable", "a list": "state_dict"}


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped", "end flipped", *FOREIGN])
def test_a_resume_from_what_is_no_checkpoint_of_the_run_ends_in_a_sentence(tmp_path: Path, damage: str) -> None:
    fit(tmp_path, 1)
    older = shutil.copy2(tmp_path / "step=1.ckpt", tmp_path / "older.ckpt")
    path = tmp_path / "step=1.ckpt"
    damaged(path, damage)
    with pytest.raises(ValueError) as error:
        fit(tmp_path, 3, str(path))
    told = str(error.value)
    assert str(path) in told and "\n" not in told and told.endswith(".") and len(told) < 600
    assert not (tmp_path / "exploded").exists()
    assert re.search(FOREIGN.get(damage, f"{older} is whole"), told)
    if damage not in FOREIGN:
        with pytest.warns(UserWarning, match="older.ckpt, the newest"):
            assert fit(tmp_path, 3, "last").training_steps == 3


def test_every_flipped_byte_is_seen(tmp_path: Path) -> None:
    fit(tmp_path, 1)
    path, other = tmp_path / "step=1.ckpt", tmp_path / "flipped.ckpt"
    content = path.read_bytes()
    for place in range(0, len(content), 97):
        other.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(ValueError, match=f"{other} is not a whole checkpoint.*{path} is whole"):
            open_checkpoint(other)


def test_a_checkpoint_without_a_checksum_is_checked_by_the_crcs_of_its_tensors(tmp_path: Path) -> None:
    fit(tmp_path, 1)
    checkpoint = torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    checkpoint["state_dict"]["denoiser.0.weight"] = torch.full((3, 2), 0.123)
    torch.save(checkpoint, tmp_path / "foreign.ckpt")
    assert open_checkpoint(tmp_path / "foreign.ckpt").step == 1
    content = (tmp_path / "foreign.ckpt").read_bytes()
    at = content.index(torch.tensor(0.123).numpy().tobytes())
    (tmp_path / "foreign.ckpt").write_bytes(content[:at] + b"x" + content[at + 1 :])
    with pytest.raises(ValueError, match="foreign.ckpt is not a whole checkpoint"):
        open_checkpoint(tmp_path / "foreign.ckpt")


def test_an_archive_that_declares_more_than_it_has_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    assert (tmp_path / "bomb.ckpt").stat().st_size < 20_000
    with pytest.raises(ValueError, match="no file of torch.save"):
        open_checkpoint(tmp_path / "bomb.ckpt")


# ------------------------------------------------------------------------------ opening


def test_what_was_opened_is_what_its_hash_says(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    opened = open_checkpoint(tmp_path)
    assert opened.path == (tmp_path / "step=2.ckpt").resolve() and (opened.step, opened.samples_seen) == (2, 8)
    assert opened.sha256 == hashlib.sha256(opened.path.read_bytes()).hexdigest()
    assert checkpoint_progress(opened.path) == {"step": 2, "samples_seen": 8}
    os.rename(tmp_path, tmp_path.with_name("moved"))  # a run may be moved, a checkpoint copied
    copied = Path(shutil.copy(tmp_path.with_name("moved") / "step=2.ckpt", tmp_path.with_name("copied.ckpt")))
    assert open_checkpoint(copied).sha256 == opened.sha256


def test_a_run_is_read_while_it_saves_every_step(tmp_path: Path) -> None:
    """The writer deletes each checkpoint right after the next; step and hash belong together."""
    io, stop, hashes = LocalCheckpointIO(None), threading.Event(), {}

    def train() -> None:
        previous, step = None, 0
        while not stop.is_set():
            step += 1
            path = tmp_path / f"step={step}.ckpt"
            io.save_checkpoint({"state_dict": {"a": torch.full((1000,), float(step))}, "global_step": step}, path)
            hashes[step] = hashlib.sha256(path.read_bytes()).hexdigest()
            link(path, tmp_path / "last.ckpt")
            if previous is not None:
                remove(previous)
            previous = path

    thread = threading.Thread(target=train)
    thread.start()
    try:
        while 1 not in hashes or not (tmp_path / "last.ckpt").exists():
            time.sleep(0.001)
        seen, deadline = [], time.monotonic() + 20
        while len({opened.step for opened in seen}) < 12 and time.monotonic() < deadline:
            seen.append(open_checkpoint(tmp_path))
    finally:
        stop.set()
        thread.join()
    assert len({opened.step for opened in seen}) == 12
    for opened in seen:
        assert (opened.state["a"] == opened.step).all() and opened.sha256 == hashes[opened.step]


def test_a_run_folder_is_a_checkpoint_too(tmp_path: Path) -> None:
    fit(tmp_path / "run/checkpoints", 2)
    assert fit(tmp_path / "other", 3, str(tmp_path / "run")).training_steps == 3


def test_a_checkpoint_from_an_address_is_read_as_tensors_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "downloads"))
    torch.save({"state_dict": {}, "x": Bomb(os.mkdir, str(tmp_path / "marker"))}, tmp_path / "evil.ckpt")
    torch.save({"state_dict": {}, "x": torch.ones(2)}, tmp_path / "good.ckpt")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        files = LocalCheckpointIO(SimpleNamespace())
        with pytest.raises(ValueError, match=r"evil\.ckpt"):
            files.load_checkpoint(f"{address}/evil.ckpt")
        assert files.load_checkpoint(f"{address}/good.ckpt")["x"].tolist() == [1, 1]
        server.shutdown()
    assert not (tmp_path / "marker").exists()


def test_what_cannot_write_or_read_safely_is_refused(tmp_path: Path) -> None:
    options = dict(max_steps=1, enable_checkpointing=True)
    with pytest.raises(ValueError, match="ModelParallelStrategy.*FSDP2Strategy"):
        Checkpoint(dirpath=tmp_path).setup(SimpleNamespace(strategy=ModelParallelStrategy()), Toy(), "fit")
    with pytest.raises(ValueError, match=r"trainer\.plugins: AsyncCheckpointIO"):
        trainer(tmp_path, [Checkpoint(dirpath=tmp_path)], plugins=[AsyncCheckpointIO()], **options).fit(Toy())
