"""Encoded images to pixels, and the error of a sample that cannot be used."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB of RGB; a small file can claim any size


class InvalidSample(ValueError):
    """One row that cannot be used, while its neighbors can.

    Args:
        reason: corrupt, missing, unsafe path, too small, decompression bomb, empty caption, non-finite latents or blank
            image.
    """

    def __init__(self, message: str, reason: str = "corrupt") -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # it comes from loader processes
        return type(self), (str(self), self.reason)


def first_line(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return re.sub(r" <_io\.BytesIO object at 0x\w+>", "", text)  # Pillow's name for bytes


def _opened(value: Any) -> Image.Image:
    """Bytes, a path, both as `datasets` stores them, or a PIL image; only its header is read."""
    if isinstance(value, dict):
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if value is None:
        raise InvalidSample("there is no image", "missing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged by max_pixels instead
        if isinstance(value, Image.Image):
            return value
        return Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)


def open_image(value: Any, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An encoded image as upright RGB, transparent parts shown on white.

    Args:
        value: bytes, a path, both as `datasets` stores them ({"bytes": ..., "path": ...}), or a PIL image.
        max_pixels: an image that says it has more is refused before it is decoded.

    Raises:
        InvalidSample: reason "missing", "corrupt" or "decompression bomb".
    """
    try:
        with _opened(value) as image:
            if image.width * image.height > max_pixels:
                raise InvalidSample(
                    f"{image.width} x {image.height} pixels are more than max_pixels {max_pixels:,}",
                    "decompression bomb",
                )
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:  # what lies under transparent pixels is arbitrary
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except InvalidSample:
        raise
    except FileNotFoundError as error:
        raise InvalidSample(f"the file {error.filename} does not exist", "missing") from error
    except Image.DecompressionBombError as error:
        raise InvalidSample(first_line(error), "decompression bomb") from error
    except Exception as error:  # Pillow's decoders raise almost anything: SyntaxError, struct.error, EOFError, ...
        raise InvalidSample(first_line(error), "corrupt") from error


def image_size(value: Any) -> tuple[int, int]:
    """(height, width) of an encoded image (see `open_image`) once it is upright, from its header alone."""
    image = _opened(value)
    turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 lie on their side
    size = (image.width, image.height) if turned else (image.height, image.width)
    if image is not value:
        image.close()
    return size


def fit(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Resized (bicubic, antialiased) to cover the size, then center-cropped: uint8 (height, width, 3)."""
    scale = max(width / image.width, height / image.height)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(covering, Image.Resampling.BICUBIC)  # PIL widens the filter when it shrinks
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return np.array(image.crop((left, top, left + width, top + height)))


def to_tensor(pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 (..., H, W, 3) -> (..., 3, H, W) float32 in [-1, 1]."""
    return torch.as_tensor(pixels).movedim(-1, -3).float().div_(127.5).sub_(1.0).contiguous()


def load_image(value: Any, size: int | tuple[int, int], max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """An encoded image (see `open_image`) -> (3, height, width) float32 in [-1, 1]; one number is a square's side."""
    height, width = (size, size) if isinstance(size, int) else size
    return to_tensor(fit(open_image(value, max_pixels), height, width))
