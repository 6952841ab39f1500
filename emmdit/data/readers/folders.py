"""A folder of pictures with a caption file beside each: a.jpg with a.txt, a.json or both."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from emmdit.data.images import BadRow, first_line

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


class FolderRows(Dataset):
    """Columns: `image`, `file_name`, `caption` (the text file, or `caption` in the JSON file), `json`.

    Rows are in the order of their names. A caption file that is missing makes the row's caption None.

    Args:
        root: searched with all folders below it.
    """

    def __init__(self, root: str | Path, columns: list[str] | None = None) -> None:
        self.root = Path(root).expanduser()
        inside = self.root.resolve()
        self.names = sorted(
            path.relative_to(self.root).as_posix()
            for path in self.root.rglob("*")
            if path.suffix.lower() in PICTURES and not path.name.startswith(".")
        )
        if not self.names:
            raise ValueError(f"There are no pictures in '{root}'.")
        self._outside = {
            name for name in self.names if (self.root / name).is_symlink() and not _within(self.root / name, inside)
        }
        self.column_names = ["image", "file_name", "caption", "json"] if columns is None else list(columns)

    @property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in self.names:
            path = self.root / name
            size = path.stat().st_size if path.is_file() else -1
            digest.update(f"{name} {size}\n".encode())
        return digest.hexdigest()[:16]

    @staticmethod
    def captioned(root: Path) -> bool:
        """Whether there is at least one picture with a caption file."""
        pictures = (path for path in root.rglob("*") if path.suffix.lower() in PICTURES)
        return any(path.with_suffix(kind).is_file() for path in pictures for kind in (".txt", ".json"))

    def select_columns(self, names: list[str]) -> FolderRows:
        """The same rows with these columns alone."""
        copy = object.__new__(FolderRows)
        copy.__dict__.update(self.__dict__, column_names=list(names))
        return copy

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.names[index]
        path = self.root / name
        if name in self._outside:
            raise BadRow("the link leads out of the folder", "unsafe path")
        row: dict[str, Any] = {"file_name": name}
        if "image" in self.column_names:
            row["image"] = {"bytes": None, "path": str(path)}
        if "json" in self.column_names or "caption" in self.column_names:
            row["json"] = self._json(path.with_suffix(".json"))
        if "caption" in self.column_names:
            text = _text(path.with_suffix(".txt"))
            if text is None and isinstance(row["json"], dict):
                text = row["json"].get("caption")
            row["caption"] = text
        return {column: row[column] for column in self.column_names}

    def _json(self, path: Path) -> Any:
        text = _text(path)
        try:
            return None if text is None else json.loads(text)
        except ValueError as error:
            raise BadRow(f"{path.name} is no JSON: {first_line(error)}") from error

    def origin(self, index: int) -> str:
        """Where row `index` comes from, for messages."""
        return self.names[index]


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise BadRow(f"{path.name} is not UTF-8: {first_line(error)}") from error


def _within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder)
