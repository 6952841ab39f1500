"""Protocol of rows: what a reader of a storage format gives, and how it recognizes its sources.

A new format is a file with a subclass of `Rows` and its line in `emmdit.data.readers.open.READERS`.
"""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from glob import glob
from pathlib import Path, PurePath
from typing import Any

from torch.utils.data import Dataset

from emmdit.files import resolved


@dataclass(frozen=True)
class Source:
    """What a user names as data.

    Args:
        name: folder, file, glob or hub id.
        split: of a hub dataset or a saved `DatasetDict`; of MDS a folder of that name, if there is one.
        data_files: a glob or list of globs inside a hub dataset or a folder.
        revision: branch, tag or commit of a hub dataset.
    """

    name: str
    split: str = "train"
    data_files: str | list[str] | None = None
    revision: str | None = None
    _found: dict[str, list[str]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def path(self) -> Path:
        return Path(self.name).expanduser()

    def files(self, suffix: str) -> list[str]:
        """The local files with this suffix: the file itself, the glob's, of `data_files`, or all below the folder.

        ValueError for a pipe or a device.
        """
        if suffix not in self._found:  # a scan of millions of files takes a while
            patterns = [self.data_files] if isinstance(self.data_files, str) else self.data_files or [f"**/*{suffix}"]
            whole = [str(self.path / pattern) for pattern in patterns] if self.path.is_dir() else [str(self.path)]
            found = {file for pattern in whole for file in _globbed(pattern) if file.endswith(suffix)}
            self._found[suffix] = sorted(file for file in found if not os.path.isdir(file))
            for file in self._found[suffix]:
                if os.path.exists(file) and not os.path.isfile(file):
                    raise ValueError(f"'{file}' is a pipe or a device, not a file: remove it.")
        return self._found[suffix]


def walk(root: str | Path, links: bool = True) -> Iterator[Path]:
    """All files below a folder, those whose names begin with a dot aside.

    Each folder is visited once, under its own name where it has one, so that links to folders (with `links`) can
    neither loop nor multiply what is there.
    """
    seen: set[tuple[int, int]] = set()
    folders, linked = [Path(root)], []
    while folders or linked:
        folder = folders.pop() if folders else linked.pop(0)
        place = folder.stat()
        if (place.st_dev, place.st_ino) in seen:
            continue
        seen.add((place.st_dev, place.st_ino))
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = folder / entry.name
                if entry.name.startswith("."):
                    continue
                if not _is_folder(entry):
                    yield path
                elif not entry.is_symlink():
                    folders.append(path)
                elif links and resolved(path).is_relative_to(resolved(root)):
                    linked.append(path)
                elif links:
                    raise ValueError(
                        f"'{path}' is a link to a folder elsewhere, whose files may be anything: name it with "
                        "data_files, or remove it."
                    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _globbed(pattern: str) -> Iterator[str]:
    """`glob`, whose `**` would follow links for ever."""
    parts = PurePath(pattern).parts
    if "**" not in parts:
        yield from glob(pattern)
        return
    first = parts.index("**")
    for root in filter(os.path.isdir, glob(os.path.join(*parts[:first])) if first else ["."]):
        for path in walk(root):
            if _matches(path.relative_to(root).parts, parts[first:]):
                yield str(path)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    reached = {0}  # how much of the pattern the parts so far may stand for
    for part in parts:
        reached = _behind_stars(reached, pattern)
        stay = {at for at in reached if at < len(pattern) and pattern[at] == "**"}
        reached = stay | {at + 1 for at in reached - stay if at < len(pattern) and fnmatchcase(part, pattern[at])}
    return len(pattern) in _behind_stars(reached, pattern)


def _behind_stars(reached: set[int], pattern: Sequence[str]) -> set[int]:
    """With the positions behind each `**`, which may stand for nothing."""
    found = set(reached)
    for at in range(len(pattern)):
        if at in found and pattern[at] == "**":
            found.add(at + 1)
    return found


class Rows(Dataset, ABC):
    """Rows of a table, read at any place: `len(rows)`, `rows[i] -> dict` of the columns.

    Opening is cheap and finds the number of rows. A row that cannot be used while its neighbors can (a truncated file,
    a missing one, an unsafe path) raises `InvalidSample` when it is read, so it is counted and named. Images are
    encoded: bytes, a `pathlib.Path`, `{"bytes": ...}`, or a PIL image that is not decoded yet. A reader makes a `Path`
    only of a name that it followed and found inside its source; a text that stands in the data is never opened. An
    instance is sent to loader processes: leave open files out of `__getstate__`.

    Attributes:
        column_names: of each row, all or those of `select_columns`.
    """

    column_names: list[str]

    @classmethod
    @abstractmethod
    def open(cls, source: Source) -> Rows | None:
        """The rows; None where the source is not of this format. Readers are asked in the order of `READERS`.

        Raises:
            FileNotFoundError, OSError, ValueError: one sentence that says what to do.
        """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """16 hex digits that change with the rows, and not with the machine or the place of a cache."""

    def origin(self, index: int) -> str:
        """Where row `index` comes from (file and sample), for messages; "" where the format has no names."""
        return ""

    def select_columns(self, names: Sequence[str]) -> Rows:
        """The same rows with these columns alone; others are not read."""
        rows = copy.copy(self)
        rows.column_names = list(names)
        return rows

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Several rows at once, where a format has a faster way than one by one."""
        return [self[index] for index in indices]
