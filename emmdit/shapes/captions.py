"""Phrasings of the shapes world's captions: openings times two forms for each task, and what is held out of training.

The first opening with the first form is GenEval's own prompt. No phrasing changes what is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

from emmdit.evaluation.geneval.prompts import NUMBERS, RELATIONS, plural

OPENINGS = (
    "a photo of", "a picture of", "an image of", "a drawing of", "a painting of", "an illustration of", "a view of", ""
)  # fmt: skip
FORMS = {
    "single_object": ("a {shape}", "one {shape}"),
    "two_object": ("a {shape} and a {other}", "a {shape} with a {other}"),
    "counting": ("{number} {plural}", "a group of {number} {plural}"),
    "colors": ("a {color} {shape}", "one {color} {shape}"),
    "position": ("a {shape} {relation} a {other}", "a {shape} {synonym} a {other}"),
    "color_attr": ("a {color} {shape} and a {other_color} {other}", "a {color} {shape} with a {other_color} {other}"),
}
SYNONYMS = {"left of": "to the left of", "right of": "to the right of", "above": "over", "below": "under"}
OPPOSITE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))

# Compositions that no training caption asks for. Every shape, color, number and relation is still asked for often.
HELD_OUT_COLORS = {("circle", "green"), ("square", "yellow"), ("star", "blue"), ("cross", "red")}
HELD_OUT_NUMBERS = {("cross", 2), ("square", 3), ("star", 4)}
HELD_OUT_RELATIONS = {
    ("circle", "left of", "star"), ("cross", "left of", "square"), ("square", "above", "star"),
    ("cross", "above", "circle"),
}  # fmt: skip


def phrasings(task: str, objects: Sequence[tuple[str, str | None]], relation: str | None) -> tuple[str, ...]:
    """All captions that ask for these (shape, color or None), in the same order for all of a task; GenEval's first."""
    (shape, color), (other, other_color) = objects[0], objects[-1]
    words = dict(shape=shape, color=color, other=other, other_color=other_color, plural=plural(shape))
    words |= dict(number=NUMBERS.get(len(objects)), relation=relation, synonym=SYNONYMS.get(relation))
    return tuple(f"{opening} {form.format(**words)}".strip() for form in FORMS[task] for opening in OPENINGS)


def is_held_out(task: str, objects: Sequence[tuple[str, str | None]], relation: str | None) -> bool:
    """Whether this request is kept out of the training captions, whichever object of a relation is named first."""
    if task == "counting":
        return (objects[0][0], len(objects)) in HELD_OUT_NUMBERS
    if relation:
        (a, _), (b, _) = objects
        return not HELD_OUT_RELATIONS.isdisjoint({(a, relation, b), (b, OPPOSITE[relation], a)})
    return not HELD_OUT_COLORS.isdisjoint(objects)
