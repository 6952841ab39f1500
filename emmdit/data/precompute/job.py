"""Long work on many rows, cut into units of consecutive rows, each of which becomes one file or nothing.

Resuming rests on three rules:

- What a unit is depends on the source and `rows_per_shard` alone, not on who works on it; among n ranks unit u
  belongs to rank u modulo n. So any number of ranks can go on.
- A unit's file is written under another name, synced, and renamed: it is whole or not there.
- Then a line in the rank's own journal says so, with the unit's rejects. A kill between the two makes the unit be
  done again, into the same name. A line cut in the middle does not count.

Every row is therefore in exactly one unit, and every unit in the result exactly once: nothing is lost or doubled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


class ShardedJob:
    """`with ShardedJob(...) as job: for unit in job.pending(): ... job.commit(unit, ...)`, then `job.manifest(...)`.

    Args:
        folder: of the result; made if need be.
        plan: all that decides about the result, fit for JSON. A folder begun with another plan is refused.
        total: number of rows in the source.
        rows_per_shard: rows in a unit. A kill costs each rank at most one.
        suffix: of the files.
        rank, world: this process among all processes; they need not know of each other.
    """

    def __init__(
        self,
        folder: str | Path,
        plan: dict[str, Any],
        total: int,
        rows_per_shard: int,
        suffix: str = ".arrow",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if total < 1:
            raise ValueError("The source is empty: check its path and filters.")
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard must be at least 1, got {rows_per_shard}.")
        self.folder, self.total, self.rows_per_shard, self.suffix = Path(folder), total, rows_per_shard, suffix
        self.plan = json.loads(json.dumps(plan | {"rows": total, "rows_per_shard": rows_per_shard}))
        self.rank, self.world = rank, world
        self.units = -(-total // rows_per_shard)
        self.journal = self.folder / "journal"
        self._lock = FileLock(self.journal / f".rank-{rank:05d}.lock", timeout=0)

    def __enter__(self) -> ShardedJob:
        self.journal.mkdir(parents=True, exist_ok=True)
        self._agree()
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"Another process is writing rank {self.rank}'s part of {self.folder}: wait for it or end it."
            ) from None
        for left in self.folder.glob(f".rank-{self.rank:05d}-*"):  # by a kill
            left.unlink()
        self._mend(self._journal_file())
        self.done = self._read_journals()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _agree(self) -> None:
        """Write plan.json, or find the same one. A hard link appears with its content, and for one process alone."""
        file = self.folder / "plan.json"
        if not file.is_file():
            strangers = [path.name for path in self.folder.iterdir() if path != self.journal and path.name[0] != "."]
            if strangers and not file.is_file():
                raise ValueError(f"{self.folder} holds other things ({strangers[0]}): choose an empty folder.")
            part = self.folder / f".plan-{self.rank}-{os.getpid()}"
            _write(part, json.dumps(self.plan, indent=1) + "\n")
            try:
                os.link(part, file)
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                os.replace(part, file)
            part.unlink(missing_ok=True)
        found = flat(json.loads(file.read_text()))
        wanted = flat(self.plan)
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                raise ValueError(
                    f"{self.folder} was begun with {key} {found.get(key)!r}, now it is {wanted.get(key)!r}: choose "
                    "another folder, or go on with the same settings."
                )

    # -- the journals --------------------------------------------------------------------------------

    def _journal_file(self) -> Path:
        return self.journal / f"rank-{self.rank:05d}.jsonl"

    @staticmethod
    def _mend(file: Path) -> None:
        """Cut off a last line that a kill left without its end, so that the next line does not hang on to it."""
        if file.is_file() and (content := file.read_bytes()) and not content.endswith(b"\n"):
            with open(file, "r+b") as journal:
                journal.truncate(content.rfind(b"\n") + 1)

    def _read_journals(self) -> dict[int, dict[str, Any]]:
        """Unit -> its record, of all ranks there ever were; only those whose file is there and of its size."""
        done = {}
        for journal in sorted(self.journal.glob("rank-*.jsonl")):
            for line in journal.read_bytes().split(b"\n")[:-1]:
                record = json.loads(line)
                file = self.folder / record["file"] if record["file"] else None
                if file is None or (file.is_file() and file.stat().st_size == record["bytes"]):
                    done[record["unit"]] = record
                else:
                    done.pop(record["unit"], None)
        return done

    # -- the work ------------------------------------------------------------------------------------

    def rows(self, unit: int) -> range:
        """The rows of the source that a unit is made of."""
        first = unit * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.total))

    def pending(self) -> list[int]:
        """This rank's units that are not done yet."""
        return [unit for unit in range(self.rank, self.units, self.world) if unit not in self.done]

    def commit(
        self,
        unit: int,
        write: Callable[[Path], None] | None,
        samples: int,
        rejects: list[dict[str, Any]],
        **more: Any,
    ) -> None:
        """Make `write(path)`'s file the unit's result (None where nothing is left of it), and remember it for good."""
        rows = self.rows(unit)
        if samples + len(rejects) != len(rows):
            raise RuntimeError(f"unit {unit}: {samples} samples and {len(rejects)} rejects of {len(rows)} rows.")
        record = {"unit": unit, "first": rows.start, "rows": len(rows), "samples": samples, "file": None, "bytes": 0}
        if write is not None and samples:
            name = f"data-{unit:06d}{self.suffix}"
            part = self.folder / f".rank-{self.rank:05d}-{name}"
            write(part)
            with open(part, "rb") as file:
                os.fsync(file.fileno())
                record |= {"file": name, "bytes": part.stat().st_size}
                record["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            os.replace(part, self.folder / name)
            _sync(self.folder)
        record |= {**more, "rejects": rejects}
        with open(self._journal_file(), "a", encoding="utf-8") as journal:
            journal.write(json.dumps(record) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.done[unit] = record

    # -- the result ----------------------------------------------------------------------------------

    def records(self) -> list[dict[str, Any]] | None:
        """Of all units in their order, by all ranks; None as long as some are not done."""
        self.done = self._read_journals()
        return [self.done[unit] for unit in range(self.units)] if len(self.done) == self.units else None

    def manifest(self, about: dict[str, Any]) -> dict[str, Any] | None:
        """Write manifest.json and rejects.jsonl when all units are done, else None.

        Several ranks may do it at once: they write the same.
        """
        records = self.records()
        if records is None:
            return None
        rejects = [reject for record in records for reject in record["rejects"]]
        shards = [record for record in records if record["file"]]
        manifest = {
            **about,
            "counts": {
                "rows": self.total,
                "samples": sum(record["samples"] for record in records),
                "rejected": dict(sorted(Counter(reject["reason"] for reject in rejects).items())),
            },
            "shards": [{key: shard[key] for key in ("file", "samples", "bytes", "sha256")} for shard in shards],
        }
        hashes = "".join(shard["sha256"] for shard in shards)
        manifest["sha256"] = hashlib.sha256(hashes.encode()).hexdigest()
        manifest = json.loads(json.dumps(manifest))  # what is given back is what is read back: no tuples
        text = "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects)
        replace(self.folder / "rejects.jsonl", text)
        replace(self.folder / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        return manifest


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {key: v for name, below in tree.items() for key, v in flat(below, f"{prefix}.{name}".lstrip(".")).items()}


def replace(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    _write(part, text)
    os.replace(part, file)


def _write(file: Path, text: str) -> None:
    with open(file, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    """The rename itself must outlive a power cut, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
