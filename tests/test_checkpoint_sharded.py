"""Sharded checkpoints: kills, full disks and damage, with FSDP2 on two processes; damaged folders in one."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from emmdit.checkpoint_files import entry
from emmdit.checkpoint_reader import load_sharded, save_sharded
from emmdit.weights import open_checkpoint
from lightning_modules.callbacks import Checkpoint
from lightning_modules.checkpoint_io import install, write_manifest
from tests.test_checkpoint import ENVIRONMENT, ROOT
from tests.toy import Toy, trainer

SCRIPT = """
import json, resource, signal, sys
from contextlib import nullcontext
from pathlib import Path
import torch
from emmdit.weights import last_checkpoint, open_checkpoint
from lightning_modules.callbacks import Checkpoint
from lightning_modules.parallel import FSDP2Strategy
from tests.snapshots import snapshots
from tests.test_denoiser_module import Rows, module
from tests.toy import trainer

root = Path(sys.argv[1])

def fit(folder, steps, ckpt_path=None, optimizer=torch.optim.AdamW, **options):
    model = module(**options)
    model.configure_optimizers = lambda: optimizer([p for p in model.parameters() if p.requires_grad], lr=0.1)
    save = Checkpoint(dirpath=folder, every_n_train_steps=1, save_last="link", filename="{step}",
        enable_version_counter=False)
    run = trainer(folder, [save], devices=2, strategy=FSDP2Strategy(), max_steps=steps, enable_checkpointing=True)
    rows = torch.utils.data.DataLoader(Rows(), batch_size=2, sampler=range(run.global_rank, 64, 2))
    run.fit(model, rows, ckpt_path=ckpt_path)
    return run

def say(run, *words):
    with (root / f"told_{run.global_rank}").open("a") as file:
        print(json.dumps(words), file=file)

folder = root / "run"
first = fit(folder, 2)
wait = first.strategy.barrier
recorded = snapshots(folder, root / "kills") if first.is_global_zero else nullcontext([])
with recorded as calls:
    fit(folder, 4, "last")
say(first, "calls", sorted(set(calls)), len(calls))

