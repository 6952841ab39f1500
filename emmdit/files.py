"""Files: atomic writes, bounded reading, image grids, PNGs that carry their settings."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor


def cache_folder(name: str) -> Path:
    """The folder `name` of `$EMMDIT_CACHE`, by default below `~/.cache/emmdit`; not made here."""
    return Path(os.environ.get("EMMDIT_CACHE", "~/.cache/emmdit"), name).expanduser()


def resolved(path: str | Path) -> Path:
    """The absolute path, links followed; a link that leads to itself stays, where `Path.resolve` raises."""
    return Path(os.path.realpath(path))


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`, with its suffix: synced and renamed over `path` when the block ends.

    A reader sees the old file or the whole new one; an exception inside leaves the old one as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    part.unlink(missing_ok=True)  # a link that waits there would be followed
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must outlive a power failure
    finally:
        os.close(folder)


def check_folder(path: str | Path, option: str = "--out") -> None:
    """Before the work: ValueError where nothing could be written into this folder."""
    folder = Path(path).expanduser()
    while not folder.exists() and folder != folder.parent:
        if folder.is_symlink():
            raise ValueError(f"{option} {path} cannot be made: {folder} is a link to nothing, so name another place.")
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{option} {path} is not a folder: {folder} is a file, so name another place.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path} cannot be written: you may not write in {folder}, so name another place.")


def sha256_of(files: Iterable[Path]) -> str:
    """Of the contents of files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def printable(name: str) -> str:
    """A name that is not valid Unicode as one that files and terminals take."""
    return name.encode(errors="backslashreplace").decode()


def first_line(error: BaseException) -> str:
    """What an error says, to be put into a sentence."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return printable(re.sub(r" <_io\.BytesIO object at 0x\w+>", "", text))  # Pillow's name for bytes


def parse_json(data: bytes | str) -> Any:
    """What JSON holds; all JSON of files is read by it. ValueError (a sentence without its period) for all else."""
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from error


def read_bytes(path: str | Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes. FileNotFoundError, OSError; ValueError names the file."""
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
        raise ValueError(f"{path} is not a file.")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(size, limit) + 1) if size <= limit else b""  # a buffer of that size is made at once
    if max(size, len(data)) > limit:
        raise ValueError(f"{path} has more than {limit:,} bytes, which are not read.")
    return data


def read_json(path: str | Path, way: str = "restore or remove it", limit: int = 1 << 26) -> Any:
    """A JSON file. FileNotFoundError, OSError; ValueError names the file and the `way` out."""
    data = read_bytes(path, limit)
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {way}.") from error


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)."""
    scaled = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.byte().permute(0, 2, 3, 1).cpu().numpy()


def grid(images: Tensor | list[Image.Image], columns: int, scale: int = 1, gap: int = 2) -> Image.Image:
    """Images in reading order, `gap` pixels apart, each enlarged `scale` times (nearest)."""
    if isinstance(images, Tensor):
        arrays = list(to_uint8(images))
    else:
        arrays = [np.asarray(image.convert("RGB")) for image in images]
    height, width = arrays[0].shape[:2]
    height, width = height * scale + gap, width * scale + gap
    rows = -(-len(arrays) // columns)
    canvas = np.full((rows * height + gap, min(columns, len(arrays)) * width + gap, 3), 255, dtype=np.uint8)
    for i, array in enumerate(arrays):
        y, x = divmod(i, columns)
        large = array.repeat(scale, 0).repeat(scale, 1)
        canvas[y * height + gap : (y + 1) * height, x * width + gap : (x + 1) * width] = large
    return Image.fromarray(canvas)


def save_png(image: Image.Image, path: str | Path, settings: dict[str, Any] | None = None) -> Path:
    """Write a PNG whose text chunk `emmdit` is `settings` as JSON."""
    info = PngInfo()
    if settings:
        info.add_text("emmdit", json.dumps(settings, default=str))
    with atomic_path(path) as part:
        image.save(part, pnginfo=info)
    return Path(path)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `save_png` stored with the image; {} if none."""
    with Image.open(path) as image:
        return parse_json(image.text.get("emmdit", "{}"))
