"""Rows of Hugging Face `datasets`: the hub, parquet, Arrow on disk, folders of images with a metadata file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from emmdit.data.images import first_line
from emmdit.data.readers.protocol import Rows, Source


class HuggingFaceRows(Rows):
    """A `datasets.Dataset` whose images stay encoded.

    | what is given | read |
    | --- | --- |
    | hub id `owner/name` | downloaded and kept as an Arrow copy |
    | folder of `save_to_disk` or `emmdit precompute`; `*.arrow` | in place |
    | parquet file, glob, or folder with such files | kept as an Arrow copy |
    | folder with `metadata.csv` or `metadata.jsonl` | `datasets`' imagefolder, in place |

    Attributes:
        table: the `datasets.Dataset`.
    """

    def __init__(self, table: Any) -> None:
        for name, feature in table.features.items():
            if type(feature).__name__ == "Image" and feature.decode:  # decoded by us, where the row number is known
                table = table.cast_column(name, type(feature)(decode=False))
        self.table = table
        self.column_names = table.column_names

    @classmethod
    def open(cls, source: Source) -> HuggingFaceRows:
        return cls(_open(source))

    @property
    def fingerprint(self) -> str:
        count = len(self.table)
        digest = hashlib.sha256(f"{count} {sorted(self.table.features.items(), key=str)}".encode())
        for number in sorted({round(i * (count - 1) / 15) for i in range(16)}) if count else ():
            digest.update(repr(self.table[number]).encode())
        return digest.hexdigest()[:16]

    def select_columns(self, names: Sequence[str]) -> HuggingFaceRows:
        return HuggingFaceRows(self.table.select_columns(list(names)))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.table[index]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return self.table.__getitems__(indices)


def _open(source: Source) -> Any:
    import datasets

    name, path = source.name, source.path
    local = name.endswith((".parquet", ".arrow", ".tar"))
    if path.is_file() and not local:
        raise ValueError(
            f"'{name}' is not a parquet, Arrow, tar or text file: unpack it if it is packed, or convert it."
        )
    if not path.is_dir() and not local:
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
            raise FileNotFoundError(f"The data '{name}' do not exist: give a folder, files or a hub id.")
        return _load(source, path=name, data_files=source.data_files, revision=source.revision)

    if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
        rows = _guarded(name, path.rglob("*.arrow"), lambda: datasets.load_from_disk(str(path)))
        if isinstance(rows, datasets.DatasetDict) and source.split not in rows:
            raise ValueError(f"'{name}' has no split '{source.split}': choose one of {', '.join(rows)}.")
        return rows[source.split] if isinstance(rows, datasets.DatasetDict) else rows
    if files := source.files(".parquet"):
        return _load(source, path="parquet", data_files=files)
    if files := source.files(".arrow"):
        parts = _guarded(name, files, lambda: [datasets.Dataset.from_file(file) for file in files])
        return datasets.concatenate_datasets(parts)
    if not path.is_dir() or source.data_files is not None:
        raise FileNotFoundError(f"No file matches '{name}': give a file, a glob, a folder or a hub id.")
    return _load(source, path="imagefolder", data_dir=str(path))


def _load(source: Source, **how: Any) -> Any:
    import datasets

    name, files = source.name, how.get("data_files") if how["path"] == "parquet" else ()
    try:
        return _guarded(name, files, lambda: datasets.load_dataset(split=source.split, **how))
    except ConnectionError as error:
        raise OSError(
            f"The dataset '{name}' is not in the local cache and the hub cannot be reached: check the "
            "network and HF_HUB_OFFLINE, or give a local folder or parquet files."
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"'{name}' is not a dataset of the Hugging Face hub that you may read: check the spelling, or "
            f"accept its terms at https://huggingface.co/datasets/{name} and run `hf auth login`."
        ) from error


def _guarded(name: str, files: Iterable[Any], load: Callable[[], Any]) -> Any:
    """`load()`, its errors in one sentence that names the first broken file; the libraries do not."""
    import datasets

    try:
        return load()
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError):
        raise
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        broken = next(filter(None, map(_fault, sorted(map(str, files)))), first_line(error))
        raise ValueError(f"'{name}' cannot be opened as a dataset: {broken}.") from error


def _fault(file: str) -> str | None:
    """Why a parquet or Arrow file cannot be read, None where it can."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.endswith(".parquet"):
            pq.read_metadata(file)
        else:
            with pa.memory_map(file) as source:
                pa.ipc.open_stream(source).read_all()
    except (OSError, pa.ArrowException) as error:
        return f"{file} is truncated or damaged ({first_line(error)})"
    return None
