"""GenEval's prompts: the official 553 lines made anew, others of the same kind, and those of a user's file.

Nothing of the benchmark is shipped: its prompts follow from a seed, its classes and its colours (arXiv 2310.11513),
and `official_prompts` checks that they are the official ones byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from emmdit.evaluation.geneval.judge import COLORS

Line = dict[str, Any]

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
# COCO's 80 classes in COCO's order, by which a detector's outputs are numbered; three have names of GenEval's own.
_CLASSES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv,
laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink,
refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush
"""
CLASSES = tuple(name.strip() for name in _CLASSES.split(","))
UNCOLORED = "person"  # never asked for in a colour

OFFICIAL_SEED = 43
OFFICIAL_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"  # evaluation_metadata.jsonl
PROMPTS_SHA256 = "55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680"  # generation_prompts.txt


def official_prompts() -> list[Line]:
    """The 553 lines of the benchmark, in its order; fresh dicts.

    Raises:
        RuntimeError: this numpy draws other numbers than those that the official file was made with.
    """
    return [json.loads(line) for line in _official().splitlines()]


@lru_cache(maxsize=1)
def _official() -> bytes:
    text = prompts_jsonl(generate_prompts())
    if hashlib.sha256(text).hexdigest() != OFFICIAL_SHA256:
        raise RuntimeError(
            f"numpy {np.__version__} does not reproduce GenEval's official prompts: use one from 1.23 to 2.5."
        )
    return text


def generate_prompts(
    classes: Sequence[str] = CLASSES,
    colors: Sequence[str] = COLORS,
    seed: int = OFFICIAL_SEED,
    n: int | Mapping[str, int] = 100,
    uncolored: str | None = UNCOLORED,
) -> list[Line]:
    """Prompts of the six tasks in GenEval's format and order; without arguments the official ones.

    Args:
        n: drawn for each task, or {task: number}, where a task left out has none. What is drawn twice is dropped.
            single_object has one prompt for each class, unless `n` names it.
        uncolored: the class that is never asked for in a colour.
    """
    _check(classes, colors, uncolored)
    if not isinstance(n, Mapping):
        n = dict.fromkeys(TASKS, n) | {"single_object": len(classes)}
    elif wrong := [task for task in n if task not in TASKS]:
        raise ValueError(f"{wrong[0]!r} is no task of GenEval; the tasks are {', '.join(TASKS)}.")
    # One stream for all tasks: the order and kind of every draw decide which prompts are made.
    rng = np.random.default_rng(seed)
    lines: dict[str, Line] = {}
    if n.get("single_object"):
        for i in rng.choice(len(classes), size=len(classes), replace=False)[: n["single_object"]]:
            line = _line("single_object", [_clause(classes[i])])
            lines.setdefault(json.dumps(line), line)
    for task, draw in _DRAWS.items():
        for _ in range(n.get(task, 0)):
            line = draw(rng, classes, colors, uncolored)
            lines.setdefault(json.dumps(line), line)
    return list(lines.values())


def training_prompts(
    n: int,
    seed: int = 0,
    classes: Sequence[str] = CLASSES,
    colors: Sequence[str] = COLORS,
    held_out: Iterable[Mapping[str, Any]] | None = None,
    uncolored: str | None = UNCOLORED,
) -> list[Line]:
    """`n` different prompts of each task that are no test prompts, in GenEval's task order, for reinforcement learning.

    A prompt is left out if `held_out` (the official ones) has it, also with its two objects exchanged, or the same
    places told from the other object ("a left of b", "b left of a", "b right of a"). A task that runs out gives
    fewer: single_object has none left, since every class is a test prompt; counting has at most 160.
    """
    _check(classes, colors, uncolored)
    taken = {_content(line) for line in (official_prompts() if held_out is None else held_out)}
    lines: list[Line] = []
    draws = {"single_object": _single_object, **_DRAWS}
    for number, task in enumerate(TASKS):
        rng = np.random.default_rng([seed, number])
        made: dict[str, Line] = {}
        misses = 0
        while len(made) < n and misses < 5000:  # then hardly any is left
            line = draws[task](rng, classes, colors, uncolored)
            if line["prompt"] in made or _content(line) in taken:
                misses += 1
            else:
                made[line["prompt"]], misses = line, 0
        lines += made.values()
    return lines


