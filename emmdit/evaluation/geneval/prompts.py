"""GenEval's prompts: the grammar of its lines, the official 553, and others of the same kind.

No file of the benchmark is shipped: its prompts follow from a seed, its classes and its colors (arXiv 2310.11513), and
`official_prompts` checks that they equal the official ones byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from emmdit.evaluation.geneval.judge import COLORS

Line = dict[str, Any]

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
# COCO's 80 classes in COCO's order, the order of a detector's outputs; three have GenEval's own names.
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
UNCOLORED = "person"  # never asked for in a color

OFFICIAL_SEED = 43
OFFICIAL_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"  # evaluation_metadata.jsonl


def official_prompts() -> list[Line]:
    """The 553 lines of the benchmark, in its order; fresh dicts.

    Raises:
        RuntimeError: this numpy generates other random numbers than those behind the official file.
    """
    return [json.loads(line) for line in _official().splitlines()]


@lru_cache(maxsize=1)
def _official() -> bytes:
    text = prompts_jsonl(generate_prompts())
    if hashlib.sha256(text).hexdigest() != OFFICIAL_SHA256:
        raise RuntimeError(
            f"numpy {np.__version__} does not reproduce GenEval's official prompts: install a numpy from 1.23 to 2.5."
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
        n: number of draws for each task, or {task: number}, where tasks left out get none. Duplicates are dropped.
            single_object has one prompt for each class, unless `n` names it.
        uncolored: the class that is never asked for in a color.
    """
    _check(classes, colors, uncolored)
    if not isinstance(n, Mapping):
        n = dict.fromkeys(TASKS, n) | {"single_object": len(classes)}
    elif wrong := [task for task in n if task not in TASKS]:
        raise ValueError(f"{wrong[0]!r} is not a task of GenEval; the tasks are {', '.join(TASKS)}.")
    # One stream for all tasks: the order and kind of every draw decide which prompts are made.
    rng = np.random.default_rng(seed)
    lines = []
    if n.get("single_object"):
        chosen = rng.choice(len(classes), size=len(classes), replace=False)[: n["single_object"]]
        lines = [prompt_line("single_object", [(classes[i], None)]) for i in chosen]
    for task in TASKS[1:]:
        lines += [_draw(task, rng, classes, colors, uncolored) for _ in range(n.get(task, 0))]
    return list({line["prompt"]: line for line in lines}.values())


def training_prompts(
    n: int,
    seed: int = 0,
    classes: Sequence[str] = CLASSES,
    colors: Sequence[str] = COLORS,
    held_out: Iterable[Mapping[str, Any]] | None = None,
    uncolored: str | None = UNCOLORED,
) -> list[Line]:
    """`n` different prompts of each task that are not test prompts, in GenEval's task order, for post-training.

    A prompt is left out if `held_out` (default: the official ones) has it, also with its two objects swapped, or the
    same arrangement described from the other object ("a left of b", "b left of a", "b right of a"). A task that runs
    out gives fewer: single_object none, since every class is a test prompt; counting at most 160.
    """
    _check(classes, colors, uncolored)
    taken = {_content(line) for line in (official_prompts() if held_out is None else held_out)}
    lines: dict[str, Line] = {}
    for number, task in enumerate(TASKS):
        rng = np.random.default_rng([seed, number])
        enough, misses = len(lines) + n, 0
        while len(lines) < enough and misses < 5000:  # after 5000 misses in a row hardly any are left
            line = _draw(task, rng, classes, colors, uncolored)
            if line["prompt"] in lines or _content(line) in taken:
                misses += 1
            else:
                lines[line["prompt"]], misses = line, 0
    return list(lines.values())


def prompts_jsonl(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """The lines as the bytes of the official evaluation_metadata.jsonl."""
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


# ---------------------------------------------------------------------------------------------- the grammar of a line


def prompt_line(task: str, objects: Sequence[tuple[str, str | None]], relation: str | None = None) -> Line:
    """The line of a prompt, keys and clauses in the official order.

    Args:
        objects: (class, color or None) of each object in the order the prompt names them; for counting all alike.
        relation: of the first object to the second, for the task position.
    """
    clauses: list[Line] = [
        {"class": name, "count": 1, **({"color": color} if color else {})} for name, color in objects
    ]
    phrases = [with_article(f"{color} {name}" if color else name) for name, color in objects]
    if task == "counting":
        name, count = objects[0][0], len(objects)
        include, exclude = [{"class": name, "count": count}], [{"class": name, "count": count + 1}]
        prompt = f"a photo of {NUMBERS[count]} {plural(name)}"
        return {"tag": task, "include": include, "exclude": exclude, "prompt": prompt}
    if relation:  # the target is the first clause
        clauses = [clauses[1], clauses[0] | {"position": [relation, 0]}]
    return {"tag": task, "include": clauses, "prompt": "a photo of " + f" {relation or 'and'} ".join(phrases)}


def with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _draw(
    task: str, rng: np.random.Generator, classes: Sequence[str], colors: Sequence[str], uncolored: str | None
) -> Line:
    """A random prompt of `task`; the calls of `rng` are those of the official script."""
    if task in ("colors", "color_attr") and uncolored in classes:
        at = list(classes).index(uncolored)
        classes = [*classes[at + 1 :], *classes[:at]]  # the order of the official draws
    if task in ("two_object", "position", "color_attr"):
        names = [classes[i] for i in rng.choice(len(classes), size=2, replace=False)]
    else:
        names = [classes[rng.choice(len(classes))]]
    shades: list[str | None] = [None] * len(names)
    relation = None
    if task == "counting":
        names *= int(rng.integers(min(NUMBERS), max(NUMBERS) + 1))
        shades *= len(names)
    elif task == "colors":
        shades = [colors[rng.choice(len(colors))]]
    elif task == "color_attr":
        shades = [colors[i] for i in rng.choice(len(colors), size=2, replace=False)]
    elif task == "position":
        relation = RELATIONS[rng.choice(len(RELATIONS))]
    return prompt_line(task, list(zip(names, shades, strict=True)), relation)


def _content(line: Mapping[str, Any]) -> tuple:
    """Equal for two prompts of a task that ask for the same objects, whichever is named first."""
    objects = frozenset((c["class"], c["count"], c.get("color")) for c in line.get("include", ()))
    relations = {c["position"][0] for c in line.get("include", ()) if "position" in c}
    axes = frozenset("horizontal" if r in ("left of", "right of") else "vertical" for r in relations)
    return line.get("tag"), objects, axes


def _check(classes: Sequence[str], colors: Sequence[str], uncolored: str | None) -> None:
    for kind, given, least in (("classes", classes, 2 + (uncolored in classes)), ("colors", colors, 2)):
        if len(set(given)) != len(given) or len(given) < least or not all(given):
            raise ValueError(f"GenEval prompts need at least {least} different {kind}, got {list(given)}.")
