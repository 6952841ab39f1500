"""The report of an evaluation: the right images, text as it was, and nothing that leaves the page."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emmdit.evaluation.report import flatten, metric_table, pick, text_table, write_report

NASTY = '<script>alert("1")</script> a|b & *c* [d](e)'
RESULT = {
    "source": {"source": "runs/shapes/emmdit", "weights": "ema"},
    "prompts": {"name": "shapes", "sha256": "ab" * 32},
    "sampling": {"steps": 20, "guidance": 3.0, "height": None, "guidance_interval": [0.0, 1000.0]},
    "seed": 0,
    "metrics": {
        "geneval_shapes": 0.8125,
        "geneval_shapes_position": 0.5,
        "fid_clip_shapes_8": 0.0123,
        "clip_score": 31,
    },
    "ledger_metrics": {"geneval_overall": 0.8125},
    "settings": {"clip_score": {"note": NASTY}},
    "columns": {"real renders": {"geneval_shapes": 0.99}, "noise": {"geneval_shapes": 0.0, "fid_clip_shapes_8": 123.4}},
}


class Page(HTMLParser):
    """Tags with their attributes, and the text between them; fails where tags do not match."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    def all(self, tag):
        return [attributes for found, attributes in self.tags if found == tag]


def record(index: int, number: int = 0, tag: str = "colors", correct: bool = True, **more) -> dict:
    return {
        "filename": f"{index:05d}/samples/{number:05d}.png",
        "tag": tag,
        "prompt": f"prompt {index}",
        "correct": correct,
        "reason": "" if correct else f"expected red>=1, found 0 red\nand image {index}-{number}",
        **more,
    }


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images whose color is their number."""
    folder = tmp_path / "out" / "images"
    for index in range(6):
        for number in range(2):
            path = folder / f"{index:05d}" / "samples" / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            side = 600 if index == 5 else 32
            Image.new("RGB", (side, side), (index * 10, number * 100, 0)).save(path)
    return folder


def embedded(page: Page) -> list[Image.Image]:
    found = []
    for attributes in page.all("img"):
        kind, data = attributes["src"].split(",", 1)
        assert kind == "data:image/png;base64"
        found.append(Image.open(io.BytesIO(base64.b64decode(data))))
    return found


def test_the_page_stands_alone_and_shows_text_as_it_was(tmp_path: Path, images: Path):
    rows = [record(0, prompt=NASTY, correct=False, reason=NASTY), record(1), record(5, tag=NASTY)]
    path = write_report(tmp_path / "out", RESULT | {"source": {"source": NASTY}}, rows, images)
    assert path == tmp_path / "out" / "report.html"
    page = Page(path.read_text())
    assert not page.all("script") and not page.all("link") and not page.all("a")
    assert "".join(page.text).count(NASTY) == 3 + 3 + 1  # title and head, source; prompt, reason, task; a setting
    assert page.all("img")[0]["alt"] == NASTY
    shown = embedded(page)
    assert [image.getpixel((0, 0))[0] for image in shown] == [0, 10, 50]
    assert [image.size for image in shown] == [(32, 32), (32, 32), (192, 192)]
    assert path.stat().st_size < 30_000


def test_settings_are_all_listed_and_results_are_not_among_them(tmp_path: Path, images: Path):
    text = Page(write_report(tmp_path, RESULT, [], images).read_text()).text
    settings = flatten({key: RESULT[key] for key in ("source", "prompts", "sampling", "settings")})
    assert all(key in text and value in "".join(text) for key, value in settings.items())
    assert not any(key.startswith(("metrics.", "ledger_metrics", "columns")) for key in text)
    assert settings["sampling.guidance_interval"] == "[0.0, 1000.0]"


def test_images_most_unlike_their_prompt_come_first():
    rng = np.random.default_rng(0)
    rows = [record(i // 4, i % 4, correct=bool(i % 3), clip_score=float(s)) for i, s in enumerate(rng.random(40))]
    wrong, right = pick(rows, False, 5), pick(rows, True, 5)
    for chosen, correct, best in ((wrong, False, min), (right, True, max)):
        assert all(row["correct"] == correct for row in chosen)
        assert len({row["prompt"] for row in chosen}) == 5  # one of each prompt while there are others
        for row in chosen:
            own = [r["clip_score"] for r in rows if r["prompt"] == row["prompt"] and r["correct"] == correct]
            assert row["clip_score"] == best(own)
    every = [row for row in rows if not row["correct"]]
    assert wrong[0]["clip_score"] == min(row["clip_score"] for row in every)
    assert sorted(row["filename"] for row in pick(rows, False, 100)) == sorted(row["filename"] for row in every)


def test_without_similarities_the_choice_is_always_the_same():
    rows = [record(i // 4, i % 4, correct=False) for i in range(80)]
    chosen = pick(rows, False, 6)
    assert chosen == pick(rows[::-1], False, 6) and len({row["prompt"] for row in chosen}) == 6
    assert [row["prompt"] for row in chosen] != [f"prompt {i}" for i in range(6)]
    partly = [row | ({"clip_score": 1.0} if i else {}) for i, row in enumerate(rows)]
    assert [row["prompt"] for row in pick(partly, False, 6)] == [row["prompt"] for row in chosen]


def test_tasks_and_reasons_and_what_is_missing(tmp_path: Path, images: Path):
    rows = [record(i, 0, tag, i % 2 == 0) for i, tag in enumerate(["counting", "counting", "position", "position"])]
    (images / rows[3]["filename"]).unlink()
    (images / rows[1]["filename"]).write_bytes(b"no image")
    page = Page(write_report(tmp_path / "out", RESULT, [*rows, record(9, 0, "single")], images).read_text())
    text = "\n".join(page.text)
    assert re.search(r"counting\b.*\b1\b.*\b2\b.*50\.0%", text) and re.search(r"single\b.*\b1\b.*\b1\b.*100\.0%", text)
    assert "and image 1-0" in text and "None." in text
    assert text.count("missing") == 3 and len(page.all("img")) == 2


def test_table_for_the_terminal():
    lines = text_table(RESULT).splitlines()
    assert lines[0].split() == ["metric", "this", "model", "real", "renders", "noise"]
    assert lines[1].split() == ["geneval_shapes", "0.812", "0.990", "0.000"]
    assert lines[2].startswith("  position") and lines[1].index("0.812") == lines[2].index("0.500")
    assert "lower" in lines[3] and lines[3].split()[-2:] == ["0.012", "123.400"]
    _, table = metric_table({"metrics": {"kid_clean_5k": -1e-5, "cmmd": float("nan")}})
    assert [values for *_, values in table] == [["-1e-05"], ["nan"]]
