"""Run folders of strangers: neither their checkpoints nor the classes that their configs name run code."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from emmdit.checkpoint_reader import load_sharded, read_metadata
from emmdit.weights import checkpoint_state, load_weights
from lightning_modules.callbacks import Checkpoint
from lightning_modules.commands.main import main
from lightning_modules.runs import build_module
from tests.tiny_run import CONFIG, ROOT
from tests.toy import Toy, trainer

COMMANDS = ("sample", "export", "evaluate", "generate-dataset")


class Bomb:
    """Runs `call` when it is unpickled, in any process."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call[0], self.call[1:]


def sharded(path: Path, state: dict[str, Any]) -> None:
    """A sharded checkpoint as Lightning writes it."""
    with warnings.catch_warnings(action="ignore"):  # no process group
        dcp.save(state, checkpoint_id=path, no_dist=True)
    torch.save({"global_step": 3}, path / "meta.pt")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a sharded checkpoint."""
    network = build_module(CONFIG).build_denoiser()
    folder = tmp_path / "runs" / "stranger"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    state = {f"denoiser.{key}": value for key, value in network.state_dict().items()}
    sharded(folder / "checkpoints/last.ckpt", {"state_dict": state})
    return folder


def sample(run: Path, *options: str) -> None:
    out = run.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    main(
        ["sample", "--ckpt", str(run), "--prompt", "a photo of a star", "--out", str(out), "--device", "cpu", *options]
    )
    assert (out / "grid.png").is_file()


def refused(capsys: pytest.CaptureFixture, command: str, run: Path, *options: str) -> str:
    """What `emmdit COMMAND` says when it ends with status 2: one sentence."""
    capsys.readouterr()
    (run.parent / "prompts.txt").write_text("a star")
    extra = {
        "sample": ["--ckpt", str(run), "--prompt", "x", "--device", "cpu"],
        "export": ["--ckpt", str(run)],
        "evaluate": ["--ckpt", str(run), "--device", "cpu", "-c", str(ROOT / "experiments/evaluation/shapes.yaml")],
        "generate-dataset": ["--model", str(run), "--prompts.source", str(run.parent / "prompts.txt")],
    }[command]
    with pytest.raises(SystemExit) as end:
        main([command, "--out", str(run.parent / f"refused_{command}"), *extra, *options])
    assert end.value.code == 2
    said = capsys.readouterr().err.partition("\n(EMMDIT_TRACEBACK")[0].splitlines()[-1]
    assert said.startswith(f"emmdit {command}: ") and said.endswith(".")
    return said


# ------------------------------------------------------------------------------ checkpoints


def test_a_genuine_sharded_checkpoint_is_read(run: Path) -> None:
    network = build_module(CONFIG).build_denoiser()
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    assert load_weights(network, run) == "raw"
    stored = checkpoint_state(run / "checkpoints/last.ckpt")
    assert network.state_dict().keys() == {key.removeprefix("denoiser.") for key in stored}
    assert any(value.abs().sum() > 0 for value in network.parameters())
    sample(run)


def test_a_metadata_file_that_calls_something_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint, marker = run / "checkpoints/last.ckpt", tmp_path / "marker"
    genuine = pickle.loads((checkpoint / ".metadata").read_bytes())
    hidden = copy.copy(genuine)
    hidden.planner_data = {"state_dict": Bomb(Path.touch, marker)}
    bombs = {
        "system": Bomb(os.system, f"touch {marker}"),
        "touch": Bomb(Path.touch, marker),
        "eval": Bomb(eval, f"open({str(marker)!r}, 'w')"),
        "getattr": Bomb(getattr, Metadata, "__init__"),
        "torch.load": Bomb(torch.load, str(marker)),
        "in the genuine one": hidden,
    }
    network = build_module(CONFIG).build_denoiser()
    for name, bomb in bombs.items():
        (checkpoint / ".metadata").write_bytes(pickle.dumps(bomb))
        with pytest.raises(ValueError, match=r"\.metadata names [\w.]+, which") as error:
            load_weights(network, run)
        assert str(checkpoint) in str(error.value) and "\n" not in str(error.value), name
        assert not marker.exists(), name
    for command in COMMANDS:
        assert f"{checkpoint}/.metadata names " in refused(capsys, command, run)
    assert not marker.exists()
    dcp.FileSystemReader(checkpoint).read_metadata()  # torch's own reader runs it
    assert marker.exists()


def test_metadata_that_is_none_is_told_in_a_sentence(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints/last.ckpt"
    whole = (checkpoint / ".metadata").read_bytes()
    outside = Metadata({}, storage_data={MetadataIndex("a"): _StorageInfo("../../other.distcp", 0, 1)})
    # GLOBAL, MARK, dict with an entry, BUILD: attributes of the class itself, for the whole process
    on_class = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(Vversion\nVpwned\ndb."
    on_enum = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n(I0\ntR(V_value_\nI7\ndb."
    for content in (
        b"",
        b"hello",
        whole[: len(whole) // 2],
        pickle.dumps({}),
        pickle.dumps(outside),
        on_class,
        on_enum,
    ):
        (checkpoint / ".metadata").write_bytes(content)
        with pytest.raises(ValueError) as error:
            checkpoint_state(checkpoint)
        assert str(checkpoint) in str(error.value) and "\n" not in str(error.value)
    assert Metadata.version is None
    (checkpoint / ".metadata").unlink()
    with pytest.raises(FileNotFoundError, match="metadata"):
        read_metadata(checkpoint / ".metadata")


def test_shards_hold_no_pickles_that_run(tmp_path: Path) -> None:
    """What is no tensor (of an optimizer: learning rates, betas) is unpickled by torch's planner."""
    path, marker = tmp_path / "a.ckpt", tmp_path / "marker"
    genuine = {"optimizer_0": {"lr": 0.1, "betas": (0.9, 0.99), "fused": None, "step": torch.ones(1)}}
    sharded(path, genuine)
    loaded = {"optimizer_0": {"lr": 1.0, "betas": (0.0, 0.0), "fused": True, "step": torch.zeros(1)}}
    load_sharded(loaded, path, no_dist=True)
    assert loaded == genuine

    sharded(tmp_path / "hostile.ckpt", {"optimizer_0": {"lr": Bomb(Path.touch, marker)}})
    marker.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"hostile\.ckpt is not a readable checkpoint"):
        load_sharded({"optimizer_0": {"lr": 1.0}}, tmp_path / "hostile.ckpt", no_dist=True)
    assert not marker.exists()
    with warnings.catch_warnings(action="ignore"):
        dcp.load({"optimizer_0": {"lr": 1.0}}, checkpoint_id=tmp_path / "hostile.ckpt", no_dist=True)
    assert marker.exists()  # torch's own reader runs it


