"""GenEval as a metric, its results file, its summary, and the folders the official tool reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emmdit.evaluation.geneval import Detection, Detector, GenEval, official_prompts, summary, write_results
from emmdit.evaluation.metrics.base import Sample
from emmdit.shapes import ShapesDetector


class Pixels(Detector):
    """A stand-in: the first pixel's red is the number of cats, its green that of dogs, its blue the cats' color."""

    name, classes, color_names = "pixels", ("cat", "dog"), ("red", "green", "blue")

    def __call__(self, images: Tensor) -> list[list[Detection]]:
        counts = images[:, :2, 0, 0].tolist()
        return [
            [
                Detection(name, 0.95, (10 * i, 0, 10 * i + 8, 8))
                for name, n in zip(self.classes, c, strict=True)
                for i in range(n)
            ]
            for c in counts
        ]

    def colors(self, image: Tensor, detections: list[Detection], class_name: str) -> list[str]:
        return [self.color_names[int(image[2, 0, 0])]] * len(detections)

    def settings(self) -> dict:
        return {"detector": "pixels"}


def line(tag: str, *include: tuple[str, int], prompt: str, **more) -> dict:
    return {"tag": tag, "include": [{"class": n, "count": c, **more} for n, c in include], "prompt": prompt}


LINES = [
    line("single_object", ("cat", 1), prompt="a photo of a cat"),
    line("two_object", ("cat", 1), ("dog", 1), prompt="a photo of a cat and a dog"),
    line("colors", ("cat", 1), prompt="a photo of a green cat", color="green"),
    line("single_object", ("dog", 1), prompt="a photo of a dog"),
]
# For each prompt two images: cats, dogs, color.
SEEN = [[(1, 0, 0), (0, 0, 0)], [(1, 0, 0), (2, 1, 0)], [(1, 0, 1), (1, 0, 1)], [(0, 0, 0), (0, 0, 0)]]
SAMPLES = [Sample(i, k, row, 0) for i, row in enumerate(LINES) for k in range(2)]


def images(samples: list[Sample]) -> Tensor:
    batch = torch.zeros(len(samples), 3, 4, 4, dtype=torch.uint8)
    for image, sample in zip(batch, samples, strict=True):
        image[:, 0, 0] = torch.tensor(SEEN[sample.index][sample.number])
    return batch


def judged(samples: list[Sample]) -> GenEval:
    metric = GenEval(Pixels())
    metric.begin(SAMPLES)
    for part in (samples[:3], samples[3:]):
        if part:
            metric.update(images(part), part)
    return metric


# -------------------------------------------------------------------------------- the metric


def test_scores():
    metric = judged(SAMPLES)
    assert metric.name == "geneval_pixels" and metric.label(8, "colors") == "geneval_pixels_colors"
    # single_object 1 of 4, two_object 1 of 2, colors 2 of 2: not the mean over images, which is 4 of 8
    assert metric.compute() == {"": (0.25 + 0.5 + 1) / 3, "single_object": 0.25, "two_object": 0.5, "colors": 1.0}
    assert [row["correct"] for row in metric.rows] == [True, False, False, True, True, True, False, False]
    assert metric.settings()["counting_threshold"] == 0.9 and not metric.state_dict()


def test_unseen_prompts_are_scored_apart():
    """The last two prompts, (2 of 2, colors) and (0 of 2, single_object), are held out of training."""
    apart = [Sample(s.index, s.number, s.line | {"unseen": True} if s.index > 1 else s.line, 0) for s in SAMPLES]
    metric = GenEval(Pixels())
    metric.begin(apart)
    metric.update(images(apart), apart)
    assert metric.compute() == {
        **{"": 0.5, "single_object": 0.5, "two_object": 0.5},
        **{"unseen": 0.5, "unseen_single_object": 0.0, "unseen_colors": 1.0},
    }
    assert metric.label(8, "unseen") == "geneval_pixels_unseen"
    seen, unseen = summary(metric.rows).split("\n\nSummary of unseen compositions\n")
    assert "Total images: 4" in seen and "colors" not in seen
    assert "Total images: 4" in unseen and "two_object" not in unseen
    metric.begin(apart[4:])
    metric.update(images(apart[4:]), apart[4:])
    assert metric.compute() == {"unseen": 0.5, "unseen_single_object": 0.0, "unseen_colors": 1.0}


def test_order_and_repeats_do_not_matter():
    again = judged([*SAMPLES[::-1], SAMPLES[0], SAMPLES[1]])
    assert again.compute() == judged(SAMPLES).compute()


def test_a_part_of_the_set_has_no_score():
    first = "00000/samples/00001.png.*'a photo of a cat'.*00001/samples/00000.png"
    with pytest.raises(ValueError, match=rf"\b3\b.*\b8\b.*\b2\b.*{first}"):
        judged([SAMPLES[0], *SAMPLES[4:]]).compute()
    with pytest.raises(ValueError, match=r"^(?!.*\.png).*GenEval.*\bbegin\b"):
        GenEval(Pixels()).compute()
    with pytest.raises(ValueError, match=r"00009/samples/00000\.png.*\bbegin\b"):
        judged([]).update(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), [Sample(9, 0, LINES[0], 0)])


def test_reset_keeps_the_announced_images():
    metric = judged(SAMPLES)
    metric.reset()
    assert metric.rows == []
    with pytest.raises(ValueError, match=r"\b8\b.*\b8\b.*00000/samples/00000\.png"):
        metric.compute()
    metric.update(images(SAMPLES), SAMPLES)
    assert metric.compute()["colors"] == 1.0


def test_prompts_that_cannot_be_judged_are_named_before_any_image():
    metric = GenEval(ShapesDetector())
    with pytest.raises(ValueError, match="prompt 0 .*'shapes'.*'bench'"):
        metric.begin([Sample(0, 0, official_prompts()[0], 0)])
    pink = line("colors", ("star", 1), prompt="a photo of a pink star", color="pink")
    with pytest.raises(ValueError, match="prompt 0 .*'shapes'.*'pink'"):
        metric.begin([Sample(0, 0, pink, 0)])
    with pytest.raises(ValueError, match="prompt 7 .*'a cat'.*\"tag\""):
        metric.begin([Sample(7, 0, {"prompt": "a cat"}, 0)])


# -------------------------------------------------------------------------------- the results file


def test_rows_have_the_official_columns(tmp_path: Path):
    rows = judged(SAMPLES).rows
    write_results(tmp_path / "results.jsonl", rows[::-1])
    written = [json.loads(text) for text in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [list(row) for row in written] == [
        ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    ] * len(rows)
    assert [row["filename"] for row in written] == sorted(sample.path for sample in SAMPLES)
    assert json.loads(written[3]["metadata"]) == LINES[1]
    assert json.loads(written[3]["details"]) == {
        "cat": [[0, 0, 8, 8, 0.95], [10, 0, 18, 8, 0.95]],
        "dog": [[0, 0, 8, 8, 0.95]],
    }
    assert written[2]["reason"] == "expected dog>=1, found 0" and written[2]["correct"] is False
    assert written == sorted(rows, key=lambda row: row["filename"])


def test_summary():
    assert summary(judged(SAMPLES).rows) == (
        "Summary\n=======\nTotal images: 8\nTotal prompts: 4\n% correct images: 50.00%\n% correct prompts: 75.00%\n\n"
        "Task breakdown\n==============\nsingle_object    = 25.00% (1 / 4)\ntwo_object       = 50.00% (1 / 2)\n"
        "colors           = 100.00% (2 / 2)\n\nOverall score (avg. over tasks): 0.58333"
    )
