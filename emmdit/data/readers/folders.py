"""Rows of a folder of images with captions beside them: a.jpg with a.txt, a.json or both, or metadata.csv or .jsonl."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emmdit.data.images import MAX_TEXT, InvalidSample
from emmdit.data.readers.protocol import Rows, Source, walk
from emmdit.files import first_line, parse_json, printable, read_bytes, resolved

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
METADATA = ("metadata.csv", "metadata.jsonl")


class FolderRows(Rows):
    """Columns: `image`, `file_name`, `caption` (the text file, or `caption` in the JSON file), `json`.

    Rows are in the order of their names. Without a caption file the row's caption is None; where no image has one,
    there are no such columns. Links are followed to places inside the folder alone, links to folders not at all.

    Args:
        root: searched with all folders below it.
    """

    def __init__(self, root: str | Path, names: list[str] | None = None) -> None:
        self.root = resolved(Path(root).expanduser())
        self.names = _images(self.root) if names is None else names
        if not self.names:
            raise ValueError(f"There are no images in '{root}'.")
        self.column_names = ["image", "file_name"] + ["caption", "json"] * self._captioned()

    @classmethod
    def open(cls, source: Source) -> Rows | None:
        """Of a folder with images and no files of another format."""
        path = source.path
        if not path.is_dir() or source.data_files is not None:
            return None
        if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
            return None
        if any(source.files(suffix) for suffix in (".parquet", ".arrow")):
            return None
        for folder in (path, path / source.split):
            if folder.is_dir() and any((folder / name).is_file() for name in METADATA):
                return MetadataRows(folder)
        if any(file.name in METADATA for file in walk(path, links=False)):
            return MetadataRows(path)
        names = _images(path)
        return cls(path, names) if names else None

    def _captioned(self) -> bool:
        paths = (self.root / name for name in self.names)
        return any(path.with_suffix(kind).is_file() for path in paths for kind in (".txt", ".json"))

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in self.names:
            path = self.root / name
            size = path.stat().st_size if path.is_file() else -1
            digest.update(f"{name} {size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.root / self.names[index]
        row: dict[str, Any] = {"file_name": self.origin(index), "image": inside(self.root, path)}
        if "json" in self.column_names or "caption" in self.column_names:
            text = _text(self.root, path.with_suffix(".json"))
            try:
                row["json"] = None if text is None else parse_json(text)
            except ValueError as error:
                raise InvalidSample(f"{path.stem}.json is not valid JSON: {first_line(error)}") from error
        if "caption" in self.column_names:
            row["caption"] = _text(self.root, path.with_suffix(".txt"))
            if row["caption"] is None and isinstance(row["json"], dict):
                row["caption"] = row["json"].get("caption")
        return {column: row[column] for column in self.column_names}

    def origin(self, index: int) -> str:
        return printable(self.names[index])


class MetadataRows(Rows):
    """Rows that `metadata.csv` or `metadata.jsonl` lists, of the folder or of all folders in it: `image`, `file_name`
    (relative to the list), and the list's other columns, as text in a CSV.

    All rows of all lists, in their order; `datasets`' imagefolder would leave out files by what their names contain.

    Raises:
        ValueError: no `file_name`, or a line that is too long; names file and line.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = resolved(Path(root).expanduser())
        self.rows: list[tuple[Path, dict[str, Any]]] = []
        columns: dict[str, None] = {}
        for file in sorted(file for file in walk(self.root, links=False) if file.name in METADATA):
            inside(self.root, file)
            folder = file.parent.relative_to(self.root)
            for row in _csv_rows(file) if file.suffix == ".csv" else _json_rows(file):
                columns |= dict.fromkeys(row)
                self.rows.append((folder, row))
        if not self.rows:
            raise ValueError(f"The metadata in '{root}' list no images.")
        self.column_names = ["image", *columns]

    @classmethod
    def open(cls, source: Source) -> Rows | None:
        return FolderRows.open(source)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for folder, row in self.rows:
            path = self.root / folder / str(row["file_name"])
            size = path.stat().st_size if path.is_file() else -1
            digest.update(f"{folder} {row} {size}\n".encode(errors="backslashreplace"))
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        folder, row = self.rows[index]
        row = {column: row.get(column) for column in self.column_names}
        if "image" in self.column_names:
            row["image"] = inside(self.root, self.root / folder / str(self.rows[index][1]["file_name"]))
        return row

    def origin(self, index: int) -> str:
        folder, row = self.rows[index]
        return printable(str(folder / str(row["file_name"])))


def inside(root: Path, path: Path) -> Path:
    """The path, once links are followed. InvalidSample where it leaves `root`, itself no link, or there is no file."""
    try:
        found = path.resolve(strict=True)
    except FileNotFoundError:
        if path.is_symlink() or os.path.normpath(path).startswith(os.path.normpath(root) + os.sep):
            raise InvalidSample(f"the file {path.name} does not exist", "missing") from None
        found = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, a name with a zero byte
        raise InvalidSample(first_line(error), "unsafe path") from error
    if not found.is_relative_to(root):
        raise InvalidSample(f"{path.name} leads out of the folder", "unsafe path")
    if not found.is_file():
        raise InvalidSample(f"{path.name} is not a file", "unsafe path")
    return found


def _images(root: Path) -> list[str]:
    return sorted(
        path.relative_to(root).as_posix() for path in walk(root, links=False) if path.suffix.lower() in IMAGES
    )


def _text(root: Path, path: Path) -> str | None:
    if not os.path.lexists(path):
        return None
    try:
        return read_bytes(inside(root, path), MAX_TEXT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidSample(f"{path.name} is not UTF-8: {first_line(error)}") from error
    except InvalidSample:
        raise
    except ValueError as error:
        raise InvalidSample(first_line(error), "too large") from error


def _lines(file: Path) -> Iterator[str]:
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        number = 0
        while line := lines.readline(MAX_TEXT + 1):
            number += 1
            if len(line) > MAX_TEXT:
                raise ValueError(
                    f"{file}, line {number} has more than {MAX_TEXT:,} characters: it is no list of images."
                )
            yield line


def _csv_rows(file: Path) -> Iterator[dict[str, Any]]:
    rows = csv.reader(_lines(file))
    try:
        header = next(rows, [])
        if "file_name" not in header:
            raise ValueError(f"{file} has no column file_name: its first line is {header!r:.200}.")
        for row in rows:
            if row and len(row) != len(header):
                raise ValueError(
                    f"{file}, line {rows.line_num} has {len(row)} values, the header {len(header)}: mend it."
                )
            if row:
                yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{file}, line {rows.line_num} cannot be read: {error}.") from error


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(file), 1):
        try:
            row = parse_json(line) if line.strip() else None
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is not JSON ({first_line(error)}): mend it.") from error
        if row is not None and (not isinstance(row, dict) or "file_name" not in row):
            raise ValueError(f"{file}, line {number} has no file_name: mend it.")
        if row is not None:
            yield row
