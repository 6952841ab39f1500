"""Rows of webdataset tars, read at any place by an index of where each member lies.

`datasets` would copy all tars into its cache and stop at the first one that is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tarfile
from bisect import bisect_right
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from filelock import FileLock

from emmdit.data.images import MAX_BYTES, MAX_TEXT, InvalidSample
from emmdit.data.readers.protocol import Rows, Source
from emmdit.files import atomic_path, cache_folder, first_line, parse_json, printable, resolved

IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("txt", "caption", "text", "cls")
ARRAYS = ("rows", "headers", "members")  # of an index


class TarRows(Rows):
    """Samples of webdataset tars: members that stand together and share their name up to its first dot.

    A row's columns are the extensions (`jpg`, `txt`, `json`, ...) and `__key__`; `image` is whichever image it has,
    and `caption` its `txt`. JSON is parsed, so `json.prompt` can be a column. The headers are read once (some 20,000
    members a second) and kept in `$EMMDIT_CACHE/tars`.

    A sample that cannot be used (a truncated tar's last one, a member that would leave its folder, a link) is a row
    like any other and raises `InvalidSample` when it is read, so that it is counted and named.
    """

    def __init__(self, files: list[str | Path]) -> None:
        self.files = [Path(file) for file in files]
        self._tars = _indices(self.files)
        starts = np.cumsum([0, *(len(tar["rows"]) for tar in self._tars)])
        self._starts: list[int] = starts.tolist()
        if not self._starts[-1]:
            raise ValueError(f"There are no samples in {self.files[0]}{' and the others' * (len(files) > 1)}.")
        found = {extension for tar in self._tars for extension in tar["extensions"]}
        names = ["__key__", *sorted(found)]
        names += ["image"] * (bool(found & set(IMAGES)) and "image" not in found)
        names += ["caption"] * ("txt" in found and "caption" not in found)
        self.column_names = names
        self._handles: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": {}}

    @classmethod
    def open(cls, source: Source) -> TarRows | None:
        files = source.files(".tar")
        return cls(files) if files and not source.files(".parquet") else None

    @property
    def fingerprint(self) -> str:
        parts = [(tar["name"], tar["size"], len(tar["rows"])) for tar in self._tars]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, row = self._find(index)
        tar = self._tars[number]
        if (fault := tar["faults"].get(row)) is not None:
            raise InvalidSample(*fault)
        first = tar["rows"][row]
        last = tar["rows"][row + 1] if row + 1 < len(tar["rows"]) else len(tar["members"])
        members = {
            tar["extensions"][kind]: (offset, size) for kind, offset, size in tar["members"][first:last].tolist()
        }
        return {name: self._column(number, row, name, members) for name in self.column_names}

    def _column(self, number: int, row: int, name: str, members: dict[str, tuple[int, int]]) -> Any:
        if name == "__key__":
            return self._key(number, row)
        if name == "image" and name not in members:
            name = next((kind for kind in IMAGES if kind in members), name)
        elif name == "caption" and name not in members:
            name = "txt"
        if name not in members:
            return None
        offset, size = members[name]
        text = name in _TEXTS or name == "json" or name.endswith(".json")
        if size > (MAX_TEXT if text else MAX_BYTES):
            raise InvalidSample(f"its .{name} has {size:,} bytes", "too large")
        data = os.pread(self._handle(number), size, offset)
        if len(data) < size:
            raise InvalidSample(f"the tar ends within its .{name}")
        if name in IMAGES:
            return {"bytes": data, "path": None}
        try:
            if name in _TEXTS:
                return data.decode("utf-8")
            return parse_json(data) if text else data
        except ValueError as error:
            raise InvalidSample(f"its .{name} cannot be read: {first_line(error)}") from error

    def origin(self, index: int) -> str:
        number, row = self._find(index)
        return f"{self.files[number].name}, sample {self._key(number, row)!r}"

    def _key(self, number: int, row: int) -> str:
        """Read off the header again: 25M names would fill the memory of every process."""
        offset = self._tars[number]["headers"][row]
        try:
            with open(self.files[number], "rb") as file:
                file.seek(offset)
                with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:
                    name = tar.firstmember.name
        except Exception:  # see _scan
            return f"at byte {offset}"
        return _key(name)

    def _handle(self, number: int) -> int:
        if number not in self._handles:
            if len(self._handles) >= 64:  # far below the usual limit of open files
                self._handles.pop(next(iter(self._handles))).close()
            self._handles[number] = open(self.files[number], "rb")  # noqa: SIM115
        return self._handles[number].fileno()

    def _find(self, index: int) -> tuple[int, int]:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} is outside this dataset of {len(self)} rows.")
        number = bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]


class _Headers:
    """A tar's file as `tarfile` reads headers from it: a name or note that claims to be large is not read."""

    name = ""

    def __init__(self, file: Any) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_TEXT:
            raise tarfile.ReadError(f"a header claims {size:,} bytes")
        return self.file.read(size)


def _key(name: str) -> str:
    name = printable(name)
    path = PurePosixPath(name)
    if not path.name:
        return name
    return str(path.with_name(path.name.partition(".")[0] or path.name))


def _indices(files: list[Path]) -> list[dict[str, Any]]:
    """Of each tar, in an order of each process's own, so that ranks that start together share the work."""
    found = {file: _index(file) for file in random.SystemRandom().sample(files, len(files))}
    return [found[file] for file in files]


def _index(file: Path) -> dict[str, Any]:
    """Rows, members, extensions and faults of one tar; from the cache where it has not changed."""
    try:
        stat = file.stat()
        open(file, "rb").close()
    except OSError as error:
        raise FileNotFoundError(f"The tar '{file}' cannot be read: {error.strerror}.") from error
    identity = f"1 {resolved(file)} {stat.st_size} {stat.st_mtime_ns}"
    folder = cache_folder("tars")
    kept = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npz"
    with ExitStack() as held:
        if not kept.is_file():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(kept.with_suffix(".lock")))
            except (OSError, NotImplementedError):
                pass  # a full or read-only home, or one without locks, is no reason to stop: everyone scans alone
        found = _kept(kept) if kept.is_file() else None
        if found is None:
            found = _scan(file, stat.st_size)
            about = json.dumps({"extensions": found["extensions"], "faults": found["faults"]})
            try:
                with atomic_path(kept) as part:
                    np.savez(part, about=about, **{name: found[name] for name in ARRAYS})
            except OSError:
                pass
    return found | {"name": file.name, "size": stat.st_size}


