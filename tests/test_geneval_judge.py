"""GenEval's judge: the official evaluator's 600 verdicts, and the rules that these do not reach."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from emmdit.evaluation.geneval import Detection, judge
from emmdit.evaluation.geneval.judge import relations_of

CASES = [json.loads(line) for line in (Path(__file__).parent / "data/geneval/judge_cases.jsonl").open()]
ANYWHERE = (0, 0, 10, 10)


def never(objects, class_name):
    raise AssertionError("no clause asks for a color")


def cats(*scores: float, name: str = "cat") -> list[Detection]:
    return [Detection(name, score, ANYWHERE) for score in scores]


def clause(count: int = 1, name: str = "cat", **more) -> dict:
    return {"class": name, "count": count, **more}


def asks(*include: dict, exclude: tuple = (), tag: str = "two_object") -> dict:
    return {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": ""}


def box_at(x: float, y: float, size: float = 100) -> Detection:
    return Detection("cat", 1.0, (x - size / 2, y - size / 2, x + size / 2, y + size / 2))


# -------------------------------------------------------------------------------- the official verdicts


def test_all_official_verdicts_and_reasons():
    assert len(CASES) == 600
    for case in CASES:
        detections = [Detection(d["class"], d["score"], d["box"]) for d in case["detections"]]
        color = {id(d): raw["color"] for d, raw in zip(detections, case["detections"], strict=True)}
        verdict = judge(case["metadata"], detections, lambda objects, _, color=color: [color[id(d)] for d in objects])
        assert verdict == (case["correct"], case["reason"]), case


# -------------------------------------------------------------------------------- which detections count


def test_thresholds_are_strict():
    assert judge(asks(clause()), cats(0.3), never) == (False, "expected cat>=1, found 0")
    assert judge(asks(clause()), cats(0.3001), never).correct
    assert judge(asks(clause(), tag="counting"), cats(0.9), never) == (False, "expected cat>=1, found 0")
    assert judge(asks(clause(), tag="counting"), cats(0.9001), never).correct


def test_sixteen_of_a_class_count():
    many = asks(clause(16), exclude=(clause(17),))
    assert judge(many, cats(*[0.5] * 30, *[0.5] * 3), never).correct
    assert judge(asks(clause(17)), cats(*[0.5] * 30), never).reason == "expected cat>=17, found 16"
    both = cats(*[0.5] * 20) + cats(0.4, name="dog")
    assert judge(asks(clause(), clause(name="dog")), both, never).correct


# -------------------------------------------------------------------------------- colors


def test_the_best_detections_are_classified_and_no_others():
    seen = []

    def classify(objects, class_name):
        seen.append(([d.score for d in objects], class_name))
        return ["red"] * len(objects)

    scores = (0.2, 0.5, 0.9, 0.7)
    assert judge(asks(clause(2, color="red")), cats(*scores), classify).correct
    assert seen == [([0.9, 0.7], "cat")]
    assert not judge(asks(clause(5, color="red")), cats(*scores), classify).correct
    assert len(seen) == 1  # too few objects: nothing to classify


def test_found_colors_are_in_the_order_of_the_benchmark():
    colors = ["white", "red", "teal", "green", "white", "mauve"]
    verdict = judge(asks(clause(6, color="red")), cats(*[0.5] * 6), lambda *_: colors)
    counts = "1 red, 1 green, 2 white, 1 teal, 1 mauve"
    assert verdict == (False, f"expected red cat>=6, found 1 red; and {counts}")


# -------------------------------------------------------------------------------- positions


@pytest.mark.parametrize(
    ("offset", "relations"),
    [
        ((15, 0), []),
        ((20, 0), []),
        ((25, 0), []),  # beyond the slack of 20, but by a fifth of the offset only
        ((39, 0), []),
        ((41, 0), ["right of"]),
        ((-41, 0), ["left of"]),
        ((0, 41), ["below"]),
        ((0, -41), ["above"]),
        ((120, 120), ["right of", "below"]),
        ((-120, -120), ["left of", "above"]),
        ((-120, 30), ["left of"]),
        ((0, 0), []),
    ],
)
def test_relations(offset: tuple[float, float], relations: list[str]):
    assert relations_of(box_at(300 + offset[0], 300 + offset[1]), box_at(300, 300)) == relations


def test_every_object_needs_the_relation_to_every_target():
    def of(name: str, x: float) -> Detection:
        return Detection(name, 0.5, box_at(x, 0).box)

    wanted = asks(clause(2, "dog"), clause(2, position=["right of", 0]), tag="position")
    dogs = [of("dog", 0), of("dog", 50)]
    assert judge(wanted, [*dogs, of("cat", 300), of("cat", 400)], never).correct
    one_wrong = judge(wanted, [*dogs, of("cat", 300), of("cat", -300)], never)
    assert one_wrong == (False, "expected cat right of target, found left of target")
    no_relation = judge(wanted, [*dogs, of("cat", 300), of("cat", 60)], never)
    assert no_relation == (False, "expected cat right of target, found  target")


def test_a_failed_clause_is_no_target():
    wanted = asks(clause(1, "dog", color="red"), clause(1, position=["above", 0]), tag="position")
    verdict = judge(wanted, cats(0.5) + cats(0.5, name="dog"), lambda *_: ["blue"])
    assert verdict.reason.splitlines() == [
        "expected red dog>=1, found 0 red; and 1 blue",
        "no target for cat to be above",
    ]


# -------------------------------------------------------------------------------- types


def test_detections_compare_and_hash_whatever_their_box_and_mask_are():
    masked = Detection("cat", 0.5, np.array([0, 1, 2, 3]), np.ones((4, 4), dtype=bool))
    assert masked == Detection("cat", 0.5, [0, 1, 2, 3]) and len({masked, Detection("cat", 0.5, (0, 1, 2, 3))}) == 1
    assert masked.box == (0.0, 1.0, 2.0, 3.0) and "mask" not in repr(masked)
