"""Ground truth of a scene of the shapes world: which captions and relations hold, and what each patch shows."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from emmdit.evaluation.geneval.judge import POSITION_SLACK
from emmdit.evaluation.geneval.prompts import RELATIONS, TASKS
from emmdit.shapes import PALETTE, SHAPES, Scene, ShapeObject, ShapesWorld, Spec
from emmdit.shapes.captions import OPPOSITE
from emmdit.shapes.render import coverage

HOLDS, HOLDS_NOT = 0.55, 0.45  # GenEval's threshold for a relation is 0.5


class Captions:
    """All requests of the world, each with its phrasings, and which of them a scene satisfies.

    `texts` are their first phrasings, by which `index` finds them.
    """

    def __init__(self, world: ShapesWorld) -> None:
        self.specs = [spec for task in TASKS for spec in world.specs(task)]
        self.texts = [spec.caption for spec in self.specs]
        self.index = {text: i for i, text in enumerate(self.texts)}

    def draw(self, generator: torch.Generator) -> list[str]:
        """Each request in a phrasing drawn at random."""
        numbers = torch.randint(len(self.specs[0].captions), (len(self.specs),), generator=generator)
        return [spec.captions[i] for spec, i in zip(self.specs, numbers.tolist(), strict=True)]

    def truth(self, scene: Scene) -> np.ndarray:
        """(captions,) float32: 1 for true, 0 for false, nan for neither: true of a part only, or near the threshold."""
        truth = np.zeros(len(self.texts), np.float32)
        objects = [(o.shape, o.color) for o in scene.objects]
        shapes = {shape for shape, _ in objects}

        def mark(value: float, task: str, named: Any, relation: str | None = None) -> None:
            if (i := self.index.get(Spec(task, tuple(named), relation).caption)) is not None:
                truth[i] = value

        whole = 1.0 if len(objects) == 1 else np.nan
        for shape, color in objects:
            mark(whole, "single_object", [(shape, None)])
            mark(whole, "colors", [(shape, color)])
        if len(objects) > 1 and len(shapes) == 1:
            mark(1.0, "counting", [(shape, None) for shape, _ in objects])
        if len(objects) == 2 and len(shapes) == 2:
            for a, b in itertools.permutations(scene.objects):
                mark(1.0, "two_object", [(a.shape, None), (b.shape, None)])
                mark(1.0, "color_attr", [(a.shape, a.color), (b.shape, b.color)])
                for relation, value in zip(RELATIONS, relations(a, b), strict=True):
                    mark(value, "position", [(a.shape, None), (b.shape, None)], relation)
        return truth


def relations(a: ShapeObject, b: ShapeObject) -> list[float]:
    """For each of RELATIONS, of a to b: 1 holds, 0 does not, nan near the threshold."""
    dx, dy = a.cx - b.cx, a.cy - b.cy
    slack = POSITION_SLACK * (a.size + b.size)
    shares = [(offset - slack) / float(np.hypot(dx, dy)) for offset in (-dx, dx, -dy, dy)]
    return [1.0 if share > HOLDS else 0.0 if share < HOLDS_NOT else np.nan for share in shares]


def sides(scene: Scene) -> np.ndarray:
    """(shapes, 4) float32: the RELATIONS of each shape to the other; nan unless there are two different ones."""
    known = np.full((len(SHAPES), len(RELATIONS)), np.nan, np.float32)
    if len(scene.objects) == 2 and len({o.shape for o in scene.objects}) == 2:
        for a, b in itertools.permutations(scene.objects):
            known[SHAPES.index(a.shape)] = relations(a, b)
    return known


def stated_sides(spec: Spec) -> np.ndarray:
    """The same for a caption: 1 for what it states, 0 for the opposite, nan for what it leaves open."""
    known = np.full((len(SHAPES), len(RELATIONS)), np.nan, np.float32)
    if spec.relation:
        there, back = RELATIONS.index(spec.relation), RELATIONS.index(OPPOSITE[spec.relation])
        (a, b) = (SHAPES.index(shape) for shape, _ in spec.objects)
        known[a, there] = known[b, back] = 1.0
        known[a, back] = known[b, there] = 0.0
    return known


def near_misses(spec: Spec, world: ShapesWorld) -> dict[str, list[str]]:
    """By kind, the captions that differ from the spec's in one respect."""
    objects = list(spec.objects)
    misses: dict[str, list[Spec]] = {"shape": []}
    if spec.task == "counting":
        misses["count"] = [Spec("counting", (objects[0],) * n) for n in (2, 3, 4) if n != len(objects)]
        misses["shape"] = [Spec("counting", ((s, None),) * len(objects)) for s in world.shapes if s != objects[0][0]]
    else:
        others = [shape for shape in world.shapes if shape not in {present for present, _ in objects}]
        for i, (_, color) in enumerate(objects):
            named = [(*objects[:i], (other, color), *objects[i + 1 :]) for other in others]
            misses["shape"] += [Spec(spec.task, pair, spec.relation) for pair in named]
    if spec.relation:
        misses["opposite relation"] = [Spec("position", spec.objects, OPPOSITE[spec.relation])]
        same_axis = (spec.relation, OPPOSITE[spec.relation])
        misses["other axis"] = [Spec("position", spec.objects, r) for r in RELATIONS if r not in same_axis]
    if spec.task in ("colors", "color_attr"):
        others = [color for color in world.colors if color not in {taken for _, taken in objects}]
        pairs = [(i, (shape, other)) for i, (shape, _) in enumerate(objects) for other in others]
        misses["color"] = [Spec(spec.task, (*objects[:i], pair, *objects[i + 1 :])) for i, pair in pairs]
    if spec.task == "color_attr":
        (a, c), (b, d) = objects
        misses["colors swapped"] = [Spec("color_attr", ((a, d), (b, c)))]
    return {kind: [s.caption for s in specs] for kind, specs in misses.items()}


def patch_targets(scene: Scene, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """The class that covers most of each patch, (patches,) int64: 0 for the ground, else a shape in a color; and for
    patches that show one of two objects its RELATIONS to the other, (patches, 4) float32, elsewhere nan."""
    grid = scene.image_size // patch
    pixels = np.arange(scene.image_size) + 0.5
    best, classes = np.full((grid, grid), 0.25), np.zeros((grid, grid), np.int64)
    related = np.full((grid, grid, len(RELATIONS)), np.nan, np.float32)
    for i, o in enumerate(scene.objects):
        covered = coverage(o.shape, o.cx, o.cy, o.size, pixels, pixels).reshape(grid, patch, grid, patch).mean((1, 3))
        classes[covered > best] = 1 + SHAPES.index(o.shape) * len(PALETTE) + list(PALETTE).index(o.color)
        if len(scene.objects) == 2:
            related[covered > best] = relations(o, scene.objects[1 - i])
        best = np.maximum(best, covered)
    return classes.reshape(-1), related.reshape(-1, len(RELATIONS))
