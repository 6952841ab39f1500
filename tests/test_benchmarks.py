"""Shared parts of the benchmarks: timing, peak memory, the machine's description, tables and arguments."""

from __future__ import annotations

import argparse
import functools
import json
import re
import socket
from pathlib import Path

import pytest
import torch

from benchmarks import common, loader, speed, speedrun, sweep, tables
from emmdit import provenance as machine
from emmdit import timing

# -------------------------------------------------------------------------------- time and memory


def test_cases_take_turns_forwards_and_backwards():
    order: list[str] = []
    durations = {"a": iter([1.0, 3.0, 1.0, 2.0]), "b": iter([0.2, 8.0, 6.0, 7.0])}

    def clock(run, device, calls):
        name = run()
        order.append(f"{name}{calls}")
        return next(durations[name])

    timings = timing.interleaved({"a": lambda: "a", "b": lambda: "b"}, rounds=3, min_seconds=0.5, clock=clock)
    assert order == ["a1", "b1", "a1", "b3", "b3", "a1", "a1", "b3"]  # 0.2 s a call: three calls for half a second
    assert timings["a"] == timing.Timing(2.0, 1.0, 3.0, 3) and timings["b"] == timing.Timing(7.0, 6.0, 8.0, 3)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak of the resident set: Linux")
def test_peak_memory_sees_what_is_freed_again():
    def allocate(mebibytes: int) -> None:
        torch.ones(mebibytes * 2**20 // 4).sum()

    little, much = (timing.peak_memory(functools.partial(allocate, n)) for n in (1, 400))
    assert 350 * 2**20 < much - little < 450 * 2**20
    assert abs(timing.peak_memory(functools.partial(allocate, 1)) - little) < 100 * 2**20  # the peak starts again


def test_machine_says_what_matters_and_nothing_private():
    found = machine.machine()
    assert {"cpu", "cpu_cores", "ram_gib", "gpu", "torch", "commit", "date", "torch_threads"} <= found.keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*\+00:00", found["date"])
    text = json.dumps(found)
    assert socket.gethostname() not in text and str(Path.home()) not in text and str(machine.ROOT) not in text
    assert found["torch"] in machine.machine_line(found) and "\n" not in machine.machine_line(found)


def test_without_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.git_commit() is None


def test_table():
    rows = [{"a": "x", "b": 0.123456, "c": None}, {"a": "long", "b": 1234.5, "c": 12345}]
    assert common.markdown_table(rows, {"a": "A", "b": "B", "c": "C"}).splitlines() == [
        "| A | B | C |",
        "|---|---:|---:|",
        "| x | 0.123 |  |",
        "| long | 1234 | 12,345 |",
    ]


@pytest.mark.parametrize("script", [loader, speed, speedrun, sweep, tables], ids=lambda module: module.__name__)
def test_every_script_writes_json_and_explains_its_options(script, monkeypatch: pytest.MonkeyPatch):
    parsers = []

    def stop(parser: argparse.ArgumentParser, *_) -> None:
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(SystemExit):
        script.main([])
    actions = parsers[0]._actions
    assert "--json" in [option for action in actions for option in action.option_strings]
    assert not [action.dest for action in actions if not action.help]


def test_whole_numbers():
    assert common.whole(1)("3") == 3
    for bad in ("0", "-1", "1.5", "a"):
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(bad)):
            common.whole(1)(bad)
