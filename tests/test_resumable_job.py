"""Jobs over many rows: damaged files are named or made again, a refusal leaves nothing, signals end all ranks."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emmdit.data.precompute.job import ResumableJob
from emmdit.data.precompute.latents import LatentsDataset
from lightning_modules.commands import distributed
from lightning_modules.commands.distributed import on_all_ranks
from lightning_modules.commands.main import main
from tests.command_line import change
from tests.command_line import elsewhere as elsewhere
from tests.test_precompute import folder, run


def contents(out: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(out).glob("*")) if path.is_file()}


def test_a_flipped_byte_is_found_and_its_shard_made_again(capsys: pytest.CaptureFixture) -> None:
    source = folder(Path("source"), 10)
    run(source, Path("out"))
    whole = contents("out")
    shard = Path("out/data-000001.arrow")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    run(source, Path("out"))
    assert contents("out") == whole and "data-000001.arrow" in capsys.readouterr().err
    run(source, Path("out"))
    assert contents("out") == whole and "made again" not in capsys.readouterr().err
    for rank in (0, 1):  # on another number of ranks each looks at its own
        shard.write_bytes(data)
        run(source, Path("out"), rank=rank, world=2)
        assert (contents("out") == whole) == (rank == 1)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"unit": 99}',
        "unit",
        "first",
        "file",
        "samples",
        "bytes",
        "sha256",
        "rejects",
    ],
)
def test_a_damaged_journal_line_is_named(line: str) -> None:
    run(folder(Path("source"), 10), Path("out"))
    journal = Path("out/journal/rank-00000.jsonl")
    lines = journal.read_text().splitlines()
    if line.isalnum() and line:
        line = json.dumps(json.loads(lines[1]) | {line: "../../etc/passwd"})
    journal.write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=r"rank-00000.jsonl, line 2 is damaged.*remove the line") as caught:
        run(Path("source"), Path("out"))
    assert "\n" not in str(caught.value)
    journal.write_text("\n".join([lines[0], *lines[2:]]) + "\n")  # the way out
    assert run(Path("source"), Path("out"))["counts"]["samples"] == 10


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '"x"'])
def test_a_damaged_plan_is_named(text: str) -> None:
    run(folder(Path("source"), 4), Path("out"))
    Path("out/plan.json").write_text(text)
    with pytest.raises(ValueError, match=r"out/plan.json.*another folder") as caught:
        run(Path("source"), Path("out"))
    assert "\n" not in str(caught.value)


def test_a_refused_job_leaves_nothing_behind() -> None:
    source = folder(Path("source"), 4)
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="thesis.tex"):
        run(source, Path("mine"))
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.tex"]

    for existed in (False, True):
        if existed:
            Path("out").mkdir()
        with pytest.raises(RuntimeError, match="too large"), ResumableJob("out", {}, 9, 3):
            raise RuntimeError("too large")  # by what makes the first unit
        assert Path("out").exists() == existed and not (existed and any(Path("out").iterdir()))

    Path("file").write_text("x")
    with pytest.raises(ValueError, match="file is a file"):
        run(source, Path("file/below"))


def test_a_second_process_is_kept_out_and_harms_nothing() -> None:
    with ResumableJob("out", {}, 9, 3):
        with pytest.raises(ValueError, match="rank 0's part of out"), ResumableJob("out", {}, 9, 3):
            pass
        assert Path("out/plan.json").is_file()
    with ResumableJob("out", {}, 9, 3):
        pass


def test_a_full_disk_is_an_error_and_the_same_command_completes(monkeypatch: pytest.MonkeyPatch) -> None:
    source, replace = folder(Path("source"), 10), os.replace
    run(source, Path("whole"))

    def full(part: Path, path: Path) -> None:
        if Path(path).name == "data-000001.arrow":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        replace(part, path)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="data-000001.arrow"):
        patch.setattr(os, "replace", full)
        run(source, Path("out"))
    run(source, Path("out"))
    assert list(contents("out").values()) == list(contents("whole").values())


def test_a_job_killed_while_it_made_its_folder_starts() -> None:
    Path("out/journal").mkdir(parents=True)
    Path("out/journal/.plan.lock").touch()
    Path("out/.plan-123.json").write_text("{")
    assert run(folder(Path("source"), 4), Path("out"))["counts"]["samples"] == 4


def test_what_stands_beside_the_manifest_is_there_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder killed before its last file is finished by the same command."""
    source, replace = folder(Path("source"), 4), os.replace

    def killed(part: Path, path: Path) -> None:
        if Path(path).name == "manifest.json":
            raise KeyboardInterrupt
        replace(part, path)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run(source, Path("out"))
    assert Path("out/state.json").is_file() and Path("out/dataset_info.json").is_file()
    with pytest.raises(ValueError, match="not finished"):
        LatentsDataset("out")
    monkeypatch.setattr(os, "replace", replace)
    assert run(source, Path("out")) and len(LatentsDataset("out")) == 4


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("inspect-data", "--source source --out out --resolution 0"),
        ("inspect-data", "--source source --out out --resolution 1000000"),
        ("inspect-data", "--source source --out out --min_side -1"),
        ("inspect-data", "--source source --out out --max_pixels 0"),
        ("inspect-data", "--source source --out out --max_length 0"),
        ("inspect-data", "--source source --out out --images -1"),
        ("inspect-data", "--source source --out out --num_workers -1"),
        ("inspect-data", "--source source --out file"),
        ("inspect-data", "--source source --out file/below"),
        ("precompute", "DATA --out out --resolution 0"),
        ("precompute", "DATA --out out --min_side 0"),
        ("precompute", "DATA --out out --num_workers -1"),
        ("precompute", "DATA --out file"),
        *[
            ("generate-dataset", f"--model none --prompts.source p.txt --out out --{wrong}")
            for wrong in (
                "height 0",
                "width -32",
                "steps 0",
                "guidance nan",
                "guidance inf",
                "batch_size 0",
                "quality 0",
            )
        ],
        ("generate-dataset", "--model none --prompts.source p.txt --out file"),
    ],
)
def test_wrong_options_are_refused_before_the_work(
    command: str, options: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(Path("source"), 2)
    Path("file").write_text("x")
    Path("p.txt").write_text("a prompt\n")
    parts = options.split()
    if parts[0] == "DATA":
        parts = change(DATA) + parts[1:]
    for place in ("inspect_data.open_any", "precompute.on_all_ranks", "generate_dataset.on_all_ranks"):
        module, name = place.split(".")
        monkeypatch.setattr(f"lightning_modules.commands.{module}.{name}", None)  # the work
    with pytest.raises(SystemExit) as ended:
        main([command, *parts])
    error = capsys.readouterr().err
    option = parts[-2] if parts[-1].startswith(("file", "out")) else parts[-2].lstrip("-")
    assert ended.value.code == 2 and option in error and "Traceback" not in error
    assert not Path("out").exists() and Path("file").read_text() == "x"


DATA = """
data: {class_path: CaptionedImagesDataModule, init_args: {source: source, resolution: 32}}
codec: {class_path: emmdit.encoders.DCTCodec}
resolution: 32
batch_size: 1
rows_per_shard: 2
num_workers: 1
trainer: {accelerator: cpu}
"""


# -- signals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_work_and_handlers_are_as_before(number: int, status: int, capfd) -> None:
    before = signal.getsignal(number)

    def work(*place: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(30)

    started = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        on_all_ranks({"accelerator": "cpu"}, work)
    assert ended.value.code == status and time.monotonic() - started < 10
    assert signal.getsignal(number) is before and "the same command resumes" in capfd.readouterr().err


HANGING = """
import ctypes, os, signal, sys
from lightning_modules.commands import distributed
distributed.GRACE = 1.0
def work(*place):
    os.kill(os.getpid(), signal.SIGTERM)
    ctypes.PyDLL(None).sleep(60)  # holds the main thread in C
distributed.on_all_ranks({"accelerator": "cpu"}, work)
"""


def test_the_ranks_end_with_the_one_that_fails() -> None:
    """Whatever ends rank 0, the processes that it started are ended, too, and do not take it with them."""
    slow = [
        sys.executable,
        "-c",
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)",
    ]
    rank = subprocess.Popen(slow, stdout=subprocess.PIPE)
    rank.stdout.readline()

    class Launcher:
        procs = [rank]

    distributed._end(Launcher, 0.2)
    assert rank.wait(5) == -signal.SIGKILL and Launcher.procs == []


@pytest.mark.slow
def test_a_signal_ends_a_call_that_does_not_return() -> None:
    assert subprocess.run([sys.executable, "-c", HANGING], capture_output=True, timeout=60).returncode == 143


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C", "SIGKILL"])
def test_two_ranks_end_on_signals_and_resume_to_the_same_bytes(how: str) -> None:
    folder(Path("source"), 120)
    data = change(DATA)
    main(["precompute", *data, "--out", "whole"])
    command = [sys.executable, "-m", "lightning_modules", "precompute", *data, "--trainer.devices", "2", "--out", "out"]
    started = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 120
    while len(list(Path("out").glob("data-*"))) < 4 and time.monotonic() < limit:
        time.sleep(0.02)
    if how == "Ctrl-C":
        os.killpg(started.pid, signal.SIGINT)  # as a terminal does it
    else:
        started.send_signal(getattr(signal, how))
    status = started.wait(30)
    assert status == {"SIGTERM": 143, "Ctrl-C": 130, "SIGKILL": -9}[how]
    limit = time.monotonic() + 20
    while (left := _session(started.pid)) and time.monotonic() < limit:
        time.sleep(0.2)
    assert not left and not Path("out/manifest.json").exists()
    if how != "SIGKILL":
        assert started.stderr.read().count("the same command resumes") == 1
    main(["precompute", *data, "--out", "out"])
    assert {Path(path).name: data for path, data in contents("out").items()} == {
        Path(path).name: data for path, data in contents("whole").items()
    }


def _session(leader: int) -> list[str]:
    """Processes that are left of a session."""
    return subprocess.run(["ps", "-s", str(leader), "-o", "pid="], capture_output=True, text=True).stdout.split()
