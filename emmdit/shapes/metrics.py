"""Evaluation in the shapes world: prompts, object detector, asked color, upper and lower reference images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from emmdit.evaluation.geneval.detectors import Detector
from emmdit.evaluation.geneval.judge import Detection
from emmdit.evaluation.metrics.base import ImageMetric, Sample, check_images
from emmdit.evaluation.prompts import PromptSet
from emmdit.shapes.reader import IOU_NONE, IOU_SURE, IOU_TEMPERATURE, MIN_AREA, main_color, read_scene
from emmdit.shapes.render import render_scene
from emmdit.shapes.scene import PALETTE, SHAPES
from emmdit.shapes.world import ShapesWorld

Generate = Callable[[list[str], list[int]], Tensor]  # prompts and seeds -> images (B, 3, H, W) in [-1, 1]


class ShapesPrompts(PromptSet):
    """Prompts of the shapes world with GenEval metadata: at most `per_task` different ones of each of the six tasks.

    Args:
        per_task: prompts of each task that training captions ask for, too; from 65 on some tasks have fewer.
        images: images per prompt.
        unseen: prompts of each task (single_object and two_object have none) whose composition no training caption asks
            for. GenEval scores them apart: `geneval_shapes_unseen`.
        phrasings: how many phrasings to choose from, in their order; 1: only GenEval's own. Default: all.
    """

    name = "shapes"

    def __init__(self, per_task: int = 48, images: int = 4, unseen: int = 0, phrasings: int | None = None) -> None:
        super().__init__(images)
        least = {"per_task": (per_task, 1), "unseen": (unseen, 0), "phrasings": (phrasings, 1)}
        for key, (value, lowest) in least.items():
            if value is not None and value < lowest:
                raise ValueError(f"ShapesPrompts needs {key} >= {lowest}, got {value}.")
        self.per_task, self.unseen, self.phrasings = per_task, unseen, phrasings

    def load(self) -> list[dict[str, Any]]:
        seen = ShapesWorld().prompts(self.per_task, phrasings=self.phrasings)
        unseen = ShapesWorld(split="unseen").prompts(self.unseen, phrasings=self.phrasings)
        return seen + [line | {"unseen": True} for line in unseen]


class ShapesDetector(Detector):
    """GenEval detector that reads images of the shapes world by rules (`read_scene`), colors included: no weights."""

    name = "shapes"

    def __init__(self) -> None:
        self.classes, self.color_names = SHAPES, tuple(PALETTE)

    def __call__(self, images: Tensor) -> list[list[Detection]]:
        check_images(images, self.name)
        return [read_scene(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]

    def colors(self, image: Tensor, detections: Sequence[Detection], class_name: str) -> list[str]:
        return [detection.color for detection in detections]

    def settings(self) -> dict[str, Any]:
        return {
            "detector": "read_scene",
            "min_area": MIN_AREA,
            "iou_temperature": IOU_TEMPERATURE,
            "iou_none": IOU_NONE,
            "iou_sure": IOU_SURE,
        }


class AskedColor(ImageMetric):
    """Color accuracy, an early-training metric: the share of images of one colored object (GenEval's task `colors`)
    that the asked color covers most.

    Unlike GenEval it ignores the outline, so it rises long before GenEval does. Shapes world only.
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
            raise ValueError("asked_color has no image of one colored object: call update with one first.")
        return {"": float(self.right / self.count)}

    def settings(self) -> dict[str, Any]:
        return {"task": "colors", "rule": "palette color with the most pixels, each covered more than half"}


# -- reference images: what the scores of a model lie between ----------------------------------------


def renders(world: ShapesWorld | None = None) -> Generate:
    """Upper reference: for each prompt the render of a scene that shows it."""
    world = world or ShapesWorld()

    def generate(prompts: list[str], seeds: list[int]) -> Tensor:
        scenes = [world.sample_for(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        images = [torch.from_numpy(render_scene(scene)).permute(2, 0, 1) for scene in scenes]
        return torch.stack(images).float() / 127.5 - 1

    return generate


def noise(size: int) -> Generate:
    """Lower reference: images of `size` px whose pixels are independent and uniform."""

    def generate(prompts: list[str], seeds: list[int]) -> Tensor:
        images = [torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(images) * 2 - 1

    return generate