RESUME = """
import pickle, sys
from pathlib import Path
import torch
from lightning_modules.parallel import FSDP2Strategy
from tests.test_denoiser_module import Rows, module
from tests.test_trust import Bomb
from tests.toy import trainer

folder = Path(sys.argv[1])

def fit(steps, ckpt_path=None):
    model = module()
    model.configure_optimizers = lambda: torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.1
    )
    run = trainer(folder, devices=1, strategy=FSDP2Strategy(), max_steps=steps)
    run.fit(model, torch.utils.data.DataLoader(Rows(), batch_size=2), ckpt_path=ckpt_path)
    return run

path = folder / "a.ckpt"
fit(1).save_checkpoint(path)
resumed = fit(2, path)
print("RESULT", resumed.global_step, float(resumed.optimizers[0].state_dict()["state"][0]["step"]), flush=True)
(path / "manifest.json").unlink()
(path / ".metadata").write_bytes(pickle.dumps(Bomb(Path.touch, folder / "marker")))
try:
    fit(3, path)
except ValueError as error:
    print("REFUSED", error, flush=True)
"""


def test_a_checkpoint_from_an_address_is_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "site").mkdir()
    state = {"state_dict": {}, "x": Bomb(os.system, f"touch {tmp_path / 'ran'}")}
    torch.save(state, tmp_path / "site/evil.ckpt")
    asked = []

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            asked.append(args)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "site")) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/evil.ckpt"
        with pytest.raises(ValueError, match=r"evil\.ckpt is not a readable checkpoint"):
            trainer(tmp_path, [Checkpoint(dirpath=tmp_path / "own")], max_steps=1, enable_checkpointing=True).fit(
                Toy(), ckpt_path=address
            )
        server.shutdown()
    assert asked and not (tmp_path / "ran").exists()
    torch.load(tmp_path / "site/evil.ckpt", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


def test_a_resume_reads_a_sharded_folder_the_same_way(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(RESUME)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "RESULT 2 2.0" in lines
    (told,) = [line for line in lines if line.startswith("REFUSED")]
    assert ".metadata names" in told
    assert not (tmp_path / "marker").exists()


# --------------------------------------------------------------------------- configurations


@pytest.fixture
def payload(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Importable as `runs.stranger.payload`; importing it leaves the marker, whose path this is."""
    marker = run.parent / "imported"
    (run / "payload.py").write_text(
        f"from pathlib import Path\nfrom emmdit.flow import LogitNormal\nPath({str(marker)!r}).touch()\n"
        "class Evil(LogitNormal): ...\ndef function(): ...\n"
    )
    monkeypatch.syspath_prepend(run.parents[1])  # as an editable install puts the repository's folder there
    yield marker
    for name in [name for name in sys.modules if name.partition(".")[0] == "runs"]:
        del sys.modules[name]


def configure(run: Path, **arguments: Any) -> None:
    config = copy.deepcopy(CONFIG)
    config["model"]["init_args"].update(arguments)
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_a_config_that_names_a_file_beside_it_is_refused_before_the_import(
    run: Path, payload: Path, capsys: pytest.CaptureFixture
) -> None:
    name = "runs.stranger.payload.Evil"
    configure(run, timesteps={"class_path": name})
    for command in COMMANDS:
        said = refused(capsys, command, run)
        assert name in said and str(run / "config.yaml") in said and "--trust_code" in said
    assert not payload.exists()
    sample(run, "--trust_code")
    assert payload.exists()
    sample(run, "--trust-code")


@pytest.mark.parametrize(
    "arguments",
    [
        {"timesteps": "runs.stranger.payload.Evil"},  # a bare string for a class
        {"denoiser": "runs.stranger.payload.function"},  # and for a function
        {
            "components": [
                {"class_path": "emmdit.losses.REPA", "init_args": {"x": {"class_path": "runs.stranger.payload"}}}
            ]
        },
        {"components": "runs.stranger.payload.Evil"},
        {"path": {"class_path": "emmdit.files.os.system"}},  # of emmdit by its name alone
        {"denoiser": "emmdit.files.os.getcwd"},
        {"optimizer": {"class_path": "subprocess.Popen", "init_args": {"args": "true"}}},
    ],
    ids=str,
)
def test_all_ways_to_name_foreign_code_are_refused(run: Path, payload: Path, arguments: dict[str, Any]) -> None:
    config = copy.deepcopy(CONFIG)
    config["model"]["init_args"].update(arguments)
    with pytest.raises(ValueError):
        build_module(config, run / "config.yaml")
    assert not payload.exists()


MAIN = "lightning_modules.commands.main.main"


@pytest.mark.parametrize(
    "arguments",
    [
        {"denoiser": {"class_path": MAIN, "init_args": {"argv": ["x"]}}},
        {"denoiser": {"class_path": "torch.load", "init_args": {"f": "x", "weights_only": False}}},
        {"denoiser": {"class_path": "transformers.pipeline", "init_args": {"model": "x", "trust_remote_code": True}}},
        {"optimizer": {"class_path": MAIN, "init_args": {"argv": ["x"]}}},
        {"optimizer": f"{{class_path: {MAIN}, init_args: {{argv: [x]}}}}"},
        {"optimizer.class_path": MAIN, "optimizer.init_args.argv": ["x"]},
        {"optimizer": "other.yaml"},
        {"optimizer": MAIN},
        {"scheduler": {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": MAIN}}},
    ],
    ids=str,
)
def test_functions_of_trusted_packages_are_not_called(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    """jsonargparse takes a function where something is to be called, and some of them run what they are given."""
    monkeypatch.chdir(tmp_path)
    Path("other.yaml").write_text(f"class_path: {MAIN}\ninit_args: {{argv: [x]}}\n")
    config = copy.deepcopy(CONFIG)
    config["model"]["init_args"].update(arguments)
    with pytest.raises(ValueError, match="config.yaml") as error:  # and no SystemExit of `main`
        build_module(config, run / "config.yaml").build_denoiser()
    assert "\n" not in str(error.value)


def test_the_users_own_files_name_what_they_like_after_a_run_was_opened(run: Path, payload: Path) -> None:
    build_module(CONFIG)
    config = copy.deepcopy(CONFIG)
    config["model"]["init_args"]["timesteps"] = {"class_path": "runs.stranger.payload.Evil"}
    with pytest.raises(ValueError):
        build_module(config)
    assert type(build_module(config, trust_code=True).timesteps).__name__ == "Evil"


def test_where_no_type_is_asked_for_no_class_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """`attention` is a dict[str, Any], and jsonargparse builds a class that is described in it."""
    built = []
    monkeypatch.setattr(torch.nn.Bilinear, "__init__", lambda self, **sizes: built.append(sizes))
    config = copy.deepcopy(CONFIG)
    config["model"]["class_path"] = "lightning_modules.AttentionDistillation"
    sizes = {"in1_features": 1, "in2_features": 1, "out_features": 1}
    bilinear = {"class_path": "torch.nn.Bilinear", "init_args": sizes}
    config["model"]["init_args"].update(teacher="x", attention={"query": bilinear})
    with pytest.raises(ValueError):
        build_module(config)
    assert not built
