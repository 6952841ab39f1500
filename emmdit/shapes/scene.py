"""Scenes of the shapes world: its shapes and colors, what a caption asks for, and where the objects lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from emmdit.evaluation.geneval.prompts import prompt_line
from emmdit.shapes.captions import is_held_out, phrasings

SHAPES = ("circle", "square", "star", "cross")
GROUND = (212, 212, 212)
# Seen from the ground no two colors lie in nearly the same direction, so that a half-covered pixel keeps its color.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (30, 180, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 200, 40),
    "purple": (170, 60, 200),
    "black": (20, 20, 20),
}


@dataclass(frozen=True, slots=True)
class ShapeObject:
    """One object; `cx, cy` (pixels, y down) is the center of its box, `size` the side of that square box."""

    shape: str
    color: str
    cx: float
    cy: float
    size: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2) in pixels."""
        h = self.size / 2
        return (self.cx - h, self.cy - h, self.cx + h, self.cy + h)


@dataclass(frozen=True, slots=True)
class Spec:
    """The request of a caption: the objects in the order the caption names them (`color` None = any).

    `captions` are all phrasings of it; `caption` is the first, GenEval's own.
    """

    task: str
    objects: tuple[tuple[str, str | None], ...]
    relation: str | None = None  # of object 0 to object 1

    @property
    def metadata(self) -> dict[str, Any]:
        """The GenEval line as a fresh dict: tag, include, (exclude,) prompt."""
        return prompt_line(self.task, self.objects, self.relation)

    @property
    def captions(self) -> tuple[str, ...]:
        return _captions(self)

    @property
    def caption(self) -> str:
        return self.captions[0]

    @property
    def held_out(self) -> bool:
        """Whether no training caption asks for this."""
        return is_held_out(self.task, self.objects, self.relation)


@lru_cache(maxsize=1024)
def _captions(spec: Spec) -> tuple[str, ...]:
    return phrasings(spec.task, spec.objects, spec.relation)


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects (in the caption's order), the spec they satisfy, and the caption that asks for it."""

    spec: Spec
    objects: tuple[ShapeObject, ...]
    image_size: int
    caption: str

    @property
    def task(self) -> str:
        return self.spec.task

    @property
    def metadata(self) -> dict[str, Any]:
        """The GenEval line, as `Spec.metadata`, with the caption as its prompt."""
        return self.spec.metadata | {"prompt": self.caption}
