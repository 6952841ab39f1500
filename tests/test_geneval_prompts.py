"""GenEval's prompts: the official bytes, others of the same kind, prompts to train on, and prompt files."""

from __future__ import annotations

import collections
import hashlib
import json
import re
from pathlib import Path

import pytest

from emmdit.evaluation.geneval import (
    CLASSES,
    TASKS,
    generate_prompts,
    official_prompts,
    prompts,
    prompts_jsonl,
    read_prompts,
    training_prompts,
)

# Of the files in the benchmark's repository.
METADATA = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
GENERATION = "55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680"
NAMES = "608f6a0e5c8ca1c7a92b818430141fe268c85b7930b50f4160f1d65893b5bacd"

SHAPES, PAINTS = ("circle", "star", "cross", "egg"), ("red", "orange", "blue")


def sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def tags(lines: list[dict]) -> list[tuple[str, int]]:
    return list(collections.Counter(line["tag"] for line in lines).items())


def swapped(prompt: str) -> list[str]:
    """The prompt with its two objects swapped, and the scene described from the other object; from the text alone."""
    other = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    if not (found := re.fullmatch(r"a photo of (.+) (and|left of|right of|above|below) (.+)", prompt)):
        return []
    a, word, b = found.groups()
    return [f"a photo of {b} {w} {a}" for w in {word, other.get(word, word)}]


# -------------------------------------------------------------------------------- official


def test_official_files_byte_for_byte():
    lines = official_prompts()
    assert sha256(prompts_jsonl(lines)) == METADATA
    assert sha256("".join(f"{line['prompt']}\n" for line in lines).encode()) == GENERATION
    assert sha256("".join(name + "\n" for name in CLASSES).encode()) == NAMES


def test_lines_are_fresh():
    official_prompts()[0]["prompt"] = "spoilt"
    assert sha256(prompts_jsonl(official_prompts())) == METADATA


def test_a_numpy_that_draws_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prompts, "OFFICIAL_SEED", 44)
    monkeypatch.setattr(prompts, "OFFICIAL_SHA256", "0" * 64)
    prompts._official.cache_clear()
    with pytest.raises(RuntimeError, match=r"numpy.*1\.23.*2\.5"):
        official_prompts()


# -------------------------------------------------------------------------------- others of the kind


def test_other_seeds_give_others():
    first, second = generate_prompts(seed=1), generate_prompts(seed=2)
    assert first == generate_prompts(seed=1)
    assert len({line["prompt"] for line in first} & {line["prompt"] for line in second}) < 150  # 80 are single objects


def test_other_classes_colors_and_sizes():
    lines = generate_prompts(SHAPES, PAINTS, seed=0, n=40)
    words = set(" ".join(line["prompt"] for line in lines).split())
    numbers = {"two", "three", "four"}
    relations = {"left", "right", "of", "above", "below"}
    plurals = {"circles", "stars", "crosses", "eggs"}
    assert words == {"a", "an", "photo", "of", "and"} | numbers | relations | plurals | {*SHAPES, *PAINTS}
    assert "a photo of an egg" in {line["prompt"] for line in lines}
    assert dict(tags(lines))["single_object"] == 4 and dict(tags(lines))["counting"] <= 12

    few = generate_prompts(n={"single_object": 3, "position": 5})
    assert tags(few) == [("single_object", 3), ("position", 5)]
    assert few[:3] == official_prompts()[:3]


def test_persons_have_no_color():
    classes = ("cat", "person", "dog")
    asked = [c for line in generate_prompts(classes, PAINTS, n=60) for c in line["include"] if "color" in c]
    assert {c["class"] for c in asked} == {"cat", "dog"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(classes=("cat",)), r"\b2\b.*classes.*'cat'"),
        (dict(classes=("cat", "person")), r"\b3\b.*classes.*'cat', 'person'"),
        (dict(colors=("red", "red")), r"\b2\b.*colors.*'red', 'red'"),
        (dict(n={"hue": 3}), "'hue'.*single_object"),
    ],
)
def test_impossible_prompts_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        generate_prompts(**arguments)


# -------------------------------------------------------------------------------- to train on


