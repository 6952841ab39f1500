"""torch's archives of tensors: whether one is what torch writes, before torch reads it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import BinaryIO

from emmdit.files import first_line


class Damaged(ValueError):
    """A checkpoint that is not what was written; `why` goes on after "since"."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} is not a whole checkpoint, since {why}.")
        self.path, self.why = path, why


def check_archive(file: BinaryIO, size: int, crcs: bool = False) -> None:
    """Raise a ValueError unless `file` is a zip archive as torch writes it: members stored as they are, side by side.

    Others could declare more bytes than the file has. With `crcs`, the CRC-32 of each is compared.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            stored = all(m.compress_type == zipfile.ZIP_STORED and m.file_size == m.compress_size for m in members)
            damaged = archive.testzip() if crcs and stored else None
    except Exception as error:  # damaged directories end in almost any kind
        raise ValueError("its index is damaged") from error
    if not stored or sum(member.file_size for member in members) > size:
        raise ValueError("it is no file of torch.save")
    if damaged is not None:
        raise ValueError(f"the bytes of {damaged} do not match their checksum")


def unreadable(path: str | Path, error: BaseException) -> ValueError:
    return ValueError(f"{path} is not a readable checkpoint ({first_line(error)}).")
