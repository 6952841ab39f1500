"""Rows of MDS shards, the layout of MosaicML's streaming in which Nitro-E and micro_diffusion keep their data.

A folder holds `index.json`, which lists shards with the names and encodings of their columns. A shard is a uint32
count n, n + 1 uint32 offsets of the samples from the beginning of the file, a copy of the index entry, and the
samples; a sample is the uint32 sizes of its columns of variable size, then all columns one after another. Read here
by memory map: no copy, no shared memory, no writer's package.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageMode

from emmdit.data.images import MAX_BYTES, MAX_PIXELS, MAX_TEXT, InvalidSample, opened
from emmdit.data.readers.protocol import Rows, Source
from emmdit.files import atomic_path, first_line, parse_json, printable, read_json, resolved

_INTEGERS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
_SCALARS = {name: np.dtype(name) for name in (*_INTEGERS, "float16", "float32", "float64")}
# The byte that stands for the type of an array: its bits, plus 0, 1 or 2 for unsigned, signed and float.
_ARRAY_DTYPES = {8 * dtype.itemsize + "uif".index(dtype.kind): dtype for dtype in _SCALARS.values()}
# Extension of a packed shard -> what Arrow calls its compression.
_PACKED = {"zstd": "zstd", "gz": "gzip", "bz2": "bz2", "br": "brotli"}
MAX_SHARD = 1 << 32  # bytes: offsets are uint32
MAX_LOST = 1 << 20  # samples that a shard may claim whose file is not there or cut


class MDSDataset(Rows):
    """Map-style: `ds[i]` is a dict of the columns, decoded as the original reader does.

    str, int, numpy scalars and arrays, dicts (json), bytes, and for `jpeg`, `png` and `pil` a PIL image, whose pixels
    are decoded when they are touched. `raw(i)` gives the bytes of each column. Rows of a truncated shard that are
    whole can be read, the others raise an `InvalidSample` that names file and row.

    Args:
        root: folder with `index.json`, or of folders that have one.
        columns: only these; all by default.

    Raises:
        FileNotFoundError, ValueError: no index, or one that cannot be used (a pickled column is refused).
    """

    def __init__(self, root: str | Path, columns: list[str] | None = None) -> None:
        self.root = Path(root).expanduser()
        indices = [self.root / "index.json"]
        if not indices[0].is_file():
            indices = sorted(self.root.rglob("index.json"))
        if not indices:
            raise FileNotFoundError(f"There is no index.json in '{root}': name the folder of an MDS dataset.")
        self.shards = [_Shard(index.parent, entry) for index in indices for entry in _entries(index)]
        self.shards = [shard for shard in self.shards if shard.samples]
        if not self.shards:
            raise ValueError(f"The MDS dataset '{root}' has no samples.")
        self._starts = [0, *accumulate(shard.samples for shard in self.shards)]
        first = self.shards[0]
        for shard in self.shards:
            if shard.encodings != first.encodings:
                raise ValueError(
                    f"{shard.path} has other columns ({shard.encodings}) than {first.path.name} ({first.encodings}): "
                    "read their folders one by one."
                )
        self.column_names = list(first.encodings)
        if columns is not None:
            unknown = [name for name in columns if name not in first.encodings]
            if unknown:
                raise ValueError(f"'{root}' has no column '{unknown[0]}': it has {', '.join(first.encodings)}.")
            self.column_names = list(columns)

    @classmethod
    def open(cls, source: Source) -> MDSDataset | None:
        """Of a folder with an index, or with folders that have one and no files of another format."""
        path = source.path
        if not path.is_dir() or source.data_files is not None:
            return None
        for folder in (path / source.split, path):
            if (folder / "index.json").is_file():
                return cls(folder)
        others = any(source.files(suffix) for suffix in (".parquet", ".tar", ".arrow"))
        return cls(path) if not others and any(path.glob("*/index.json")) else None

    @property
    def fingerprint(self) -> str:
        parts = [(shard.path.relative_to(self.root).as_posix(), shard.samples, shard.size) for shard in self.shards]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, sample = self._find(index)
        row = {}
        for name, data in shard.read(sample, self.column_names).items():
            try:
                row[name] = shard.decoders[name](data)
            except Exception as error:
                why = error.reason if isinstance(error, InvalidSample) else "corrupt"
                why = "decompression bomb" if isinstance(error, Image.DecompressionBombError) else why
                where = f"{shard.path.name}, sample {sample}, column '{name}'"
                raise InvalidSample(f"{where}: {first_line(error)}", why) from error
        return row

    def raw(self, index: int) -> dict[str, bytes]:
        """The bytes of each column as they stand in the shard."""
        shard, sample = self._find(index)
        return shard.read(sample, self.column_names)

    def origin(self, index: int) -> str:
        shard, sample = self._find(index)
        return printable(f"{shard.path.relative_to(self.root)}, sample {sample}")

    def _find(self, index: int) -> tuple[_Shard, int]:
        index = int(index)
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} is outside this dataset of {len(self)} rows.")
        number = bisect_right(self._starts, index) - 1
        return self.shards[number], index - self._starts[number]


class _Shard:
    """One file. It is mapped when first read, in each process anew."""

    def __init__(self, folder: Path, entry: dict[str, Any]) -> None:
        try:
            if entry["format"] != "mds":
                raise ValueError(f"its format is '{entry['format']}', and only mds is read here")
            self.samples, self.size = _count(entry["samples"]), _count(entry["raw_data"]["bytes"])
            names, encodings = entry["column_names"], entry["column_encodings"]
            sizes = [None if size is None else _count(size) for size in entry["column_sizes"]]
            if not all(isinstance(name, str) for name in names):
                raise ValueError("its column_names are not all texts")
            self.sizes = dict(zip(names, sizes, strict=True))
            self.encodings = dict(zip(names, encodings, strict=True))
            self.path = folder / _inside(entry["raw_data"]["basename"])
            self.packed = folder / _inside(entry["zip_data"]["basename"]) if entry.get("zip_data") else None
            self.decoders = {name: _decoder(name, encoding) for name, encoding in self.encodings.items()}
            if 4 * (self.samples + 2) > self.size or self.size > MAX_SHARD:
                raise ValueError(f"{self.samples:,} samples do not fit a shard of {self.size:,} bytes")
            found = self.path.stat().st_size if self.path.is_file() else self.size if self.packed else 0
            if self.samples > MAX_LOST and found < 4 * (self.samples + 2):
                raise ValueError(f"{self.path.name} of {found:,} bytes cannot hold its {self.samples:,} samples")
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
            raise ValueError(f"{folder / 'index.json'} cannot be used: {what}.") from error
        self._data: np.ndarray | None = None
        self._offsets: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_data": None, "_offsets": None}

    def open(self) -> None:
        if self._data is not None:
            return
        if not self.path.is_file():
            if self.packed is None or not self.packed.is_file():
                raise InvalidSample(f"the shard {self.packed or self.path} is missing", "missing")
            _unpack(self.packed, self.path, self.size)
        if self.path.stat().st_size < 4 * (self.samples + 2):
            raise InvalidSample(f"the shard {self.path} is truncated: not even its table of samples is whole")
        data = np.asarray(np.memmap(self.path, mode="r"))  # a slice of a memmap costs more than its bytes
        count = int(data[:4].view("<u4")[0])
        if count != self.samples:
            raise InvalidSample(f"the shard {self.path} has {count} samples, index.json says {self.samples}")
        self._offsets = np.array(data[4 : 4 * (count + 2)].view("<u4"), np.int64)
        self._data = data

    def read(self, sample: int, columns: list[str]) -> dict[str, bytes]:
        self.open()
        begin, end = self._offsets[sample : sample + 2]
        if end - begin > MAX_BYTES:
            raise InvalidSample(f"the sample {sample} of {self.path} has {end - begin:,} bytes", "too large")
        if end > len(self._data) or begin > end:
            raise InvalidSample(
                f"the shard {self.path} is truncated at {len(self._data):,} bytes, before its sample {sample}"
            )
        data = self._data[begin:end].tobytes()
        variable = sum(size is None for size in self.sizes.values())
        if len(data) < 4 * variable:
            raise InvalidSample(f"the shard {self.path} is damaged in its sample {sample}")
        lengths = iter(np.frombuffer(data, "<u4", variable).tolist())
        position, found = 4 * variable, {}
        for name, size in self.sizes.items():
            size = next(lengths) if size is None else size
            found[name] = data[position : position + size]
            position += size
        if position != len(data):
            raise InvalidSample(f"the shard {self.path} is damaged in its sample {sample}")
        return {name: found[name] for name in columns}


def _entries(index: Path) -> list[dict[str, Any]]:
    try:
        entries = read_json(index)["shards"]
        if not isinstance(entries, list):
            raise TypeError("its shards are no list")
        return entries
    except (KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of MDS shards: {first_line(error)}.") from error


def _count(found: Any) -> int:
    if type(found) is not int or found < 0:
        raise ValueError(f"{found!r:.40} is not a number of samples or bytes")
    return found


def _inside(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError(f"its shard '{name}' lies outside the folder")
    return path


def _unpack(packed: Path, path: Path, size: int) -> None:
    """Beside the packed file, once, so that samples can be read in any order; never more than `size` bytes."""
    import pyarrow as pa

    kind = _PACKED.get(packed.suffix.lstrip("."))
    if kind is None or not pa.Codec.is_available(kind):
        raise ValueError(f"{packed} is packed in a way that cannot be read here: unpack it to {path.name}.")
    if path.is_symlink() or resolved(path.parent) != resolved(packed.parent):  # a link could lead anywhere
        raise InvalidSample(f"the shard {path} would be unpacked elsewhere than beside {packed}", "unsafe path")
    try:
        with (
            atomic_path(path) as part,
            pa.OSFile(str(packed)) as file,
            pa.CompressedInputStream(file, kind) as source,
            open(part, "wb") as target,
        ):
            written = 0
            while block := source.read(1 << 20):
                written += len(block)
                if written > size:
                    raise InvalidSample(
                        f"{packed} holds more than the {size:,} bytes that index.json says", "too large"
                    )
                target.write(block)
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, PermissionError) or "No space" in str(error) or "Read-only" in str(error):
            raise ValueError(f"{packed} cannot be unpacked beside itself ({first_line(error)}).") from error
        raise InvalidSample(f"the packed shard {packed} is damaged: {first_line(error)}") from error


def _decoder(name: str, encoding: str) -> Callable[[bytes], Any]:
    kind, _, detail = encoding.partition(":")
    if kind == "pkl":
        raise ValueError(
            f"its column '{name}' is pickled (pkl), and unpickling runs code from the file: write it as bytes or json"
        )
    if kind == "ndarray":
        return partial(_array, *detail.split(":")) if detail else _array
    if kind in _SCALARS:
        return lambda data: np.frombuffer(data, _SCALARS[kind].newbyteorder("<"))[0]
    if kind not in _DECODERS:
        raise ValueError(f"the encoding '{encoding}' of its column '{name}' is not known")
    return _DECODERS[kind]


def _array(*given: bytes | str) -> np.ndarray:
    """`ndarray`, `ndarray:float16` or `ndarray:float16:128,2048`: what is not said here stands before the values."""
    *said, data = given
    dtype = _SCALARS[said[0]] if said else None
    shape = tuple(int(n) for n in said[1].split(",")) if len(said) > 1 else None
    if dtype is None:
        dtype, data = _ARRAY_DTYPES[data[0]], data[1:]
    if shape is None:  # the upper six bits: number of axes; the lower two: bytes of a length, as a power of 2
        width, axes = 1 << (data[0] & 3), data[0] >> 2
        shape = tuple(np.frombuffer(data, f"<u{width}", axes, offset=1).tolist())
        data = data[1 + width * axes :]
    return np.frombuffer(data, dtype.newbyteorder("<")).reshape(shape)


def _text(data: bytes) -> str:
    if len(data) > MAX_TEXT:
        raise InvalidSample(f"a text of {len(data):,} bytes", "too large")
    return data.decode()


def _json(data: bytes) -> Any:
    return parse_json(_text(data))


def _pil(data: bytes) -> Image.Image:
    width, height, length = np.frombuffer(data[:12], "<u4").tolist()
    mode = data[12 : 12 + length].decode()
    if width * height > MAX_PIXELS:
        raise InvalidSample(f"{width} x {height} pixels", "decompression bomb")
    line = -(-width // 8) if mode == "1" else width * len(ImageMode.getmode(mode).bands) * _bytes(mode)
    if len(data) != 12 + length + line * height:  # before memory is taken for what it claims
        raise InvalidSample(f"{len(data):,} bytes are not {width} x {height} pixels of mode {mode:.8}")
    return Image.frombytes(mode, (width, height), data[12 + length :])


def _bytes(mode: str) -> int:
    return np.dtype(ImageMode.getmode(mode).typestr).itemsize


_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "str": _text,
    "int": lambda data: int(np.frombuffer(data, "<i8")[0]),
    "str_int": int,
    "str_float": float,
    "str_decimal": lambda data: Decimal(data.decode()),
    "json": _json,
    "jpeg": opened,
    "png": opened,
    "pil": _pil,
}