@pytest.mark.parametrize("seed", [0, 1])
def test_training_prompts_are_no_test_prompts_in_either_order(seed: int):
    test = {line["prompt"] for line in official_prompts()}
    lines = training_prompts(700, seed)
    assert dict(tags(lines)) == {"two_object": 700, "counting": 160, "colors": 696, "position": 700, "color_attr": 700}
    texts = [line["prompt"] for line in lines]
    assert len(set(texts)) == len(texts)
    assert not test & set(texts)
    assert not test & {other for text in texts for other in swapped(text)}


def test_training_prompts_of_another_world():
    held_out = generate_prompts(SHAPES, PAINTS, seed=0, n=3)
    lines = training_prompts(5, 3, SHAPES, PAINTS, held_out)
    assert lines == training_prompts(5, 3, SHAPES, PAINTS, held_out) != training_prompts(5, 4, SHAPES, PAINTS, held_out)
    assert {line["tag"] for line in lines} == set(TASKS) - {"single_object"}
    known = {json.dumps(line) for line in generate_prompts(SHAPES, PAINTS, n=5000)}
    assert {json.dumps(line) for line in lines} <= known


# -------------------------------------------------------------------------------- a user's file


def test_the_official_file_reads_back(tmp_path: Path):
    file = tmp_path / "geneval.jsonl"
    file.write_bytes(prompts_jsonl(official_prompts()))
    assert read_prompts(file) == official_prompts()


def test_plain_prompts(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa cat\r\nein H\xc3\xbcndchen\x0bsitzt \r\n")
    assert read_prompts(tmp_path / "a.txt") == [{"prompt": "a cat"}, {"prompt": "ein Hündchen\x0bsitzt"}]
    (tmp_path / "a.jsonl").write_text('{"prompt": "a cat", "id": 3}')
    assert read_prompts(str(tmp_path / "a.jsonl")) == [{"prompt": "a cat", "id": 3}]


def line(**changes) -> bytes:
    include = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}]
    return json.dumps(
        {"tag": "position", "include": include, "prompt": "a photo of a dog above a cat"} | changes
    ).encode()


def clauses(**changes) -> list[dict]:
    return [{"class": "cat", "count": 1}, {"class": "dog", "count": 1} | changes]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"{", "JSON"),
        (b"[1]", 'JSON object.*"prompt"'),
        (b"", "empty"),
        (b"\xff\xfe", "UTF-8"),
        (b'{"caption": "a cat"}', '"prompt"'),
        (line(prompt=" "), '"prompt"'),
        (line(prompt=3), '"prompt"'),
        (line(tag=None), '"tag"'),
        (line(include=[]), r'"include"(?![\[\]])'),
        (line(include={"class": "cat"}), r'"include"(?![\[\]])'),
        (line(exclude="cat"), r'"exclude"(?!\[)'),
        (line(exclude=[{"class": "cat"}]), r'"exclude"\[0\].*"count"'),
        (line(include=[{"count": 1}]), r'"include"\[0\].*"class"'),
        (line(include=clauses(count=0)), r'"include"\[1\].*"count"'),
        (line(include=clauses(count=True)), r'"include"\[1\].*"count"'),
        (line(include=clauses(color=["red"])), r'"color".*"include"\[1\]'),
        (line(include=clauses(position=["beside", 0])), r'"position".*"include"\[1\]'),
        (line(include=clauses(position=["above", 1])), r'"position".*"include"\[1\]'),
        (line(include=clauses(position="above")), r'"position".*"include"\[1\]'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: bytes, message: str):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b"\n".join([line(), line(), bad, line(), b""]))
    with pytest.raises(ValueError, match=rf"prompts\.jsonl.*\bline 3\b.*{message}"):
        read_prompts(file)


def test_unusable_files_are_refused(tmp_path: Path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "gap.txt").write_text("a cat\n\na dog\n")
    with pytest.raises(ValueError, match=r"empty\.txt"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match=r"gap\.txt.*\bline 2\b"):
        read_prompts(tmp_path / "gap.txt")
    with pytest.raises(ValueError, match=r"prompts\.csv.*\.jsonl.*\.txt"):
        read_prompts(tmp_path / "prompts.csv")
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        read_prompts(tmp_path / "none.txt")
