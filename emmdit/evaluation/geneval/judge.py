"""GenEval's verdict on one image: the objects detected in it compared with those its prompt asks for.

The rules and the wording of the reasons are those of the official evaluator (arXiv 2310.11513), tested against it;
the detector and the color classifier belong to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

SCORE_THRESHOLD = 0.3  # a detection counts if it scores more,
COUNTING_SCORE_THRESHOLD = 0.9  # in the counting task more than this,
MAX_PER_CLASS = 16  # and is among the best of its class
POSITION_SLACK = 0.1  # offsets count beyond this share of the two objects' summed sizes


@dataclass(frozen=True)
class Detection:
    """One detected object: box (x1, y1, x2, y2) in pixels, y down; score in [0, 1]; optional mask (H, W) bool."""

    class_name: str
    score: float
    box: tuple[float, float, float, float]
    mask: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "box", tuple(float(v) for v in self.box))  # lists and arrays cannot be hashed


class Verdict(NamedTuple):
    """`reason` has one line for each error; empty if the image is correct."""

    correct: bool
    reason: str


ColorClassifier = Callable[[Sequence[Detection], str], Sequence[str]]


def judge(metadata: Mapping[str, Any], detections: Iterable[Detection], classify_color: ColorClassifier) -> Verdict:
    """Whether an image shows what `metadata`, a line of GenEval's prompt file, asks for.

    Args:
        metadata: `tag` (the task), `include` and, for counting, `exclude`: lists of clauses with `class`, `count` and
            optionally `color` or `position` ([relation, index of the target's clause]).
        detections: everything the detector found, in any order; thresholds are applied here.
        classify_color: (objects, class name) -> the color of each. Called only where a clause asks for a color.
    """
    objects = confident(detections, metadata["tag"])
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []  # the objects of each clause, None where it failed
    for clause in metadata.get("include", ()):
        found = objects.get(clause["class"], [])[: clause["count"]]
        reason = _unmet(clause, found, matched, classify_color)
        matched.append(None if reason else found)
        reasons += [reason] if reason else []
    for clause in metadata.get("exclude", ()):
        number = len(objects.get(clause["class"], []))
        if number >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {number}")
    return Verdict(not reasons, "\n".join(reasons))


def confident(detections: Iterable[Detection], tag: str) -> dict[str, list[Detection]]:
    """The detections of each class that count in task `tag`, best first."""
    threshold = COUNTING_SCORE_THRESHOLD if tag == "counting" else SCORE_THRESHOLD
    objects: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: d.score, reverse=True):
        of_class = objects.setdefault(detection.class_name, [])
        if detection.score > threshold and len(of_class) < MAX_PER_CLASS:
            of_class.append(detection)
    return objects


def _unmet(
    clause: Mapping[str, Any],
    found: list[Detection],
    matched: Sequence[list[Detection] | None],
    classify_color: ColorClassifier,
) -> str | None:
    """The first error of the objects `found` for `clause`; `matched` holds those of the earlier clauses."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if "color" in clause:
        color, seen = clause["color"], list(classify_color(found, name))
        if seen.count(color) < count:
            shown = sorted(dict.fromkeys(seen), key=lambda c: COLORS.index(c) if c in COLORS else len(COLORS))
            numbers = ", ".join(f"{seen.count(c)} {c}" for c in shown)
            return f"expected {color} {name}>={count}, found {seen.count(color)} {color}; and {numbers}"
    if "position" in clause:
        relation, target = clause["position"]
        targets = matched[target]
        if targets is None:
            return f"no target for {name} to be {relation}"
        for relations in (relations_of(a, b) for a in found for b in targets):
            if relation not in relations:
                return f"expected {name} {relation} target, found {' and '.join(relations)} target"
    return None


def relations_of(a: Detection, b: Detection) -> list[str]:
    """Relations of `a` to `b`: at most one of left of and right of, then at most one of above and below."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = _center_and_size(a), _center_and_size(b)
    x, y = _beyond_slack(ax - bx, aw + bw), _beyond_slack(ay - by, ah + bh)
    if abs(x) < 1e-3 and abs(y) < 1e-3:
        return []
    distance = math.hypot(ax - bx, ay - by)
    holds = {
        "left of": x / distance < -0.5,
        "right of": x / distance > 0.5,
        "above": y / distance < -0.5,
        "below": y / distance > 0.5,
    }
    return [relation for relation, true in holds.items() if true]


def _center_and_size(detection: Detection) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = detection.box
    return (x1 + x2) / 2, (y1 + y2) / 2, abs(x2 - x1), abs(y2 - y1)


def _beyond_slack(offset: float, sizes: float) -> float:
    return math.copysign(max(abs(offset) - POSITION_SLACK * sizes, 0.0), offset)
