"""Resumable job over many rows, cut into units of consecutive rows, with a journal for each rank.

Resuming rests on three rules:

- What a unit is depends on the source and `rows_per_shard` alone, not on who works on it; among n ranks unit u
  belongs to rank u modulo n. So any number of ranks can resume.
- A unit's file is written under another name, synced, and renamed: it is whole or absent.
- Then a line in the rank's own journal says so, with the unit's rejects. After a kill between the two the unit is
  made again, under the same name. A line cut in the middle does not count.

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

from emmdit.files import atomic_path


class ResumableJob:
    """`with ResumableJob(...) as job: for unit in job.pending(): ... job.commit(unit, ...)`, then `job.manifest(...)`.

    Args:
        folder: of the result; made if need be.
        plan: all that determines the result, fit for JSON. A folder started with another plan is refused.
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
        self.journals = self.folder / "journal"
        self.journal = self.journals / f"rank-{rank:05d}.jsonl"
        self._lock = FileLock(self.journals / f".rank-{rank:05d}.lock", timeout=0)

    def __enter__(self) -> ResumableJob:
        self.journals.mkdir(parents=True, exist_ok=True)
        with FileLock(self.journals / ".plan.lock"):
            self._check_plan()
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"Another process is writing rank {self.rank}'s part of {self.folder}: wait for it or end it."
            ) from None
        if self.journal.is_file() and (content := self.journal.read_bytes()) and not content.endswith(b"\n"):
            with open(self.journal, "r+b") as journal:  # cut off a last line that a kill left without its end
                journal.truncate(content.rfind(b"\n") + 1)
        self.done = self._read_journals()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _check_plan(self) -> None:
        """Write plan.json, or compare with the one that is there."""
        file = self.folder / "plan.json"
        if not file.is_file():
            others = [path.name for path in self.folder.iterdir() if path != self.journals and path.name[0] != "."]
            if others:
                raise ValueError(f"{self.folder} holds other things ({others[0]}): choose an empty folder.")
            with atomic_path(file) as part:
                part.write_text(json.dumps(self.plan, indent=1) + "\n")
        found = flat(json.loads(file.read_text().replace('"licence":', '"license":')))  # the key's older name
        wanted = flat(self.plan)
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                raise ValueError(
                    f"{self.folder} was started with {key} {found.get(key)!r}, now it is {wanted.get(key)!r}: choose "
                    "another folder, or resume with the same settings."
                )

    def _read_journals(self) -> dict[int, dict[str, Any]]:
        """Unit -> its record, of all ranks there ever were; only those whose file exists and has its size."""
        done = {}
        for journal in sorted(self.journals.glob("rank-*.jsonl")):
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
        self, unit: int, write: Callable[[Path], None], samples: int, rejects: list[dict[str, Any]], **more: Any
    ) -> None:
        """Write the unit's file by `write(path)` (none where no sample is left), and record it in the journal."""
        rows = self.rows(unit)
        if samples + len(rejects) != len(rows):
            raise RuntimeError(f"unit {unit}: {samples} samples and {len(rejects)} rejects of {len(rows)} rows.")
        record = {"unit": unit, "first": rows.start, "rows": len(rows), "samples": samples, "file": None, "bytes": 0}
        for left in self.folder.glob(f".data-{unit:06d}-*"):  # by a kill
            left.unlink()
        if samples:
            name = f"data-{unit:06d}{self.suffix}"
            with atomic_path(self.folder / name) as part:
                write(part)
                with open(part, "rb") as file:
                    record |= {"file": name, "bytes": part.stat().st_size}
                    record["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        record |= {**more, "rejects": rejects}
        with open(self.journal, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(record) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.done[unit] = record

    # -- the result ----------------------------------------------------------------------------------

    def manifest(self, about: dict[str, Any]) -> dict[str, Any] | None:
        """Write manifest.json and rejects.jsonl when all ranks' units are done, else None.

        Several ranks may do it at once: they write the same.
        """
        self.done = self._read_journals()
        if len(self.done) < self.units:
            return None
        records = [self.done[unit] for unit in range(self.units)]
        rejects = [reject for record in records for reject in record["rejects"]]
        shards = [record for record in records if record["file"]]
        if shards and "tensors" in shards[0]:
            about = about | {"columns": shards[0]["tensors"]}
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
        with atomic_path(self.folder / "rejects.jsonl") as part:
            part.write_text("".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects), "utf-8")
        with atomic_path(self.folder / "manifest.json") as part:
            part.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")
        return json.loads(json.dumps(manifest))  # as it is read back: no tuples


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {key: v for name, below in tree.items() for key, v in flat(below, f"{prefix}.{name}".lstrip(".")).items()}
