"""Journal of a run's tracking: JSON lines in the run folder, which wait there until MLflow has them.

The first line names the run, each other line is one entry, for instance `{"tags": {...}}`. A line `{"sent": N}` says
that everything before byte N has been sent; once all is sent, the file is cut back to its first line. A journal may be
a stranger's: a line that is too long, no JSON or no entry is skipped and counted.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from emmdit.files import parse_json

JOURNAL = "mlflow_journal"
CHUNK = 1 << 20
STRUCTURE = 200_000  # brackets and commas of a line: a long line of them would need fifty times its size in memory
MEMORY = 16 << 20  # bytes kept in memory where the file cannot be written

_open: set[tuple[int, int]] = set()  # files open in this process, which locks do not keep from itself


class JournalInUse(OSError):
    """Another process, or another object of this one, is writing or sending the journal."""


class Journal:
    """A journal open for writing and sending, by this process alone; its methods may be called from any thread.

    Where the file cannot be written (a full disk, a read-only folder), entries wait in memory.

    Args:
        path: file, created if it is not there.
        header: its first line, of a new file; None: the file must exist and have one.
        limit: bytes that wait at most; further entries are dropped and counted in `dropped`.
        line_limit: bytes of one line at most.

    Raises:
        JournalInUse: see there.
        OSError, ValueError: the file cannot be read, or is no journal. With a header neither is raised, except for a
            file that is no journal.
    """

    def __init__(
        self, path: Path, header: dict[str, Any] | None = None, limit: int = 64 << 20, line_limit: int = 1 << 20
    ) -> None:
        self.path, self.limit, self.line_limit = path, limit, line_limit
        self.dropped: dict[str, tuple[int, int, int]] = {}  # kind -> [count, first step, last step]
        self.skipped = 0  # lines that were no entries
        self._noted: dict[str, tuple[int, int, int]] = {}
        self._lock = threading.RLock()
        self._fd: int | None = None
        self._memory: list[bytes] = []
        self._closed = False
        try:
            self._fd = _locked(path, create=header is not None)
            _open.add(self._key())
            self._size = os.fstat(self._fd).st_size
            if header is not None and self._size == 0:
                self._write(_line(header))
        except JournalInUse:
            raise
        except OSError:
            if header is None:
                raise
            self._release()
            self.header, self._begin, self._sent, self._size = header, 0, 0, 0
            return
        first = next(self._lines(0, min(self._size, line_limit + 1)), (0, None))
        self._begin, found = first[0], _parsed(first[1])
        run = found.get("run") if isinstance(found, dict) else None
        uid = run.get("uid") if isinstance(run, dict) else None
        if not isinstance(uid, str) or not re.fullmatch(r"\w{1,64}", uid) or self._size > 2 * limit + CHUNK:
            self._release()
            raise ValueError(f"{path} is no journal of this suite: remove it or give it another name.")
        if os.pread(self._fd, 1, self._size - 1) != b"\n":
            self._terminate()
        self.header, self._sent = found, self._begin
        for _, entry in self._entries(self._begin):
            mark = entry.get("sent", 0)
            self.skipped += mark is None
            if isinstance(mark, int) and self._sent < mark <= self._size:
                self._sent = mark

    # -- writing -----------------------------------------------------------------------------------------------

    def append(self, entry: dict[str, Any], always: bool = False) -> None:
        """Add an entry, or drop and count it if the journal is full; `always`: small and needed, so never dropped."""
        line = _line(entry)
        with self._lock:
            if self._closed:
                return
            if len(line) > self.line_limit or not (always or self._size - self._sent + len(line) <= self.limit):
                self._drop(entry)
                return
            try:
                self._write(line)
            except OSError:
                if sum(map(len, self._memory)) + len(line) > MEMORY:
                    self._drop(entry)
                else:
                    self._memory.append(line)

    def note_dropped(self) -> None:
        """Add what was dropped as an entry, so that the run says it."""
        with self._lock:
            news, self._noted = self.dropped.items() - self._noted.items(), dict(self.dropped)
            for kind, (count, first, last) in news:
                text = f"{count} {kind} of steps {first} to {last}: the journal was full"
                self.append({"tags": {f"journal.dropped.{kind}": text}}, always=True)

    def _drop(self, entry: dict[str, Any]) -> None:
        kind = next(iter(entry))
        step = entry.get("step", 0)
        first_time = kind not in self.dropped
        count, first, _ = self.dropped.get(kind, (0, step, step))
        self.dropped[kind] = (count + 1, first, step)
        if first_time:  # at once: a killed process says no more
            self.note_dropped()

    def _terminate(self) -> None:
        """End a line within which its writer was killed."""
        with suppress(OSError):  # then the next entry is lost with it
            self._write(b"\n")

    def _write(self, line: bytes) -> None:
        if self._fd is None:
            raise OSError("no file")
        try:
            written = os.write(self._fd, line)
            if written < len(line):
                raise OSError("disk full")
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(line)

    # -- sending -----------------------------------------------------------------------------------------------

    @property
    def empty(self) -> bool:
        """Whether all was sent."""
        return not self.pending(1)[0]

    def pending(self, entries: int = 500, bytes_: int = 1 << 20) -> tuple[list[dict[str, Any]], int]:
        """The next entries to send, about so many bytes, and the mark to hand to `sent` once they are."""
        with self._lock:
            if self._closed:
                return [], 0
            found: list[dict[str, Any]] = []
            end = self._sent
            for end, entry in self._entries(self._sent):  # noqa: B007  (the mark behind the last one)
                if "sent" not in entry:
                    found.append(entry)
                if len(found) >= entries or (found and end - self._sent >= bytes_):
                    break
            if found or not self._memory:
                return found, end
            lines = self._memory[:entries]
            return [json.loads(line) for line in lines], self._size + len(lines)

    def waiting(self) -> Iterator[dict[str, Any]]:
        """All entries that have not been sent, one by one."""
        with self._lock:
            if not self._closed:
                yield from (entry for _, entry in self._entries(self._sent) if "sent" not in entry)
                yield from map(json.loads, list(self._memory))

    def sent(self, mark: int) -> None:
        """Forget what was sent: everything before `mark`."""
        with self._lock:
            if self._closed:
                return
            if mark > self._size:
                self._memory = self._memory[mark - self._size :]
            self._sent = min(mark, self._size)
            if self._fd is None:
                return
            try:
                if self._sent == self._size:
                    os.ftruncate(self._fd, self._begin)
                    self._size = self._sent = self._begin
                else:
                    self._write(b"\n" + _line({"sent": self._sent}))  # on a line of its own, behind a torn one too
            except OSError:
                pass  # it is sent again by the next process, which does no harm

    def close(self, keep: bool = False) -> None:
        """Let go of the file; remove it if all was sent, unless it is to be kept for the run that it names."""
        with self._lock:
            if self._closed:
                return
            self.note_dropped()
            if self._fd is not None and not keep and self.empty:
                self.path.unlink(missing_ok=True)
            self._closed = True
            self._release()

    def _release(self) -> None:
        if self._fd is not None:
            _open.discard(self._key())
            os.close(self._fd)
            self._fd = None

    def _key(self) -> tuple[int, int]:
        found = os.fstat(self._fd)
        return found.st_dev, found.st_ino

    # -- reading -----------------------------------------------------------------------------------------------

    def _entries(self, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        if self._fd is None:
            return
        for end, line in self._lines(start, self._size):
            entry = _parsed(line)
            if isinstance(entry, dict) and entry:
                yield end, entry
            elif line != b"":
                yield end, {"sent": None}  # nothing to send, and passed over once its neighbors are sent

    def _lines(self, start: int, stop: int) -> Iterator[tuple[int, bytes | None]]:
        """(offset behind it, line) of each line; None for one that is too long. A line without its end is left out."""
        rest, position, too_long = b"", start, False
        while position < stop and (chunk := os.pread(self._fd, min(CHUNK, stop - position), position)):
            begin = position - len(rest)
            position += len(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                begin += len(line) + 1
                yield begin, None if too_long or len(line) > self.line_limit else line
                too_long = False
            if len(rest) > self.line_limit:
                rest, too_long = b"", True


def open_journal(folder: Path, name: str, header: dict[str, Any], **limits: int) -> Journal:
    """The journal `name`.jsonl of a folder, for the run that `header` names.

    A journal of the same run is continued; that of another run, or a foreign file, is set aside under another name,
    which `emmdit runs sync` finds too. Where another process holds it, this one takes a name of its own.
    """
    path = folder / f"{name}.jsonl"
    aside = folder / f"{name}-{time.time_ns()}.jsonl"
    if path.is_symlink() or (path.exists() and not path.is_file()):
        return Journal(aside, header, **limits)
    try:
        journal = Journal(path, header, **limits)
        if journal.header["run"]["uid"] == header["run"]["uid"]:
            return journal
        journal.close()
    except JournalInUse:
        return Journal(aside, header, **limits)
    except ValueError:
        pass
    try:
        if path.exists():
            path.rename(aside)
    except OSError:
        path = aside
    return Journal(path, header, **limits)


def find_journals(folder: Path) -> list[Path]:
    """All journals at or below a folder, the outer ones first; links are not followed."""
    if folder.is_file():
        return [folder]
    found = [
        Path(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if name.startswith(JOURNAL) and name.endswith(".jsonl")
    ]
    return sorted(found, key=lambda path: (len(path.parts), path.name))


def _locked(path: Path, create: bool) -> int:
    """An open file that no other process holds; never one that a link, a pipe or a device stands for."""
    flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags |= os.O_CREAT
    while True:
        if path.is_file() and (found := path.stat()) and (found.st_dev, found.st_ino) in _open:
            raise JournalInUse(f"{path} is in use by this process")  # opened and closed again, it would lose its lock
        fd = os.open(path, flags, 0o644)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(f"{path} is not a plain file")
            try:
                # A record lock: data workers, forked later, do not inherit it as they would flock's.
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise JournalInUse(f"{path} is in use by another process") from error
            except OSError:
                pass  # a file system without locks
            if path.exists() and os.path.samestat(os.stat(path), found):
                return fd  # else its former owner removed it meanwhile
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":"), default=str).encode() + b"\n"


def _parsed(line: bytes | None) -> Any:
    if line is None or sum(line.count(mark) for mark in (b"[", b"{", b",")) > STRUCTURE:
        return None
    try:
        return parse_json(line)
    except ValueError:
        return None
