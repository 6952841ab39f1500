"""Anti-aliased renderer of scenes.

It uses only + - * / sqrt min max, which round the same way on every machine, so that the bytes are the same, too.
"""

from __future__ import annotations

import numpy as np

from emmdit.shapes.scene import GROUND, PALETTE, SHAPES, Scene

# Width in pixels of the box filter that turns outlines into pixels. 1 would be plain area coverage; with the softer
# 1.6 the 4x4 block DCT with 32 of 48 coefficients keeps 42 dB instead of 37.7.
FILTER_WIDTH = 1.6
CROSS_ARM = 0.34  # arm width over size
STAR_INNER = 0.45  # inner over outer radius
# Area and centroid (x, y; y down, from the box center) of each shape with a box of side 1, measured on coverage masks
# of size 400 (checked by `tests/test_shapes_world.py`).
UNIT_AREA = {"circle": 0.785398, "square": 1.0, "star": 0.384347, "cross": 0.5644}
UNIT_CENTROID = {"circle": (0.0, 0.0), "square": (0.0, 0.0), "star": (0.0, 0.0527864), "cross": (0.0, 0.0)}

# cos and sin of multiples of 18 degrees as literals: the last bit of the math library may differ between machines.
_COS36, _SIN36 = 0.8090169943749475, 0.5877852522924731
_SIN72 = 0.9510565162951535


def coverage(shape: str, cx: float, cy: float, size: float, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Share of each (filtered) pixel that the shape covers, (len(ys), len(xs)) float64 in [0, 1].

    `xs, ys` are the coordinates of the pixels' centers.
    """
    dx, dy = xs - cx, ys - cy
    half = size / 2
    if shape == "square":
        return np.outer(_overlap(dy, half), _overlap(dx, half))
    if shape == "cross":
        arm = half * CROSS_ARM
        x_long, x_short, y_long, y_short = (
            _overlap(dx, half), _overlap(dx, arm), _overlap(dy, half), _overlap(dy, arm)
        )  # fmt: skip
        return np.outer(y_long, x_short) + np.outer(y_short, x_long - x_short)
    if shape == "circle":
        distance = np.sqrt((dy * dy)[:, None] + (dx * dx)[None, :]) - half
    elif shape == "star":
        distance = _star_distance(dx, dy, half)
    else:
        raise ValueError(f"{shape!r} is not a shape of this world; the shapes are {', '.join(SHAPES)}.")
    return np.minimum(np.maximum(0.5 - distance / FILTER_WIDTH, 0.0), 1.0)


def _overlap(d: np.ndarray, half: float) -> np.ndarray:
    """Share of the filter's interval around each d that lies in [-half, half]."""
    reach = FILTER_WIDTH / 2
    return np.maximum(np.minimum(d + reach, half) - np.maximum(d - reach, -half), 0.0) / FILTER_WIDTH


def _star_distance(dx: np.ndarray, dy: np.ndarray, half: float) -> np.ndarray:
    """Signed distance (pixels) to a five-point star, tip up, stretched upwards by 5% to fill its box."""
    radius = half / _SIN72  # the box is as wide as the two upper arms
    height = radius * (1 + _COS36)  # from the top tip to the two feet
    # Star coordinates: origin at its center, which lies below the center of the box; y up.
    y = (radius - height / 2 - dy * (height / (2 * half)))[:, None]
    x = np.abs(dx)[None, :]
    # Two reflections take every point into the wedge of the top arm.
    for nx in (_COS36, -_COS36):
        t = 2 * np.maximum(nx * x - _SIN36 * y, 0.0)
        x, y = x - t * nx, y + t * _SIN36
    # One edge remains: from the tip (0, radius) to the notch beside it.
    px, py = np.abs(x), y - radius
    ex, ey = radius * STAR_INNER * _SIN36, radius * (STAR_INNER * _COS36 - 1)
    along = np.minimum(np.maximum((px * ex + py * ey) / (ex * ex + ey * ey), 0.0), 1.0)
    qx, qy = px - ex * along, py - ey * along
    distance = np.sqrt(qx * qx + qy * qy)
    return np.where(ex * py - ey * px > 0, distance, -distance)


def render_scene(scene: Scene) -> np.ndarray:
    """The image of a scene, uint8 (H, W, 3)."""
    n = scene.image_size
    image = np.empty((n, n, 3))
    image[:] = GROUND
    for o in scene.objects:
        x1, y1, x2, y2 = o.box
        left, top, right, bottom = (
            max(int(x1) - 1, 0), max(int(y1) - 1, 0), min(int(x2) + 2, n), min(int(y2) + 2, n)
        )  # fmt: skip
        xs, ys = np.arange(left, right) + 0.5, np.arange(top, bottom) + 0.5
        alpha = coverage(o.shape, o.cx, o.cy, o.size, xs, ys)[:, :, None]
        patch = image[top:bottom, left:right]
        patch += alpha * (np.array(PALETTE[o.color], dtype=float) - patch)
    return np.floor(image + 0.5).astype(np.uint8)
