"""What looks for objects in pictures: the interface, and the shapes world's own reader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .judge import Detection


class Detector(ABC):
    """Finds the objects of known classes in pictures, and says what colour they have.

    `name` goes into the metric's name (`geneval_hf`): scores of two detectors can not be compared.
    """

    name: str
    classes: tuple[str, ...]
    color_names: tuple[str, ...]

    def prepare(self, device: torch.device | str = "cpu") -> None:  # noqa: B027 - nothing to do is fine
        """Load and check all that is needed."""

    @abstractmethod
    def __call__(self, images: Tensor) -> list[list[Detection]]:
        """uint8 (N, 3, H, W) -> the detections in each picture, in any order, boxes in its pixels."""

    @abstractmethod
    def colors(self, image: Tensor, detections: Sequence[Detection], class_name: str) -> list[str]:
        """The colour of each of `detections`, which are of `class_name` and were found in `image`, uint8 (3, H, W)."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that decides about what is found, fit for JSON."""


def check_images(images: Tensor) -> None:
    """Raise ValueError unless `images` are uint8 (N, 3, H, W)."""
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"A detector reads uint8 images (N, 3, H, W), not {images.dtype} {tuple(images.shape)}.")


@dataclass(frozen=True)
class ColoredDetection(Detection):
    """A detection whose colour came with it."""

    color: str = ""


class ShapesDetector(Detector):
    """Reads pictures of the shapes world (`emmdit.data.shapes.read_scene`): no weights, colours included."""

    name = "shapes"

    def __init__(self) -> None:
        from emmdit.data.shapes.render import PALETTE, SHAPES

        self.classes, self.color_names = SHAPES, tuple(PALETTE)

    def __call__(self, images: Tensor) -> list[list[Detection]]:
        from emmdit.data.shapes.read import read_scene

        check_images(images)
        return [
            [ColoredDetection(f.shape, f.score, f.box, f.mask, f.color) for f in read_scene(picture)]
            for picture in images.permute(0, 2, 3, 1).cpu().numpy()
        ]

    def colors(self, image: Tensor, detections: Sequence[Detection], class_name: str) -> list[str]:
        return [detection.color for detection in detections]

    def settings(self) -> dict[str, Any]:
        from emmdit.data.shapes.read import IOU_HOPELESS, IOU_SURE, IOU_TEMPERATURE, MIN_AREA

        return {
            "detector": "read_scene",
            "min_area": MIN_AREA,
            "iou_temperature": IOU_TEMPERATURE,
            "iou_hopeless": IOU_HOPELESS,
            "iou_sure": IOU_SURE,
        }