def prompts_jsonl(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """As in the official evaluation_metadata.jsonl."""
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def prompts_txt(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """As in the official generation_prompts.txt."""
    return "".join(line["prompt"] + "\n" for line in lines).encode()


# ------------------------------------------------------------------------------------------ one prompt of each task

Draw = Callable[[np.random.Generator, Sequence[str], Sequence[str], str | None], Line]


def _single_object(rng: np.random.Generator, classes: Sequence[str], colors: Sequence[str], _: str | None) -> Line:
    return _line("single_object", [_clause(classes[rng.choice(len(classes))])])


def _two_object(rng: np.random.Generator, classes: Sequence[str], colors: Sequence[str], _: str | None) -> Line:
    a, b = rng.choice(len(classes), size=2, replace=False)
    return _line("two_object", [_clause(classes[a]), _clause(classes[b])])


def _counting(rng: np.random.Generator, classes: Sequence[str], colors: Sequence[str], _: str | None) -> Line:
    name = classes[rng.choice(len(classes))]
    count = int(rng.integers(min(NUMBERS), max(NUMBERS) + 1))
    return _line("counting", [_clause(name, count)], exclude=[_clause(name, count + 1)])


def _colors(rng: np.random.Generator, classes: Sequence[str], colors: Sequence[str], uncolored: str | None) -> Line:
    allowed = _colored(classes, uncolored)
    name = allowed[rng.choice(len(allowed))]
    return _line("colors", [_clause(name, color=colors[rng.choice(len(colors))])])


def _position(rng: np.random.Generator, classes: Sequence[str], colors: Sequence[str], _: str | None) -> Line:
    a, b = rng.choice(len(classes), size=2, replace=False)
    relation = RELATIONS[rng.choice(len(RELATIONS))]
    return _line("position", [_clause(classes[b]), _clause(classes[a], position=[relation, 0])])


def _color_attr(rng: np.random.Generator, classes: Sequence[str], colors: Sequence[str], uncolored: str | None) -> Line:
    allowed = _colored(classes, uncolored)
    objects = rng.choice(len(allowed), size=2, replace=False)
    shades = rng.choice(len(colors), size=2, replace=False)
    pairs = zip(objects, shades, strict=True)
    return _line("color_attr", [_clause(allowed[i], color=colors[c]) for i, c in pairs])


_DRAWS: dict[str, Draw] = {
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}


def _colored(classes: Sequence[str], uncolored: str | None) -> list[str]:
    """The classes after `uncolored`, then those before it: the order the official draws count in."""
    if uncolored not in classes:
        return list(classes)
    at = list(classes).index(uncolored)
    return [*classes[at + 1 :], *classes[:at]]


def _clause(name: str, count: int = 1, **more: Any) -> Line:
    return {"class": name, "count": count, **more}


def _line(tag: str, include: list[Line], exclude: list[Line] | None = None) -> Line:
    """The keys in the official order."""
    more = {"exclude": exclude} if exclude else {}
    return {"tag": tag, "include": include, **more, "prompt": f"a photo of {_phrase(tag, include)}"}


def _phrase(tag: str, include: list[Line]) -> str:
    if tag == "counting":
        name, count = include[0]["class"], include[0]["count"]
        return f"{NUMBERS[count]} {name}{'es' if name.endswith('s') else 's'}"
    named = [_with_article(f"{c['color']} {c['class']}" if "color" in c else c["class"]) for c in include]
    if tag == "position":  # the target is the first clause and comes last in the text
        return f"{named[1]} {include[1]['position'][0]} {named[0]}"
    return " and ".join(named)


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _content(line: Mapping[str, Any]) -> tuple:
    """The same for two prompts of a task that ask for the same objects, whichever is named first."""
    objects = frozenset((c["class"], c["count"], c.get("color")) for c in line.get("include", ()))
    relations = {c["position"][0] for c in line.get("include", ()) if "position" in c}
    axes = frozenset("across" if r in ("left of", "right of") else "along" for r in relations)
    return line.get("tag"), objects, axes


def _check(classes: Sequence[str], colors: Sequence[str], uncolored: str | None) -> None:
    for what, given, least in (("classes", classes, 2 + (uncolored in classes)), ("colors", colors, 2)):
        if len(set(given)) != len(given) or len(given) < least or not all(given):
            raise ValueError(f"GenEval prompts need at least {least} different {what}, got {list(given)}.")
