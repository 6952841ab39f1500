"""Encoded images to pixels, and the error of a sample that cannot be used."""

from __future__ import annotations

import io
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from emmdit.files import first_line

MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB of RGB; a small file can claim any size
MAX_SIDE = 65_535  # what a JPEG can have; Pillow keeps a pointer for each row, whatever its length
MAX_BYTES = 1 << 28  # of one encoded image or array in a row
MAX_TEXT = 1 << 20  # bytes of one caption or JSON value
# Pillow's others are not images of datasets, and its EPS reader starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000")


class InvalidSample(ValueError):
    """One row that cannot be used, while its neighbors can.

    Args:
        reason: corrupt, missing, unsafe path, unsupported pixels, too small, too long, too large, decompression bomb,
            empty caption, non-finite latents or blank image.
    """

    def __init__(self, message: str, reason: str = "corrupt") -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # it comes from loader processes
        return type(self), (str(self), self.reason)


class _File(io.BufferedReader):
    """A file that is asked for no more than it has; Pillow asks for what a header declares, and that is allocated."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        return super().read(size if size is None else min(size, self.size))

    def __repr__(self) -> str:
        return repr(os.fspath(self.name))

    def __del__(self) -> None:
        self.close()  # with the image; Pillow closes only what it has opened itself


def opened(value: Any) -> Image.Image:
    """What `open_image` takes, as a PIL image of which only the header was read. InvalidSample and Pillow's errors."""
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise InvalidSample("there is no image", "missing")
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, str):
        raise InvalidSample(f"the path {value!r:.80} stands in the data, and could be any file here", "unsafe path")
    if isinstance(value, Path):
        if not stat.S_ISREG(value.stat().st_mode):
            raise InvalidSample(f"{value.name} is not a file", "unsafe path")  # opening a pipe would wait for ever
        value = _File(value)
    elif isinstance(value, bytes):
        value = io.BytesIO(value)
    else:
        raise InvalidSample(f"an encoded image was expected, not {type(value).__name__}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged by max_pixels instead
        return Image.open(value, formats=FORMATS)


def open_image(value: Any, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An encoded image as upright RGB, transparent parts shown on white; of an animation the first frame.

    16 bits become 8 by their upper half. Floats and 32-bit integers are refused: no file says which of them is white.

    Args:
        value: bytes, a `pathlib.Path`, or a PIL image, alone or as `datasets` stores them ({"bytes": ..., "path":
            ...}). Only a reader that looked where a path leads makes it a `Path`; a text may come from anyone.
        max_pixels: an image that says it has more is refused before it is decoded.

    Raises:
        InvalidSample: reason "missing", "corrupt", "unsafe path", "unsupported pixels" or "decompression bomb".
    """
    try:
        with opened(value) as image:
            if image.width * image.height > max_pixels or max(image.size) > MAX_SIDE:
                size, sides = f"{image.width} x {image.height}", f"{MAX_SIDE:,} on a side"
                raise InvalidSample(
                    f"{size} pixels are more than max_pixels {max_pixels:,}, or than {sides}", "decompression bomb"
                )
            image = ImageOps.exif_transpose(eight_bits(image))
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


def eight_bits(image: Image.Image) -> Image.Image:
    """16-bit gray as 8-bit gray (`convert` would clip it at 255): the upper byte, as Pillow does for 16-bit RGB.

    InvalidSample for pixels whose black and white are not known, or that Pillow would read wrongly.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF: 258 bits per sample, 262 whether 0 is white
    raw = str(image.tile[0][3]) if getattr(image, "tile", None) else ""
    unknown = {
        "32-bit integers": image.mode == "I" and image.format not in ("PNG", "PPM"),
        "floats": image.mode == "F",
        "the mode LAB": image.mode == "LAB",
        "16 bits of which not all are used": image.mode.startswith("I;16") and tags.get(258, (16,)) != (16,),
        "16 bits with 0 as white": image.mode.startswith("I;16") and tags.get(262, 1) == 0,
        "16 bits with a transparent color": "16" in raw and image.mode == "RGB" and "transparency" in image.info,
    }
    for what, found in unknown.items():
        if found:
            raise InvalidSample(f"its pixels are {what}: convert it to 8 bits", "unsupported pixels")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    gray = Image.fromarray((values >> 8).astype(np.uint8))
    if "transparency" not in image.info:
        return _with_exif(gray, image)
    opaque = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
    return _with_exif(Image.merge("LA", (gray, Image.fromarray(opaque))), image)


def _with_exif(image: Image.Image, original: Image.Image) -> Image.Image:
    image.getexif().update(original.getexif())
    return image


def image_size(value: Any) -> tuple[int, int]:
    """(height, width) of an encoded image (see `open_image`) once it is upright, from its header alone."""
    image = opened(value)
    turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 lie on their side
    size = (image.width, image.height) if turned else (image.height, image.width)
    if image is not value:
        image.close()
    return size


def fit(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Resized (bicubic, antialiased) to cover the size, then center-cropped: uint8 (height, width, 3).

    InvalidSample ("too long") where one side would become huge.
    """
    scale = max(width / image.width, height / image.height)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if covering[0] * covering[1] > MAX_PIXELS:
        raise InvalidSample(f"{image.width} x {image.height} pixels are {covering} when it covers the crop", "too long")
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
