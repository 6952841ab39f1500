"""Short fuzz run: regressions of the corpus, and the same few mutations of valid inputs at every run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.guard import Fault, Guard, guarded
from tests.fuzz.mutations import OUTSIDE, mutated, read
from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
MILLISECONDS = 100  # of a target, on an idle machine


@pytest.fixture(scope="module")
def guard(stand_ins: None) -> Iterator[Guard]:
    with guarded(TARGETS.values()) as found:
        yield found


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_mutated_input_is_read_or_refused_in_a_sentence(guard: Guard, name: str) -> None:
    target = TARGETS[name]
    examples, random = target.examples, Random(name)
    for _ in range(max(8, int(MILLISECONDS / (target.cost + 1)))):
        guard.check(target, mutated(examples, random))


@pytest.mark.parametrize("entry", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_input_of_the_corpus_is_read_or_refused_in_a_sentence(guard: Guard, entry: Path) -> None:
    guard.check(TARGETS[entry.parent.name], read(entry))


LOOPS = {"loop": ".", "other-loop": "."}


@pytest.mark.parametrize("name", ["captioned_folder", "tar", "arrow", "mds", "imagefolder"])
def test_folders_that_link_to_themselves_end(guard: Guard, name: str) -> None:
    guard.check(TARGETS[name], TARGETS[name].valid | LOOPS)


@pytest.mark.parametrize(
    "name, links",
    [
        ("captioned_folder", {"a.txt": OUTSIDE}),
        ("captioned_folder", {"c.json": OUTSIDE}),
        ("captioned_folder", {"a.png": OUTSIDE}),
        ("image_set", {"images/00000/metadata.jsonl": f"../../{OUTSIDE}", "images/set.json": "gone"}),
        ("image_set", {"images/00000/metadata.jsonl": f"../../{OUTSIDE}"}),
        ("image_set", {"images/00000/samples/00000.png": f"../../../{OUTSIDE}"}),
        ("job", {"job/journal/rank-00000.jsonl": f"../../{OUTSIDE}"}),
        ("job", {"job/plan.json": f"../{OUTSIDE}"}),
        ("ledger", {"shapes.json": OUTSIDE}),
        ("checkpoint", {"checkpoints/last.ckpt": f"../{OUTSIDE}"}),
        ("checkpoint", {"checkpoints/last.ckpt": "last.ckpt"}),
        ("tar", {"a.tar": OUTSIDE}),
    ],
)
def test_nothing_is_written_through_a_link_nor_a_caption_read(guard: Guard, name: str, links: dict) -> None:
    guard.check(TARGETS[name], TARGETS[name].valid | links)


def reader(read, **settings) -> Target:  # noqa: ANN001
    return Target("reader", lambda folder: (folder / "a.txt").write_text("x"), read, **settings)


def deep(folder: Path) -> None:
    deep(folder)


def caught(folder: Path) -> None:
    try:
        os.system("true")
    except BaseException:  # a reader that hides what it did
        raise ValueError("a.txt is broken.") from None


def slow(folder: Path) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    "read, fault",
    [
        (lambda folder: {}["x"], "KeyError"),
        (deep, "RecursionError"),
        (caught, "os.system"),
        (lambda folder: __import__("fuzz_canary"), "imports 'fuzz_canary'"),
        (lambda folder: (folder.parent / "b").write_text("x"), "writes"),
        (lambda folder: (folder / "a.txt").rename(folder.parent / "b"), "os.rename"),
        (lambda folder: Path("/etc/passwd").read_text(), "reads '/etc/passwd'"),
        (lambda folder: bytearray(1 << 40), "asks for more"),
        (lambda folder: bytearray(1 << 29), "takes [0-9]{3,} MiB"),
        (lambda folder: (_ for _ in ()).throw(ValueError("Expecting value")), "no file is named"),
        (slow, "takes more than"),
    ],
)
def test_the_guard_finds(guard: Guard, read, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    monkeypatch.setattr("tests.fuzz.guard.SECONDS", 0.3)
    monkeypatch.setattr("tests.fuzz.guard.MEMORY", 1 << 26)
    with pytest.raises(Fault, match=fault):
        guard.check(reader(read), {"a.txt": b"x"})


def test_the_guard_lets_a_reader_be(guard: Guard) -> None:
    def refuses(folder: Path) -> None:
        raise ValueError(f"{folder}/a.txt is broken.")

    assert guard.check(reader(refuses), {"a.txt": b"x"}) == "ValueError"
    assert guard.check(reader(lambda folder: (folder / "a.txt").read_text()), {"a.txt": b"x"}) == "read"


def test_a_link_out_of_the_folder_is_a_fault_where_links_must_stay_inside(guard: Guard) -> None:
    def follows(folder: Path) -> None:
        (folder / "a.txt").read_text()

    tree = {"a.txt": "../secret.txt"}
    assert guard.check(reader(follows), tree) == "read"
    with pytest.raises(Fault, match="reads"):
        guard.check(reader(follows, reads="inside"), tree)