def _kept(file: Path) -> dict[str, Any] | None:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in ARRAYS} | parse_json(str(arrays["about"]))
        found["faults"] = {int(row): tuple(fault) for row, fault in found["faults"].items()}
    except Exception:  # damaged: it is made again
        return None
    return found


def _scan(file: Path, size: int) -> dict[str, Any]:
    rows: list[int] = []  # number of each row's first member
    headers: list[int] = []
    members: list[tuple[int, int, int]] = []  # extension, offset, size
    extensions: dict[str, int] = {}
    faults: dict[int, tuple[str, str]] = {}
    key = None
    position = 0
    try:
        with open(file, "rb") as stream, tarfile.open(fileobj=_Headers(stream), mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # it keeps them all
                if member.size < 0 or tar.offset <= member.offset:  # it would be read again and again
                    raise tarfile.ReadError("a member of negative size")
                position = member.offset_data + member.size
                if member.isdir():
                    continue
                path = PurePosixPath(member.name)
                unsafe = path.is_absolute() or ".." in path.parts or "\\" in member.name or not path.name
                if unsafe or _key(member.name) != key:
                    key = None if unsafe else _key(member.name)
                    rows.append(len(members))
                    headers.append(member.offset)
                row = len(rows) - 1
                if unsafe:
                    faults[row] = (f"its member {member.name!r:.100} leaves the folder", "unsafe path")
                elif not member.isreg() or member.issparse():
                    faults[row] = (f"its member {member.name!r:.100} is a link, device or sparse file", "unsafe path")
                elif member.offset_data + member.size > size:
                    faults[row] = (f"the tar is truncated within {member.name!r:.100}", "corrupt")
                else:
                    extension = path.name.partition(".")[2].lower()
                    members.append((extensions.setdefault(extension, len(extensions)), member.offset_data, member.size))
            tar.fileobj.seek(tar.offset)
            if any(tar.fileobj.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError("bad header")
    except Exception as error:  # a hostile header raises almost anything: ValueError, RecursionError, KeyError, ...
        if not rows and not isinstance(error, tarfile.TarError):
            raise ValueError(f"'{file}' cannot be read as a tar: {first_line(error)}.") from error
        last = len(rows) - 1
        if position <= size or last not in faults:  # not only the last member is cut: what follows is lost, say so
            rows.append(len(members))
            headers.append(min(position, size))
            faults[last + 1] = (
                f"the tar is damaged after byte {position:,}, and what follows is lost ({first_line(error)})",
                "corrupt",
            )
    return {
        "rows": np.array(rows, np.int64),
        "headers": np.array(headers, np.int64),
        "members": np.array(members, np.int64).reshape(-1, 3),
        "extensions": list(extensions),
        "faults": faults,
    }
