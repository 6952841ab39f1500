"""Rule-based reader of images of the shapes world: finds the objects without any weights.

Every pixel is explained as a mix of the ground and one palette color; a connected region that one color covers by more
than half is an object. Its soft mask is compared with a render of each shape at the same center and area.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from emmdit.evaluation.geneval.judge import Detection
from emmdit.shapes.render import UNIT_AREA, UNIT_CENTROID, coverage
from emmdit.shapes.scene import GROUND, PALETTE, SHAPES

MIN_AREA = 12.0  # px at image size 32; the smallest true object covers 27
# IoU difference to another shape that makes the better one e times more likely.
IOU_TEMPERATURE = 0.01
# Best IoU from which on a region certainly is a shape (true renders: above 0.90; blurred by 0.7 px: above 0.75), and up
# to which it certainly is not.
IOU_SURE, IOU_NONE = 0.70, 0.45


@dataclass(frozen=True)
class ColoredDetection(Detection):
    """A detection with the color that was read with it."""

    color: str = ""


def read_scene(image: np.ndarray) -> list[ColoredDetection]:
    """Objects in a uint8 (H, W, 3) image, best score first; boxes in pixels, x2 and y2 exclusive; masks (H, W) bool.

    The score is the certainty of the best shape against the others times its fit. Raises ValueError for other arrays.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"read_scene needs a uint8 array (H, W, 3), got {image.dtype} {image.shape}.")
    alphas, nearest = _explain(image)
    min_area = MIN_AREA * (min(image.shape[:2]) / 32) ** 2
    cores, colors = [], []
    for number, color in enumerate(PALETTE):
        labels, count = ndimage.label((nearest == number) & (alphas[number] > 0.5))
        for label in range(1, count + 1):
            core = labels == label
            if core.sum() >= min_area:
                cores.append(core)
                colors.append((number, color))
    taken = np.zeros(image.shape[:2], dtype=bool)
    for core in cores:
        taken |= core
    found = []
    for core, (number, color) in zip(cores, colors, strict=True):
        # The half-covered rim belongs to the object as far as its color explains it.
        rim = ndimage.binary_dilation(core, structure=np.ones((3, 3), dtype=bool)) & ~taken
        strength = np.clip(np.quantile(alphas[number][core], 0.75), 0.5, 1.0)
        soft = np.where(core | rim, np.clip(alphas[number] / strength, 0.0, 1.0), 0.0)
        shape, score = _match(soft)
        ys, xs = np.nonzero(core)
        box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        found.append(ColoredDetection(shape, score, box, core, color))
    return sorted(found, key=lambda f: -f.score)


def main_color(image: np.ndarray) -> str | None:
    """The palette color that covers most of a uint8 (H, W, 3) image, None if none covers a pixel by half."""
    alphas, nearest = _explain(image)
    covered = [int(((nearest == number) & (alphas[number] > 0.5)).sum()) for number in range(len(PALETTE))]
    return list(PALETTE)[int(np.argmax(covered))] if max(covered) else None


def _explain(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coverage of each pixel by each palette color (K, H, W) and the color that explains it best (H, W)."""
    ground = np.array(GROUND, dtype=float)
    pixels = image.astype(float) - ground
    directions = np.array(list(PALETTE.values()), dtype=float) - ground  # (K, 3)
    alphas = np.moveaxis(pixels @ directions.T / (directions**2).sum(axis=1), -1, 0)
    alphas = np.clip(alphas, 0.0, 1.0)
    residual = ((pixels[None] - alphas[..., None] * directions[:, None, None, :]) ** 2).sum(axis=-1)
    return alphas, residual.argmin(axis=0)


def _match(soft: np.ndarray) -> tuple[str, float]:
    """Best shape for a soft mask (H, W), and a score in [0, 1]."""
    area = soft.sum()
    ys, xs = np.arange(soft.shape[0]) + 0.5, np.arange(soft.shape[1]) + 0.5
    x, y = (soft.sum(axis=0) @ xs) / area, (soft.sum(axis=1) @ ys) / area
    ious = {}
    for shape in SHAPES:
        size = float(np.sqrt(area / UNIT_AREA[shape]))
        ox, oy = UNIT_CENTROID[shape]
        render = coverage(shape, x - ox * size, y - oy * size, size, xs, ys)
        ious[shape] = float(np.minimum(soft, render).sum() / np.maximum(soft, render).sum())
    best = max(ious, key=ious.get)
    certainty = 1.0 / sum(np.exp((iou - ious[best]) / IOU_TEMPERATURE) for iou in ious.values())
    fit = np.clip((ious[best] - IOU_NONE) / (IOU_SURE - IOU_NONE), 0.0, 1.0)
    return best, float(certainty * fit)
