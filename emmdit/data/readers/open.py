"""What a source is, found out from its name: one table of rows for each kind, read at any row.

| kind | what is given | read by |
| --- | --- | --- |
| hub | `owner/name` | Hugging Face `datasets`, which downloads and keeps an Arrow copy |
| Arrow on disk | folder of `save_to_disk` or `emmdit precompute`; `*.arrow` | `datasets`, in place |
| parquet | file, glob, or folder with such files | `datasets`, which keeps an Arrow copy |
| webdataset | `*.tar`, or a folder with such files | `emmdit.data.readers.tars`, in place |
| MDS | folder with `index.json` | `emmdit.data.readers.mds`, in place |
| pictures | folder with captions in a.txt or a.json beside a.jpg | `emmdit.data.readers.folders`, in place |
| pictures | folder with `metadata.csv` or `metadata.jsonl` | `datasets`' imagefolder, in place |

Local tars are not given to `datasets` because it would copy all of them into its cache, and stop at the first one that
is damaged.
"""

from __future__ import annotations

import hashlib
from functools import reduce
from glob import glob
from pathlib import Path
from typing import Any

from emmdit.data.images import BadRow, first_line
from emmdit.data.readers.folders import FolderRows
from emmdit.data.readers.mds import MDSDataset
from emmdit.data.readers.tars import TarRows


def open_source(
    source: str, split: str = "train", data_files: str | list[str] | None = None, revision: str | None = None
) -> Any:
    """The rows behind a source: `len(rows)`, `rows[i] -> dict`, `rows.column_names`, `rows.select_columns(names)`.

    Args:
        source: see the table above.
        split: of a hub data set or a saved `DatasetDict`; of MDS a folder of that name, if there is one.
        data_files: a glob or list of globs inside a hub data set or a folder.
        revision: branch, tag or commit of a hub data set.

    Raises:
        FileNotFoundError, OSError, ValueError: one sentence that says what to do.
    """
    path = Path(source).expanduser()
    if path.is_file() and not source.endswith((".parquet", ".arrow", ".tar")):
        raise ValueError(
            f"'{source}' is no parquet, Arrow or tar file: unpack it if it is packed, give its folder, or convert it."
        )
    if not path.is_dir() and not source.endswith((".parquet", ".arrow", ".tar")):
        local = path.is_absolute() or path.exists() or source.startswith((".", "~")) or source.count("/") != 1
        if local:
            raise FileNotFoundError(f"The data '{source}' do not exist: give a folder, files or a hub id.")
        return _load(source, split, path=source, data_files=data_files, revision=revision)

    if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _from_disk(source, path, split)
    if path.is_dir():
        for folder in (path / split, path):
            if (folder / "index.json").is_file() and data_files is None:
                return MDSDataset(folder)
    files = _files(path, data_files)
    for suffix in (".parquet", ".tar", ".arrow"):
        chosen = [file for file in files if file.endswith(suffix)]
        if chosen and suffix == ".tar":
            return TarRows(chosen)
        if chosen and suffix == ".arrow":
            return _arrow(source, chosen)
        if chosen:
            return _load(source, split, path="parquet", data_files=chosen)
    if not path.is_dir() or data_files is not None:
        raise FileNotFoundError(f"No file matches '{source}': give a file, a glob, a folder or a hub id.")
    if any(path.glob("*/index.json")):
        return MDSDataset(path)
    if not any(path.rglob("metadata.*")) and FolderRows.captioned(path):
        return FolderRows(path)
    return _load(source, split, path="imagefolder", data_dir=str(path))


def _files(path: Path, data_files: str | list[str] | None) -> list[str]:
    if not path.is_dir():
        return sorted(glob(str(path), recursive=True))
    patterns = [data_files] if isinstance(data_files, str) else data_files
    if patterns is None:
        patterns = [f"**/*{suffix}" for suffix in (".parquet", ".tar", ".arrow")]
    return sorted({file for pattern in patterns for file in glob(str(path / pattern), recursive=True)})


def _load(source: str, split: str, **table: Any) -> Any:
    import datasets

    try:
        return datasets.load_dataset(split=split, **table)
    except ConnectionError as error:
        raise OSError(
            f"The data set '{source}' is not in the local cache and the hub can not be reached: check the "
            "network and HF_HUB_OFFLINE, or give a local folder or parquet files."
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"'{source}' is no data set of the Hugging Face hub that you may read: check the spelling, or "
            f"accept its terms at https://huggingface.co/datasets/{source} and run `hf auth login`."
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        broken = _broken(table.get("data_files")) if table["path"] == "parquet" else None
        raise ValueError(f"'{source}' can not be opened as a data set: {broken or first_line(error)}.") from error


def _from_disk(source: str, path: Path, split: str) -> Any:
    import datasets

    try:
        rows = datasets.load_from_disk(str(path))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        broken = _broken(sorted(map(str, path.rglob("*.arrow"))))
        raise ValueError(f"'{source}' can not be opened as a data set: {broken or first_line(error)}.") from error
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise ValueError(f"'{source}' has no split '{split}': choose one of {', '.join(rows)}.")
        rows = rows[split]
    return rows


def _arrow(source: str, files: list[str]) -> Any:
    import datasets

    try:
        return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
    except (OSError, ValueError, RuntimeError) as error:
        broken = _broken(files)
        raise ValueError(f"'{source}' can not be opened as a data set: {broken or first_line(error)}.") from error


def _broken(files: list[str] | None) -> str | None:
    """The first file that is truncated or no such file at all, with the cause; the libraries do not name it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files or ():
        try:
            if file.endswith(".parquet"):
                pq.read_metadata(file)
            else:
                with pa.memory_map(file) as source:
                    pa.ipc.open_stream(source).read_all()
        except (OSError, pa.ArrowException) as error:
            return f"{file} is truncated or damaged ({first_line(error)})"
    return None


def select_columns(rows: Any, columns: dict[str, str], source: str) -> Any:
    """Only the columns that are read, images left encoded. ValueError if one is not there."""
    used = set()
    for kind, column in columns.items():
        name = column if column in rows.column_names else column.partition(".")[0]
        if name not in rows.column_names:
            raise ValueError(
                f"'{source}' has no {kind} column '{column}': set {kind}_column to one of "
                f"{', '.join(rows.column_names)}."
            )
        used.add(name)
    rows = rows.select_columns(sorted(used))
    for name, feature in getattr(rows, "features", {}).items():
        if type(feature).__name__ == "Image":  # decoded by us, where the row number is known
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows


def value(row: dict[str, Any], column: str) -> Any:
    """`caption`, or `json.prompt` for what stands inside another column; None where something is missing."""
    path = [column] if column in row else column.split(".")
    try:
        return reduce(lambda found, key: None if found is None else found.get(key), path, row)
    except AttributeError:
        raise BadRow(f"there is no '{column}' inside", "missing") from None


def origin(rows: Any, number: int) -> str:
    """The file and sample behind a row, as far as its table knows them."""
    return rows.origin(number) if hasattr(rows, "origin") else ""


def fingerprint(rows: Any) -> str:
    """16 hex digits that change with the rows, and not with the machine or the place of a cache."""
    if hasattr(rows, "origin"):  # ours: names and sizes of all files
        return rows._fingerprint
    digest = hashlib.sha256(f"{len(rows)} {sorted(rows.features.items(), key=str)}".encode())
    for number in sorted({round(i * (len(rows) - 1) / 15) for i in range(16)}) if len(rows) else ():
        digest.update(repr(rows[number]).encode())
    return digest.hexdigest()[:16]
