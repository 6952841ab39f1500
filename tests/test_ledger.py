"""The ledger: rows replace their like, writers do not lose each other's, and what is broken says so."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from emmdit.evaluation import ledger

ROOT = Path(__file__).parents[1]


def row(experiment: str = "shapes/emmdit", seed: int = 0, value: float = 0.5, **more) -> dict:
    return {
        "experiment": experiment,
        "seed": seed,
        "metrics": {"geneval_overall": value},
        "command": "emmdit evaluate",
        "commit": "0" * 40,
        "hardware": "a machine",
        "train_seconds": 12.5,
        **more,
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results" / "shapes.json"


def test_a_row_comes_back(path: Path):
    assert ledger.read(path) == []
    given = row(settings={"sampling": {"steps": 20}}, train={"steps": 2000, "val_loss_ema": 0.1}, note="Größe")
    written = ledger.append(path, given)
    assert ledger.read(path) == [written] and written == {**given, "eval_seed": 0}


def test_the_same_run_is_replaced_and_others_stay(path: Path):
    for value, key in enumerate([(0, 0), (1, 0), (0, 1), (0, 0)]):
        ledger.append(path, row(seed=key[0], eval_seed=key[1], value=value))
    found = {(r["seed"], r["eval_seed"]): r["metrics"]["geneval_overall"] for r in ledger.read(path)}
    assert found == {(0, 0): 3, (1, 0): 1, (0, 1): 2}


def test_the_file_is_the_same_whatever_the_order_of_writing(tmp_path: Path):
    names = itertools.product(("shapes/b", "a"), (10, 9), (0, 1))
    rows = [row(name, seed, eval_seed=e, settings={"n": 4}) for name, seed, e in names]
    for one in rows:
        ledger.append(tmp_path / "a.json", one)
    for one in reversed(rows):
        ledger.append(tmp_path / "b.json", dict(reversed(one.items())))
    text = (tmp_path / "a.json").read_text()
    assert text == (tmp_path / "b.json").read_text() and len(text.splitlines()) == len(rows) + 2  # a row a line
    assert [ledger.key(r) for r in json.loads(text)] == sorted(map(ledger.key, rows))


def test_two_processes_lose_nothing(path: Path):
    code = """
import sys
from emmdit.evaluation import ledger
from tests.test_ledger import row
for seed in range(10):
    ledger.append(sys.argv[1], row("shapes/" + sys.argv[2], seed))
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, path, name], cwd=ROOT) for name in ("a", "b")]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    assert len(ledger.read(path)) == 20
    assert {p.name for p in path.parent.iterdir()} == {"shapes.json", ".shapes.json.lock"}


def test_a_writer_that_dies_leaves_the_old_ledger(path: Path, monkeypatch: pytest.MonkeyPatch):
    ledger.append(path, row())
    before = path.read_text()

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("emmdit.files.os.replace", die)
    with pytest.raises(KeyboardInterrupt):
        ledger.append(path, row(seed=1))
    assert path.read_text() == before and {p.name for p in path.parent.iterdir()} == {path.name, ".shapes.json.lock"}


BAD = [
    ({"hardware": None}, "hardware"),
    ({"experiment": "../shapes emmdit"}, "'../shapes emmdit'"),
    *(({"experiment": name}, repr(name)) for name in ("../../x", "a/../b", "..", "/a", "a/", ".hidden", "a\nb", "")),
    ({"seed": "0"}, "seed"),
    ({"eval_seed": "0"}, "eval_seed"),
    ({"metrics": {}}, "metrics"),
    ({"metrics": {"fid_clip": float("nan")}}, "fid_clip"),
    ({"train_seconds": "long"}, "train_seconds"),
    ({"train_seconds": float("inf")}, "train_seconds"),
    ({"settings": {"x": float("nan")}}, "shapes.json"),
]


@pytest.mark.parametrize(("change", "words"), BAD)
def test_bad_rows_are_refused_before_anything_is_written(path: Path, change: dict, words: str):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        ledger.append(path, row() | change)
    assert "\n" not in str(error.value) and not path.exists()


def test_commit_and_time_may_be_unknown_but_not_left_out(path: Path):
    ledger.append(path, row(commit=None, train_seconds=None))
    with pytest.raises(ValueError, match=r"\bcommit\b"):
        ledger.append(path, {k: v for k, v in row().items() if k != "commit"})


BROKEN = [
    (b'[\n{"experiment": "a",\n', "line 3"),
    (b"{}", "dict"),
    (b"[3]", "Row 1"),
    (json.dumps([row(), row(seed=1) | {"command": None}]).encode(), "Row 2"),
    (json.dumps([row(), row(value=0.6)]).encode(), "Rows 1 and 2"),
    (b"\xff\xfe", "JSON"),
]


@pytest.mark.parametrize(("content", "words"), BROKEN)
def test_a_broken_ledger_is_one_sentence_and_stays_as_it_is(path: Path, content: bytes, words: str):
    path.parent.mkdir()
    path.write_bytes(content)
    for call in (lambda: ledger.read(path), lambda: ledger.append(path, row(seed=7))):
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            call()
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert path.read_bytes() == content
