"""Pixels of every kind as 8-bit RGB, or refused with a reason."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from emmdit.data.images import InvalidSample, open_image


def encoded(image: Image.Image, kind: str = "PNG", **how) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width: int, bits: int, color: int, row: bytes, more: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, color, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + more + data + chunk(b"IEND", b"")


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    return image


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


RAMP = np.array([[0, 257, 0x8000, 0xFFFF]], np.uint16)
GRAY = [[0] * 3, [1] * 3, [128] * 3, [255] * 3]
RED, BLUE = Image.new("RGB", (2, 1), "red"), Image.new("RGB", (2, 1), "blue")
MORE = {"save_all": True, "append_images": [BLUE]}
COLORS = {
    "16-bit gray": (encoded(Image.fromarray(RAMP)), GRAY),
    "16-bit gray TIFF": (encoded(Image.fromarray(RAMP), "TIFF"), GRAY),
    "I;16B": (encoded(Image.frombytes("I;16B", (4, 1), RAMP.astype(">u2").tobytes()), "TIFF"), GRAY),
    "16-bit gray, turned": (encoded(Image.fromarray(RAMP), exif=exif(3)), GRAY[::-1]),
    "16-bit gray, 0x8000 transparent": (
        raw_png(2, 16, 0, struct.pack(">2H", 0, 0x8000), chunk(b"tRNS", b"\x80\0")),
        [[0] * 3, [255] * 3],
    ),
    "16-bit RGB": (raw_png(1, 16, 2, struct.pack(">3H", 0, 0x8000, 0xFFFF)), [[0, 128, 255]]),
    "16-bit RGBA": (
        raw_png(2, 16, 6, struct.pack(">8H", 0, 257, 0xFFFF, 0xFFFF, 0, 0, 0, 0)),
        [[0, 1, 255], [255] * 3],
    ),
    "16-bit gray and alpha": (raw_png(1, 16, 4, struct.pack(">2H", 0x8000, 0xFFFF)), [[128] * 3]),
    "16-bit PGM, largest 1000": (b"P5\n2 1\n1000\n" + struct.pack(">2H", 500, 1000), [[128] * 3, [255] * 3]),
    "2-bit gray": (raw_png(4, 2, 0, b"\x1b"), [[0] * 3, [85] * 3, [170] * 3, [255] * 3]),
    "1 bit": (encoded(Image.fromarray(np.array([[True, False]]))), [[255] * 3, [0] * 3]),
    "gray and alpha": (
        encoded(Image.merge("LA", (Image.new("L", (1, 1), 0), Image.new("L", (1, 1), 128)))),
        [[127] * 3],
    ),
    "palette": (encoded(palette()), [[255, 0, 0], [0, 255, 0]]),
    "palette, color 0 transparent": (encoded(palette(), transparency=0), [[255] * 3, [0, 255, 0]]),
    "palette with alphas": (encoded(palette(), transparency=bytes([128, 255])), [[255, 127, 127], [0, 255, 0]]),
    "CMYK TIFF": (encoded(Image.new("CMYK", (1, 1), (0, 255, 0, 0)), "TIFF"), [[255, 0, 255]]),
    "CMYK JPEG": (encoded(Image.new("CMYK", (1, 1), (255, 0, 0, 0)), "JPEG", quality=100), [[0, 255, 255]]),
    "GIF, first frame": (encoded(RED, "GIF", **MORE), [[255, 0, 0]] * 2),
    "WebP, first frame": (encoded(RED, "WEBP", lossless=True, **MORE), [[255, 0, 0]] * 2),
    "APNG, first frame": (encoded(RED, **MORE), [[255, 0, 0]] * 2),
}


@pytest.mark.parametrize("name", COLORS)
def test_every_kind_of_pixels_becomes_the_right_rgb(name: str) -> None:
    data, expected = COLORS[name]
    assert np.asarray(open_image(data)).reshape(-1, 3).tolist() == expected


HUGE = zlib.compress(bytes(1 << 26))
REFUSED = {
    "float TIFF": (encoded(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), "TIFF"), "unsupported pixels"),
    "32-bit TIFF": (encoded(Image.fromarray(np.array([[0, 70_000]], np.int32)), "TIFF"), "unsupported pixels"),
    "0 is white": (encoded(Image.fromarray(RAMP), "TIFF", tiffinfo={262: 0}), "unsupported pixels"),
    "LAB": (encoded(Image.new("LAB", (1, 1)), "TIFF"), "unsupported pixels"),
    "16-bit RGB with a transparent color": (
        raw_png(1, 16, 2, bytes(6), chunk(b"tRNS", bytes(6))),
        "unsupported pixels",
    ),
    "zTXt bomb": (raw_png(1, 8, 2, bytes(3), chunk(b"zTXt", b"k\0\0" + HUGE)), "corrupt"),
    "iCCP bomb": (raw_png(1, 8, 2, bytes(3), chunk(b"iCCP", b"k\0\0" + HUGE)), "corrupt"),
    "EPS, which Ghostscript would run": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "corrupt",
    ),
    "a path from the data": ("/etc/hostname", "unsafe path"),
    "a path as datasets stores it": ({"bytes": None, "path": "/etc/hostname"}, "unsafe path"),
    "a number": (3, "corrupt"),
    "nothing": ({}, "missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_images_that_are_refused(name: str) -> None:
    data, why = REFUSED[name]
    with pytest.raises(InvalidSample) as caught:
        open_image(data)
    assert caught.value.reason == why and "\n" not in str(caught.value)
