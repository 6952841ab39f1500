"""Checkpoints: kills between any two system calls of a save, and what `last` falls back to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from emmdit.weights import find_checkpoint, last_checkpoint
from lightning_modules.callbacks import Checkpoint
from tests.toy import Toy, trainer

CALLS = ("symlink", "replace", "rename", "remove", "unlink")


class Killed(BaseException):
    """A kill that runs no handler of ours."""


def fit(folder: Path, steps: int, ckpt: str | None = None) -> Toy:
    settings = dict(every_n_train_steps=1, save_last="link", filename="{step}", enable_version_counter=False)
    model, callback = Toy(), Checkpoint(dirpath=folder, **settings)
    trainer(folder, [callback], max_steps=steps, enable_checkpointing=True).fit(model, ckpt_path=ckpt)
    return model


def step_of(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True)["global_step"]


def test_no_kill_at_a_system_call_of_a_save_loses_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each call that links, renames or deletes in the run's folder, during the third save of a run."""
    whole = fit(tmp_path / "whole", 5)
    kills = 0
    for number in range(20):
        folder, calls = tmp_path / str(number), []

        def counting(name: str, folder: Path = folder, calls: list = calls, number: int = number):
            original = getattr(os, name)

            def call(*args, **kwargs):
                if any(str(folder) in str(arg) for arg in args) and (folder / "step=2.ckpt").exists():
                    calls.append(name)
                    if len(calls) == number + 1:
                        raise Killed
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, counting(name))
            try:
                fit(folder, 3)
            except Killed:
                kills += 1
            else:
                break
        found = last_checkpoint(folder)
        assert found is not None and step_of(found) >= 1, calls
        resumed = fit(folder, 5, "last")
        assert resumed.training_steps == 5 and resumed.ids == whole.ids[4 * step_of(found) :]
        assert {path.name for path in folder.glob("last*")} == {"last.ckpt"}
    assert kills >= 4  # of the link and the deletion of two saves, at least


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
