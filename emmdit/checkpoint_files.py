"""Files of a checkpoint on disk: the checksum written with them, whether they are whole, and which is the newest.

A single file is torch's zip archive with the SHA-256 of all before it as the archive's comment, so that no second file
can be lost or outdated; torch reads it like any other. A sharded folder has `manifest.json`, sizes and SHA-256 of all
its files. What has neither (older versions, other programs) is checked by the CRC-32 of each tensor or by the sizes.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from emmdit.archive import Damaged, check_archive
from emmdit.files import read_json, sha256_of

MANIFEST = "manifest.json"
END = b"PK\x05\x06"  # of a zip's last record: 22 bytes, the last 2 of them the length of the comment that follows
MARK = b"sha256:"
COMMENT = len(MARK) + 64
BLOCK = 1 << 20
_verified: dict[tuple[Any, ...], str] = {}  # SHA-256 of files and folders that were found whole by this process


# -- writing -------------------------------------------------------------------------------------------


def stamp(file: BinaryIO) -> None:
    """Append the checksum to a checkpoint that torch has just written; `file` is open for reading and writing."""
    file.seek(-22, os.SEEK_END)
    if file.read(4) != END:
        raise OSError("it was not written to its end")
    file.seek(-2, os.SEEK_END)
    file.write(COMMENT.to_bytes(2, "little"))
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.write(MARK + digest.encode())


def entry(path: Path) -> dict[str, Any]:
    """What a manifest says of one file."""
    return {"size": path.stat().st_size, "sha256": sha256_of([path])}


# -- reading -------------------------------------------------------------------------------------------


def verify(path: Path) -> str:
    """SHA-256 of a whole checkpoint: of the file, or of the names and hashes of a folder's files.

    Raises:
        FileNotFoundError: there is nothing.
        Damaged: with one sentence.
    """
    if path.is_dir():
        return verify_folder(path)
    with path.open("rb") as file:
        return verify_file(file, path)


def verify_file(file: BinaryIO, path: Path) -> str:
    """As `verify`, of a file that is open; what it is read for afterwards is what was verified."""
    status = os.fstat(file.fileno())
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if key not in _verified:
        _verified[key] = _hash_file(file, path, status.st_size)
    file.seek(0)
    return _verified[key]


def _hash_file(file: BinaryIO, path: Path, size: int) -> str:
    if size == 0:
        raise Damaged(path, "it is empty")
    comment = _comment(file, path, size)
    digest, left = hashlib.sha256(), size - len(comment)
    file.seek(0)
    while left and (block := file.read(min(BLOCK, left))):
        digest.update(block)
        left -= len(block)
    if comment and comment != MARK + digest.hexdigest().encode():
        raise Damaged(path, "its bytes do not match the checksum that was written with them")
    try:
        check_archive(file, size, crcs=not comment)
    except ValueError as error:
        raise Damaged(path, str(error)) from error
    digest.update(comment)
    return digest.hexdigest()


def _comment(file: BinaryIO, path: Path, size: int) -> bytes:
    """The comment at the end of a zip archive, b"" where there is none."""
    file.seek(0)
    if file.read(4) != b"PK\x03\x04":
        raise Damaged(path, "it is no file of torch.save")
    file.seek(max(size - 22 - COMMENT, 0))
    end = file.read()
    at = end.rfind(END)
    comment = end[at + 22 :]
    if at < 0 or len(end) < at + 22 or int.from_bytes(end[at + 20 : at + 22], "little") != len(comment):
        raise Damaged(path, "its end is missing")
    return comment


def verify_folder(folder: Path) -> str:
    """As `verify`, of a sharded folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    status = [(path.name, path.stat()) for path in files]
    key = (os.path.realpath(folder), *((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in status))
    if key not in _verified:
        _verified[key] = _hash_folder(folder, files)
    return _verified[key]


def _hash_folder(folder: Path, files: list[Path]) -> str:
    listed = read_manifest(folder)
    check_sizes(folder, listed)
    if not listed:
        from emmdit.checkpoint_reader import read_metadata  # takes a second

        read_metadata(folder / ".metadata")  # it compares shards with what is declared
    found = {path.name: sha256_of([path]) for path in files if path.name != MANIFEST}
    for name, file in (listed or {}).items():
        if found[name] != file["sha256"]:
            raise Damaged(folder, f"the bytes of {name} do not match the checksum that was written with them")
    return hashlib.sha256("".join(f"{found[name]}  {name}\n" for name in sorted(found)).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """{name: {"size": bytes, "sha256": hex}}; None: the folder has none."""
    file = folder / MANIFEST
    try:
        listed = read_json(file, limit=16 * BLOCK)["files"]
        ok = all(isinstance(v["size"], int) and re.fullmatch("[0-9a-f]{64}", v["sha256"]) for v in listed.values())
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(folder, f"its {MANIFEST} is damaged") from error
    if not ok or not {".metadata", "meta.pt"} <= listed.keys() or any(Path(name).name != name for name in listed):
        raise Damaged(folder, f"its {MANIFEST} is damaged")
    return listed


def check_sizes(folder: Path, listed: dict[str, dict[str, Any]] | None) -> None:
    """That all files of a sharded folder are there with the sizes listed; reads none of them."""
    for name in listed or (".metadata", "meta.pt"):
        file = folder / name
        if not file.is_file():
            raise Damaged(folder, f"its {name} is missing")
        if listed and file.stat().st_size != listed[name]["size"]:
            raise Damaged(folder, f"{name} has {file.stat().st_size:,} bytes, not {listed[name]['size']:,}")


# -- finding -------------------------------------------------------------------------------------------


def is_checkpoint(path: Path) -> bool:
    """A file, or a folder with some of what a sharded checkpoint has, whole or not."""
    return path.is_file() or any((path / name).is_file() for name in (".metadata", "meta.pt", MANIFEST))


def whole(paths: Iterable[Path], errors: list[Exception]) -> Iterator[Path]:
    """Those of `paths` that are whole, newest first; what is wrong with others is appended to `errors`."""
    for path in sorted(paths, key=_age):
        try:
            verify(path)
            yield path
        except (ValueError, OSError) as error:
            errors.append(error)


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime_ns
    except OSError:  # a dangling link, or deleted meanwhile
        return 0