wait()
kills = sorted((root / "kills").iterdir(), key=lambda path: int(path.name))
say(first, "states", len(kills), sorted({open_checkpoint(last_checkpoint(kill)).step for kill in kills}))
for kill in (kills[len(kills) // 2],):
    wait()
    again = fit(kill, 4, "last")
    hidden = [path.name for path in kill.iterdir() if path.name.startswith(".")]
    say(first, "resumed", again.global_step, hidden)

def refused(name, *args, **options):
    try:
        fit(*args, **options)
    except (ValueError, OSError) as error:
        say(first, name, str(error))

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
refused("full", folder, 5, "last")
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
say(first, "left", sorted(path.name for path in folder.iterdir()))
refused("ema", folder, 5, "last", ema=True)
refused("optimizer", folder, 5, "last", optimizer=torch.optim.SGD)
wait()  # the other process may still be reading
if first.is_global_zero:
    shard = folder / "step=4.ckpt/__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-50])
wait()
refused("cut", folder, 5, str(folder / "step=4.ckpt"))
"""


@pytest.mark.slow
def test_two_processes_survive_kills_full_disks_and_damage(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)],
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found, other = (
        {name: values for name, *values in map(json.loads, (tmp_path / f"told_{rank}").read_text().splitlines())}
        for rank in (0, 1)
    )
    assert {"fsync", "rename", "replace", "symlink", "rmdir", "unlink"} <= set(found["calls"][0])
    assert found["states"][0] >= 15 and found["states"][1] == [2, 3, 4]
    assert found["resumed"] == [4, []]
    assert "step=5.ckpt could not be written (" in found["full"][0]
    assert found["left"][0] == ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]
    assert "EMA" in found["ema"][0] and "(AdamW, here SGD)" in found["optimizer"][0]
    assert "step=4.ckpt is not a whole checkpoint" in found["cut"][0] and "__1_0.distcp" in found["cut"][0]
    for name in ("full", "ema", "optimizer", "cut"):
        assert "\n" not in found[name][0] and found[name] == other[name]


# ------------------------------------------------------------------------------ in one process


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded checkpoint with an older, whole one beside it."""
    for step in (1, 2):
        path = tmp_path / f"run/checkpoints/step={step}.ckpt"
        part = tmp_path / "run/checkpoints/part"
        state = {"denoiser.weight": torch.full((40, 50), float(step)), "denoiser.bias": torch.zeros(40)}
        with warnings.catch_warnings(action="ignore"):  # no process group
            save_sharded({"state_dict": state}, part)
        torch.save({"global_step": step, "samples_seen": 4 * step}, part / "meta.pt")
        write_manifest(part, {file.name: entry(file) for file in part.iterdir()})
        install(part, path)
    return path


def metadata(folder: Path, change: Callable[[Any], None], manifest: bool = False) -> None:
    """Change `.metadata`; with `manifest`, of a stranger who writes a checksum for it, too."""
    file = folder / ".metadata"
    found = pickle.loads(file.read_bytes())
    change(found)
    file.write_bytes(pickle.dumps(found))
    (folder / "manifest.json").unlink()
    if manifest:
        write_manifest(folder, {file.name: entry(file) for file in folder.iterdir()})


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        open_checkpoint(path)
    told = str(error.value)
    assert str(path) in told and "\n" not in told and told.endswith(".") and len(told) < 600
    return told


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.pt"])
@pytest.mark.parametrize("damage", ["gone", "cut", "empty", "flipped"])
def test_a_damaged_folder_is_told_and_the_one_before_it_used(
    folder: Path, name: str, damage: str, manifest: bool
) -> None:
    if not manifest:
        (folder / "manifest.json").unlink()
    file, older = folder / name, folder.with_name("step=1.ckpt")
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[content.index(torch.full((20,), 2.0).numpy().tobytes()) if "dist" in name else len(content) // 2] ^= 64
    file.write_bytes({"cut": content[:-10], "empty": b""}.get(damage, content))
    if damage == "gone":
        file.unlink()
    if not manifest and (damage == "flipped" and name != "meta.pt"):
        return  # without a checksum, .metadata may still be read; a shard is below
    told = refused(folder)
    assert name in told and (f"{older} is whole" in told or not manifest)
    if manifest:
        with pytest.warns(UserWarning, match="step=1.ckpt, the newest"):
            assert open_checkpoint(folder.parents[1]).step == 1


def test_a_flipped_shard_without_a_manifest_is_seen(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    file = folder / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[content.index(torch.full((20,), 2.0).numpy().tobytes())] ^= 64
    file.write_bytes(content)
    assert "checksum" in refused(folder)


def test_no_memory_is_taken_for_what_the_shards_do_not_hold(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def huge(found: Any) -> None:
        found.state_dict_metadata["state_dict.denoiser.weight"].size = torch.Size([10**7, 10**7])

    def huge_chunk(found: Any) -> None:
        huge(found)
        found.state_dict_metadata["state_dict.denoiser.weight"].chunks[0].sizes = torch.Size([10**7, 10**7])

    def one_place_many_times(found: Any) -> None:
        index = next(index for index in found.storage_data if index.fqn.endswith("weight"))
        for i in range(1000):
            key = f"state_dict.denoiser.{i}"
            found.state_dict_metadata[key] = found.state_dict_metadata[index.fqn]
            found.storage_data[dataclasses.replace(index, fqn=key)] = found.storage_data[index]

    def long(found: Any) -> None:
        for place in found.storage_data.values():
            place.length = 10**15

    empty, kept = torch.empty, folder.with_name("kept")
    taken = []
    monkeypatch.setattr(torch, "empty", lambda *size, **options: taken.append(size) or empty(*size, **options))
    shutil.copytree(folder, kept)
    for manifest in (False, True):
        for change in (huge, huge_chunk, one_place_many_times, long):
            shutil.rmtree(folder)
            shutil.copytree(kept, folder)
            metadata(folder, change, manifest)
            refused(folder)
    assert not taken
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)
    assert open_checkpoint(folder).state["denoiser.weight"].mean() == 2 and taken


def test_names_of_older_versions_are_present_ones(tmp_path: Path) -> None:
    """REPA's projector was a part of the denoiser, in the state dict and in the optimizer's state."""
    with warnings.catch_warnings(action="ignore"):
        old = {"state_dict": {"denoiser.repa_projector.0.bias": torch.ones(2)}}
        old["optimizer_0"] = {"state.denoiser.repa_projector.0.bias.exp_avg": torch.full((2,), 3.0)}
        save_sharded(old, tmp_path / "a.ckpt")
    torch.save({"global_step": 1}, tmp_path / "a.ckpt/meta.pt")
    assert open_checkpoint(tmp_path / "a.ckpt").state.keys() == {"components.repa.projector.0.bias"}
    state = {"optimizer_0": {"state.components.repa.projector.0.bias.exp_avg": torch.zeros(2)}}
    load_sharded(state, tmp_path / "a.ckpt", no_dist=True)
    assert state["optimizer_0"]["state.components.repa.projector.0.bias.exp_avg"].tolist() == [3.0, 3.0]


def test_the_same_name_is_written_again(folder: Path) -> None:
    """As in a run that goes on from an older step: what is there makes room, and is deleted last."""
    part = folder.with_name(".saving")
    shutil.copytree(folder, part)
    (part / "new").touch()
    install(part, folder)
    assert (folder / "new").is_file()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step=1.ckpt", "step=2.ckpt"]


def test_a_sharded_checkpoint_goes_on_under_fsdp_alone(folder: Path) -> None:
    run = trainer(folder.parents[1], [Checkpoint(dirpath=folder.parent)], max_steps=4, enable_checkpointing=True)
    with pytest.raises(ValueError, match="sharded.*FSDP2"):
        run.fit(Toy(), ckpt_path=str(folder))
