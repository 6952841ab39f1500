"""Rows of Hugging Face `datasets`: the hub, parquet, Arrow on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from emmdit.data.readers.protocol import Rows, Source
from emmdit.files import first_line, read_json, resolved

# What one row group of parquet may take in memory, since it is read at once; a hostile one can claim any size.
MAX_GROUP_BYTES, MAX_GROUP_ROWS = 1 << 33, 1 << 26
PLAIN_GROUP_BYTES, MAX_RATIO = (
    1 << 30,
    100,
)  # beyond so many bytes it may not be packed more tightly than images and texts


class HuggingFaceRows(Rows):
    """A `datasets.Dataset` whose images stay encoded, and whose other values are not decoded either: some features
    would open what file or address a row names.

    | what is given | read |
    | --- | --- |
    | hub id `owner/name` | downloaded and kept as an Arrow copy |
    | folder of `save_to_disk` or `emmdit precompute`; `*.arrow` | in place |
    | parquet file, glob, or folder with such files | kept as an Arrow copy |

    Args:
        table: a `datasets.Dataset`.
        files: folders in which an image may be a file that the row names; by default none.
    """

    def __init__(self, table: Any, files: Sequence[Path] = ()) -> None:
        for name, feature in table.features.items():
            if type(feature).__name__ == "Image" and feature.decode:  # decoded by us, where the row number is known
                table = table.cast_column(name, type(feature)(decode=False))
        self.table, self.files = table.with_format("arrow"), files
        self.column_names = table.column_names

    @classmethod
    def open(cls, source: Source) -> HuggingFaceRows:
        return cls(*_open(source))

    @property
    def fingerprint(self) -> str:
        count = len(self.table)
        digest = hashlib.sha256(f"{count} {sorted(self.table.features.items(), key=str)}".encode())
        for number in sorted({round(i * (count - 1) / 15) for i in range(16)}) if count else ():
            try:
                digest.update(repr(self._read(number)[0]).encode(errors="surrogatepass"))
            except ValueError:
                digest.update(b"damaged")  # it is named when its turn comes to be read
        return digest.hexdigest()[:16]

    def select_columns(self, names: Sequence[str]) -> HuggingFaceRows:
        return HuggingFaceRows(self.table.select_columns(list(names)), self.files)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        rows = self._read([int(index) for index in indices])
        for row in rows if self.files else ():
            for name, found in row.items():
                if type(found) is dict and found.keys() == {"bytes", "path"} and found["bytes"] is None:
                    row[name] = self._file(found["path"])
        return rows

    def _read(self, places: int | list[int]) -> list[dict[str, Any]]:
        return checked(self.table[places]).to_pylist()

    def _file(self, name: str | None) -> Path | str | None:
        path = resolved(name or "")
        return path if any(path.is_relative_to(resolved(folder)) for folder in self.files) else name


def checked(rows: Any) -> Any:
    """A `pyarrow.Table` of few rows, its offsets and texts compared with the memory that is there: a damaged Arrow file
    would end the process. ValueError."""
    rows.validate(full=True)
    return rows


def open_arrow(files: Sequence[str]) -> Any:
    """Arrow stream files as one `datasets.Dataset`, mapped. ValueError where the columns are longer than the file, or
    compressed."""
    import datasets

    for file in files:
        _check_arrow(file)
    table = datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
    table.data.validate()
    return table


def _open(source: Source) -> tuple[Any, Sequence[Path]]:
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
        from huggingface_hub.constants import HF_HUB_CACHE

        caches = [Path(HF_HUB_CACHE), Path(datasets.config.DOWNLOADED_DATASETS_PATH)]
        return _load(source, path=name, data_files=source.data_files, revision=source.revision), caches

    if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return _guarded(name, path.rglob("*.arrow"), lambda: _saved(source)), ()
    if files := source.files(".parquet"):
        for file in files:
            _check_parquet(file)
        return _load(source, path="parquet", data_files=files), ()
    if files := source.files(".arrow"):
        return _guarded(name, files, lambda: open_arrow(files)), ()
    if path.is_dir() and source.data_files is None:
        raise FileNotFoundError(f"'{name}' holds neither images nor parquet, Arrow, tar or MDS files.")
    raise FileNotFoundError(f"No file matches '{name}': give a file, a glob, a folder or a hub id.")


def _saved(source: Source) -> Any:
    """A folder of `save_to_disk`, whose state.json names files beside it and nothing else."""
    import datasets

    for state in source.path.rglob("state.json"):
        for entry in read_json(state)["_data_files"]:
            if os.path.basename(entry["filename"]) != entry["filename"]:
                raise ValueError(f"{state} names the file '{entry['filename']}', which is not beside it")
    for file in source.path.rglob("*.arrow"):
        _check_arrow(str(file))
    rows = datasets.load_from_disk(str(source.path))
    if isinstance(rows, datasets.DatasetDict) and source.split not in rows:
        raise ValueError(f"it has no split '{source.split}', choose one of {', '.join(rows)}")
    rows = rows[source.split] if isinstance(rows, datasets.DatasetDict) else rows
    rows.data.validate()
    return rows


def _check_arrow(file: str) -> None:
    """Refuse compressed record batches: they are not mapped but unpacked whole, to any size, for every row."""
    import pyarrow as pa

    def field(data: bytes, table: int, number: int) -> int:
        """Place of a field of a flatbuffers table; 0 where it has none."""
        fields = table - int.from_bytes(data[table : table + 4], "little", signed=True)
        if 4 + 2 * number >= int.from_bytes(data[fields : fields + 2], "little"):
            return 0
        offset = int.from_bytes(data[fields + 4 + 2 * number :][:2], "little")
        return table + offset if offset else 0

    def follow(data: bytes, place: int) -> int:
        return place + int.from_bytes(data[place : place + 4], "little")

    with pa.memory_map(file) as source:
        for message in pa.ipc.MessageReader.open_stream(source):
            data = message.metadata.to_pybytes()
            batch = follow(data, field(data, follow(data, 0), 2))  # Message.header, a RecordBatch
            if message.type == "dictionary":
                batch = follow(data, field(data, batch, 1))  # DictionaryBatch.data
            if message.type != "schema" and field(data, batch, 3):
                raise ValueError(f"{file} is compressed: write it anew without")


def _check_parquet(file: str) -> None:
    """What the file says of itself, before it is read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        about = pq.read_metadata(file)
        size = os.path.getsize(file)
        for number in range(about.num_row_groups):
            group = about.row_group(number)
            packed = sum(group.column(place).total_compressed_size for place in range(group.num_columns))
            declared = max(
                group.total_byte_size, *(group.column(c).total_uncompressed_size for c in range(group.num_columns))
            )
            if packed > size or min(packed, declared, group.num_rows) < 0:
                raise ValueError(f"{file} is damaged: its row group {number} claims more bytes than the file has.")
            if (
                declared > max(PLAIN_GROUP_BYTES, MAX_RATIO * packed)
                or declared > MAX_GROUP_BYTES
                or group.num_rows > MAX_GROUP_ROWS
            ):
                raise ValueError(
                    f"{file} has a row group of {group.num_rows:,} rows and {declared:,} bytes ({packed:,} packed), "
                    f"which is read at once: write it anew in groups of at most {PLAIN_GROUP_BYTES:,} bytes."
                )
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise ValueError(f"{file} is truncated or damaged ({first_line(error)}).") from error


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
    except (
        Exception
    ) as error:  # a hostile file raises almost anything in them: AttributeError, TypeError, KeyError, ...
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
            _check_arrow(file)
    except (OSError, pa.ArrowException) as error:
        return f"{file} is truncated or damaged ({first_line(error)})"
    except ValueError as error:
        return first_line(error)
    return None
