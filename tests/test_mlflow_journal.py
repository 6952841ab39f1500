"""The journal of what waits for MLflow: order, bounds, kills, and bytes of strangers."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.mlflow_journal import Journal, JournalInUse, find_journals, open_journal

HEADER = {"run": {"uid": "abc"}}


def entries(journal: Journal) -> list[int]:
    return [entry["metrics"]["a"] for entry in journal.waiting()]


def metric(value: float) -> dict:
    return {"metrics": {"a": value}, "step": int(value)}


def test_what_is_not_sent_survives(tmp_path: Path) -> None:
    path = tmp_path / "run" / "mlflow_journal.jsonl"
    journal = Journal(path, HEADER)
    for value in range(5):
        journal.append(metric(value))
    found, mark = journal.pending(3)
    assert [entry["metrics"]["a"] for entry in found] == [0, 1, 2]
    journal.sent(mark)
    journal.close()

    journal = Journal(path)  # the next process
    assert journal.header == HEADER and entries(journal) == [3, 4]
    journal.append(metric(5))
    journal.sent(journal.pending()[1])
    assert entries(journal) == [] and len(path.read_bytes().splitlines()) == 1  # the first line
    journal.append(metric(6))
    assert entries(journal) == [6]
    journal.sent(journal.pending()[1])
    journal.close()
    assert not path.exists()
    journal.append(metric(7))  # by a thread that ends later
    journal.sent(10)
    assert journal.pending() == ([], 0)


def test_a_kill_within_a_line_costs_that_line(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path, HEADER)
    journal.append(metric(1))
    journal._release()
    with path.open("ab") as file:
        file.write(b'{"metrics": {"a"')
    journal = Journal(path, HEADER)
    journal.append(metric(2))
    assert entries(journal) == [1, 2]


def test_it_is_bounded_and_says_what_was_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl", HEADER, limit=2000, line_limit=500)
    for value in range(100):
        journal.append(metric(value))
    journal.append({"text": "a", "data": "x" * 600})
    journal.append({"status": "FINISHED"}, always=True)
    kept = [entry["metrics"]["a"] for entry in journal.waiting() if "metrics" in entry]
    assert kept == list(range(len(kept))) and 20 < len(kept) < 80
    assert journal.dropped["metrics"] == (100 - len(kept), len(kept), 99) and journal.dropped["text"][0] == 1
    journal.close()
    assert journal.path.stat().st_size < 3500
    tags: dict = {}
    for entry in Journal(journal.path, limit=2000, line_limit=500).waiting():
        tags |= entry.get("tags", {})
    assert tags["journal.dropped.metrics"].startswith(f"{100 - len(kept)} metrics of steps {len(kept)} to 99")


def test_a_full_disk_leaves_whole_lines_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "j.jsonl", HEADER)
    journal.append(metric(1))
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, line: write(fd, line[: len(line) // 2]))
    journal.append(metric(2))
    journal.append(metric(3))
    monkeypatch.undo()
    assert entries(journal) == [1, 2, 3]
    journal.sent(journal.pending()[1])
    assert entries(journal) == [2, 3]
    journal.sent(journal.pending()[1])
    assert journal.empty and (tmp_path / "j.jsonl").read_bytes().count(b"\n") == 1


def test_a_folder_that_cannot_be_written_costs_the_file_only() -> None:
    journal = Journal(Path("/proc/none/mlflow_journal.jsonl"), HEADER)
    journal.append(metric(1))
    assert entries(journal) == [1]
    journal.sent(journal.pending()[1])
    assert journal.empty
    journal.close()


def _hold(path: Path, ready, done) -> None:
    journal = Journal(path)
    ready.set()
    done.wait(30)
    journal.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "mlflow_journal.jsonl"
    journal = Journal(path, HEADER)
    journal.append(metric(1))
    with pytest.raises(JournalInUse):
        Journal(path)
    journal.close()
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(path, ready, done))
    process.start()
    assert ready.wait(30)
    with pytest.raises(JournalInUse):
        Journal(path)
    other = open_journal(tmp_path, "mlflow_journal", HEADER)
    assert other.path != path and other.path in find_journals(tmp_path)
    done.set()
    process.join()
    assert entries(Journal(path)) == [1]


def test_the_journal_of_another_run_is_set_aside(tmp_path: Path) -> None:
    for number, uid in enumerate(("one", "two", "two")):
        journal = open_journal(tmp_path, "mlflow_journal", {"run": {"uid": uid}})
        journal.append(metric(number))
        journal.close()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mlflow_journal.jsonl").write_text("garbage")
    *own, foreign = find_journals(tmp_path)
    journals = [Journal(path) for path in own]
    assert {j.header["run"]["uid"]: entries(j) for j in journals} == {"one": [0], "two": [1, 2]}
    with pytest.raises(ValueError, match=str(foreign)):
        Journal(foreign)
    open_journal(tmp_path / "sub", "mlflow_journal", HEADER).close()
    assert [path.read_text() for path in (tmp_path / "sub").iterdir()] == ["garbage"]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text(json.dumps(HEADER) + "\n{}\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mlflow_journal.jsonl").symlink_to(victim)
    os.mkfifo(tmp_path / "run" / "mlflow_journal-pipe.jsonl")
    for path in find_journals(tmp_path / "run"):
        with pytest.raises(OSError):
            Journal(path)
    journal = open_journal(tmp_path / "run", "mlflow_journal", HEADER)
    journal.append(metric(1))
    assert entries(journal) == [1] and "metrics" not in victim.read_text()


LINES = [
    b'{"sent":1e9}',
    b'{"sent":-5}',
    b'{"sent":99999}',
    b'{"sent":null}',
    b'{"sent":"x"}',
    b"[]",
    b"1",
    b"\xff\xfe",
]
LINES += [b'{"metrics":{"a":1}}', b"[" * 3000, b"9" * 5000, b'{"a":' * 2000, b"", b"\0", b"{}"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(LINES) | st.binary(max_size=40), max_size=30), st.booleans())
def test_bytes_of_a_stranger(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], headed: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "stranger.jsonl"
    path.write_bytes(b"\n".join([b'{"run":{"uid":"abc"}}'] * headed + lines))
    try:
        journal = Journal(path, line_limit=4000)
    except ValueError:
        return
    for _ in range(100):
        found, mark = journal.pending(3)
        assert all(isinstance(entry, dict) for entry in found)
        journal.sent(mark)
        if not found:
            break
    assert journal.empty
    journal.close()
    assert not path.exists()


def test_a_line_without_end_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with path.open("wb") as file:
        file.write(b'{"run":{"uid":"abc"}}\n')
        file.seek(60 << 20, os.SEEK_CUR)  # a hole
        file.write(b'\n{"metrics":{"a":1}}\n' + b"[1," * 300_000 + b"\n")
    journal = Journal(path)
    assert entries(journal) == [1] and journal.skipped == 2
