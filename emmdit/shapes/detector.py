"""The shapes world's object detector for GenEval: its reader, behind the detector interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from emmdit.evaluation.geneval.detectors import Detector, check_images
from emmdit.evaluation.geneval.judge import Detection
from emmdit.shapes.reader import IOU_HOPELESS, IOU_SURE, IOU_TEMPERATURE, MIN_AREA, read_scene
from emmdit.shapes.render import PALETTE, SHAPES


@dataclass(frozen=True)
class ColoredDetection(Detection):
    """A detection whose colour came with it."""

    color: str = ""


class ShapesDetector(Detector):
    """Reads pictures of the shapes world (`emmdit.shapes.read_scene`): no weights, colours included."""

    name = "shapes"

    def __init__(self) -> None:
        self.classes, self.color_names = SHAPES, tuple(PALETTE)

    def __call__(self, images: Tensor) -> list[list[Detection]]:
        check_images(images)
        return [
            [ColoredDetection(f.shape, f.score, f.box, f.mask, f.color) for f in read_scene(picture)]
            for picture in images.permute(0, 2, 3, 1).cpu().numpy()
        ]

    def colors(self, image: Tensor, detections: Sequence[Detection], class_name: str) -> list[str]:
        return [detection.color for detection in detections]

    def settings(self) -> dict[str, Any]:
        return {
            "detector": "read_scene",
            "min_area": MIN_AREA,
            "iou_temperature": IOU_TEMPERATURE,
            "iou_hopeless": IOU_HOPELESS,
            "iou_sure": IOU_SURE,
        }
