"""Colour before outline: what a few minutes of training in the shapes world can be measured by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emmdit.evaluation.metrics.base import ImageMetric, Sample
from emmdit.shapes.reader import main_color


class AskedColor(ImageMetric):
    """Share of the pictures of one coloured object (GenEval's task `colors`) in which the asked colour covers most.

    Unlike GenEval it does not ask for the outline, so it moves long before GenEval does. Shapes world only.
    """

    kind = "asked_color"

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def name(self) -> str:
        return self.kind

    def begin(self, samples: list[Sample]) -> None:
        if not any(sample.line.get("tag") == "colors" for sample in samples):
            raise ValueError("asked_color needs prompts of the task colors: use a prompt set of the shapes world.")

    def update(self, images: Tensor, samples: list[Sample]) -> None:
        for image, sample in zip(images, samples, strict=True):
            if sample.line.get("tag") == "colors":
                asked = sample.line["include"][0]["color"]
                self.right += main_color(image.permute(1, 2, 0).cpu().numpy()) == asked
                self.count += 1

    def compute(self) -> dict[str, float]:
        if not self.count:
            raise ValueError("asked_color has seen no picture of one coloured object.")
        return {"": float(self.right / self.count)}

    def settings(self) -> dict[str, Any]:
        return {"task": "colors", "rule": "palette colour that explains the most pixels, each covered more than half"}
