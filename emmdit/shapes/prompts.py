"""Prompts of the shapes world with GenEval metadata."""

from __future__ import annotations

from typing import Any

from emmdit.evaluation.prompts import PromptSet
from emmdit.shapes.world import ShapesWorld


class ShapesPrompts(PromptSet):
    """Prompts of the shapes world with GenEval metadata: at most `per_task` different ones of each of the six tasks.

    Tasks have 4, 12, 12, 24, 48 and 360 different prompts: 200 of each make 300 in all.
    """

    name = "shapes"

    def __init__(self, per_task: int = 200, images: int = 4) -> None:
        super().__init__(images)
        if per_task < 1:
            raise ValueError(f"ShapesPrompts needs per_task >= 1, got {per_task}.")
        self.per_task = per_task

    def load(self) -> list[dict[str, Any]]:
        return ShapesWorld().prompts(self.per_task)
