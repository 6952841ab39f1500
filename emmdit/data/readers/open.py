"""Opening of a dataset by its name: the list of readers, and access to columns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

from emmdit.data.images import InvalidSample
from emmdit.data.readers.folders import FolderRows
from emmdit.data.readers.huggingface import HuggingFaceRows
from emmdit.data.readers.lines import TextLines
from emmdit.data.readers.mds import MDSDataset
from emmdit.data.readers.protocol import Rows, Source
from emmdit.data.readers.tars import TarRows

READERS: list[type[Rows]] = [
    MDSDataset,  # folder with index.json
    TarRows,  # *.tar
    TextLines,  # a .txt file
    FolderRows,  # folder of images with a.txt or a.json beside a.jpg, or with metadata.csv or .jsonl
    HuggingFaceRows,  # hub, parquet, Arrow; reports what no reader reads, so it stays last
]


def open_source(
    source: str, split: str = "train", data_files: str | list[str] | None = None, revision: str | None = None
) -> Rows:
    """The rows behind a source, by the first reader that matches.

    Args:
        source, split, data_files, revision: see `emmdit.data.readers.protocol.Source`.

    Raises:
        FileNotFoundError, OSError, ValueError: one sentence that says what to do.
    """
    named = Source(source, split, data_files, revision)
    return next(rows for reader in READERS if (rows := reader.open(named)) is not None)


def select_columns(
    rows: Rows, columns: dict[str, str | Sequence[str]], source: str, setting: str = "{}_column"
) -> Rows:
    """Only the columns that are read.

    Args:
        columns: what they hold (image, caption, latents, ...) to their name or names.
        setting: that names the column of a kind, for the message.

    Raises:
        ValueError: one does not exist.
    """
    used = set()
    for kind, names in columns.items():
        for column in [names] if isinstance(names, str) else names:
            name = column if column in rows.column_names else column.partition(".")[0]
            if name not in rows.column_names:
                raise ValueError(
                    f"'{source}' has no {kind} column '{column}': set {setting.format(kind)} to one of "
                    f"{', '.join(rows.column_names)}."
                )
            used.add(name)
    return rows.select_columns(sorted(used))


def value(row: dict[str, Any], column: str) -> Any:
    """`caption`, or `json.prompt` for a value inside another column; None where something is missing."""
    path = [column] if column in row else column.split(".")
    try:
        return reduce(lambda found, key: None if found is None else found.get(key), path, row)
    except AttributeError:
        raise InvalidSample(f"there is no '{column}' inside", "missing") from None
