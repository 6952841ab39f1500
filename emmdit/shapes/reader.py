"""Reads a picture of the shapes world back into objects: the detector that needs no weights.

Every pixel is explained as a mix of the ground and one palette colour; what is more than half covered by one
colour and connected is an object. Its outline is compared, as soft masks, with each shape drawn at the same
centre and area.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from emmdit.shapes.render import GROUND, PALETTE, SHAPES, UNIT_AREA, UNIT_CENTROID, coverage
from emmdit.shapes.world import Scene

MIN_AREA = 12.0  # px at picture size 32; the smallest true object covers 27
# IoU difference to the next best shape that makes the first one e times likelier.
IOU_TEMPERATURE = 0.01
# Best IoU from which on a blob counts as a shape at all (true renders: above 0.90; blurred by 0.7 px: above
# 0.75), and where it surely does not.
IOU_SURE, IOU_HOPELESS = 0.70, 0.45


@dataclass(frozen=True, eq=False)
class Found:
    """One object read. `box` is (x1, y1, x2, y2) in pixels, x2 and y2 exclusive; `score` in [0, 1]."""

    shape: str
    color: str
    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray = field(repr=False)  # (H, W) bool
    iou: float  # with the best template


def read_scene(image: np.ndarray) -> list[Found]:
    """Objects in a uint8 (H, W, 3) picture, best score first.

    The score is how clearly the best shape beats the others, times how well it fits. Raises ValueError for
    other arrays.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"read_scene wants a uint8 array (H, W, 3), got {image.dtype} {image.shape}.")
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
        # The half-covered rim belongs to the object as far as its colour explains it.
        rim = ndimage.binary_dilation(core, structure=np.ones((3, 3), dtype=bool)) & ~taken
        strength = np.clip(np.quantile(alphas[number][core], 0.75), 0.5, 1.0)
        soft = np.where(core | rim, np.clip(alphas[number] / strength, 0.0, 1.0), 0.0)
        shape, iou, score = _match(soft)
        ys, xs = np.nonzero(core)
        box = (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
        found.append(Found(shape, color, box, score, core, iou))
    return sorted(found, key=lambda f: -f.score)


def main_color(image: np.ndarray) -> str | None:
    """The palette colour that covers most of a uint8 (H, W, 3) picture, None if none covers a pixel by half."""
    alphas, nearest = _explain(image)
    covered = [int(((nearest == number) & (alphas[number] > 0.5)).sum()) for number in range(len(PALETTE))]
    return list(PALETTE)[int(np.argmax(covered))] if max(covered) else None


def _explain(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coverage of each pixel by each palette colour (K, H, W) and the colour that explains it best (H, W)."""
    ground = np.array(GROUND, dtype=float)
    pixels = image.astype(float) - ground
    directions = np.array(list(PALETTE.values()), dtype=float) - ground  # (K, 3)
    alphas = np.moveaxis(pixels @ directions.T / (directions**2).sum(axis=1), -1, 0)
    alphas = np.clip(alphas, 0.0, 1.0)
    residual = ((pixels[None] - alphas[..., None] * directions[:, None, None, :]) ** 2).sum(axis=-1)
    return alphas, residual.argmin(axis=0)


def _match(soft: np.ndarray) -> tuple[str, float, float]:
    """Best shape for a soft mask (H, W), its IoU, and a score in [0, 1]."""
    area = soft.sum()
    ys, xs = np.arange(soft.shape[0]) + 0.5, np.arange(soft.shape[1]) + 0.5
    x, y = (soft.sum(axis=0) @ xs) / area, (soft.sum(axis=1) @ ys) / area
    ious = {}
    for shape in SHAPES:
        size = float(np.sqrt(area / UNIT_AREA[shape]))
        ox, oy = UNIT_CENTROID[shape]
        drawn = coverage(shape, x - ox * size, y - oy * size, size, xs, ys)
        ious[shape] = float(np.minimum(soft, drawn).sum() / np.maximum(soft, drawn).sum())
    best = max(ious, key=ious.get)
    certainty = 1.0 / sum(np.exp((iou - ious[best]) / IOU_TEMPERATURE) for iou in ious.values())
    fit = np.clip((ious[best] - IOU_HOPELESS) / (IOU_SURE - IOU_HOPELESS), 0.0, 1.0)
    return best, ious[best], float(certainty * fit)


def contents_match(scene: Scene, found: list[Found], threshold: float = 0.3) -> bool:
    """Whether the objects read (score above `threshold`) are just the scene's, within 1.5 px of theirs."""
    left = [f for f in found if f.score > threshold]
    if len(left) != len(scene.objects):
        return False
    for o in scene.objects:
        tolerance = 1.5 * scene.image_size / 32
        hit = next(
            (
                f
                for f in left
                if (f.shape, f.color) == (o.shape, o.color)
                and abs((f.box[0] + f.box[2]) / 2 - o.cx) <= tolerance
                and abs((f.box[1] + f.box[3]) / 2 - o.cy) <= tolerance
            ),
            None,
        )
        if hit is None:
            return False
        left.remove(hit)
    return True
