"""Rows of a folder of images with a caption file beside each: a.jpg with a.txt, a.json or both."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from emmdit.data.images import InvalidSample, first_line
from emmdit.data.readers.protocol import Rows, Source

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


class FolderRows(Rows):
    """Columns: `image`, `file_name`, `caption` (the text file, or `caption` in the JSON file), `json`.

    Rows are in the order of their names. Without a caption file the row's caption is None.

    Args:
        root: searched with all folders below it.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        self.names = sorted(path.relative_to(self.root).as_posix() for path in _images(self.root))
        if not self.names:
            raise ValueError(f"There are no images in '{root}'.")
        self.column_names = ["image", "file_name", "caption", "json"]

    @classmethod
    def open(cls, source: Source) -> FolderRows | None:
        """Of a folder with at least one image with a caption file, and no metadata file, which `datasets` reads."""
        path = source.path
        if not path.is_dir() or source.data_files is not None or any(path.rglob("metadata.*")):
            return None
        if any(source.files(suffix) for suffix in (".parquet", ".arrow")):
            return None
        captioned = (image.with_suffix(kind) for image in _images(path) for kind in (".txt", ".json"))
        return cls(path) if any(file.is_file() for file in captioned) else None

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in self.names:
            path = self.root / name
            size = path.stat().st_size if path.is_file() else -1
            digest.update(f"{name} {size}\n".encode())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.root / self.names[index]
        if path.is_symlink() and not path.resolve().is_relative_to(self.root.resolve()):
            raise InvalidSample("the link leads out of the folder", "unsafe path")
        row: dict[str, Any] = {"file_name": self.names[index], "image": {"bytes": None, "path": str(path)}}
        if "json" in self.column_names or "caption" in self.column_names:
            text = _text(path.with_suffix(".json"))
            try:
                row["json"] = None if text is None else json.loads(text)
            except ValueError as error:
                raise InvalidSample(f"{path.stem}.json is not valid JSON: {first_line(error)}") from error
        if "caption" in self.column_names:
            row["caption"] = _text(path.with_suffix(".txt"))
            if row["caption"] is None and isinstance(row["json"], dict):
                row["caption"] = row["json"].get("caption")
        return {column: row[column] for column in self.column_names}

    def origin(self, index: int) -> str:
        return self.names[index]


def _images(root: Path) -> Any:
    return (path for path in root.rglob("*") if path.suffix.lower() in IMAGES and not path.name.startswith("."))


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise InvalidSample(f"{path.name} is not UTF-8: {first_line(error)}") from error
