"""Resumable job over many rows, cut into units of consecutive rows, with a journal for each rank.

Resuming rests on three rules:

- What a unit is depends on the source and `rows_per_shard` alone, not on who works on it; among n ranks unit u
  belongs to rank u modulo n. So any number of ranks can resume.
- A unit's file is written under another name, synced, and renamed: it is whole or absent.
- Then a line in the rank's own journal says so, with the unit's rejects and the file's hash. After a kill between the
  two the unit is made again, under the same name. A line cut in the middle does not count.

A rank that starts hashes the files of its units, and makes again those that are not as they were written.

Every row is therefore in exactly one unit, and every unit in the result exactly once: nothing is lost or doubled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from emmdit.files import atomic_path, check_folder, parse_json, read_json, sha256_of

TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}  # half a surrogate pair: as JSON escapes it


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
        check_folder(self.folder)
        for path in (self.journals, *self.journals.glob("*")):
            if path.is_symlink():  # what is written there would land elsewhere
                raise ValueError(f"{path} is a link, which no job makes: remove it, or choose another folder.")
        self._made = not self.folder.exists()
        self._check_plan()  # a refusal leaves nothing behind
        self.journals.mkdir(parents=True, exist_ok=True)
        with FileLock(self.journals / ".plan.lock"):
            if not self._check_plan():
                with atomic_path(self.folder / "plan.json") as part:
                    part.write_text(json.dumps(self.plan, indent=1) + "\n")
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"Another process is writing rank {self.rank}'s part of {self.folder}: wait for it or end it."
            ) from None
        try:
            if self.journal.is_file() and (content := self.journal.read_bytes()) and not content.endswith(b"\n"):
                with open(self.journal, "r+b") as journal:  # cut off a last line that a kill left without its end
                    journal.truncate(content.rfind(b"\n") + 1)
            self.done = self._read_journals(hashed=True)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self._lock.release()
        if failure is not None and self.world == 1 and not any(self.journals.glob("rank-*.jsonl")):
            with suppress(OSError):  # nothing was made: leave nothing behind
                for file in (self.folder / "plan.json", *self.journals.iterdir()):
                    file.unlink(missing_ok=True)
                self.journals.rmdir()
                if self._made:
                    self.folder.rmdir()

    def _check_plan(self) -> bool:
        """Whether there is a plan.json; ValueError where it is another one, or the folder holds other things."""
        file = self.folder / "plan.json"
        if not file.is_file():
            others = self.folder.iterdir() if self.folder.is_dir() else ()
            for path in others:
                if path != self.journals and path.name[0] != ".":
                    raise ValueError(f"{self.folder} holds other things ({path.name}): choose an empty folder.")
            return False
        found = read_json(file, f"choose another folder, or remove {self.folder} to begin anew")
        if not isinstance(found, dict):
            raise ValueError(f"{file} is no plan of a job: choose another folder.")
        found, wanted = flat(found), flat(self.plan)
        found = {name.replace("licence", "license"): value for name, value in found.items()}  # the key's older name
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                raise ValueError(
                    f"{self.folder} was started with {key} {found.get(key)!r}, now it is {wanted.get(key)!r}: choose "
                    "another folder, or resume with the same settings."
                )
        return True

    def _read_journals(self, hashed: bool = False) -> dict[int, dict[str, Any]]:
        """Unit -> its record, of all ranks there ever were; only those whose file exists and has its size, and with
        `hashed`, for units of this rank, its hash."""
        done = {}
        for journal in sorted(self.journals.glob("rank-*.jsonl")):
            for number, line in enumerate(journal.read_bytes().split(b"\n")[:-1], 1):
                try:
                    record = self._record(parse_json(line))
                except (ValueError, TypeError, KeyError) as error:
                    raise ValueError(
                        f"{journal}, line {number} is damaged ({str(error) or 'no JSON'}): remove the line, and its "
                        "unit is made again."
                    ) from error
                file = self.folder / record["file"] if record["file"] else None
                if file is None or (file.is_file() and file.stat().st_size == record["bytes"]):
                    done[record["unit"]] = record
                else:
                    done.pop(record["unit"], None)
        mine = [unit for unit in range(self.rank, self.units, self.world) if unit in done and done[unit]["file"]]
        for unit in mine if hashed else ():
            file = self.folder / done[unit]["file"]
            if sha256_of([file]) != done[unit]["sha256"]:
                print(f"{file} is not as it was written, and is made again.", file=sys.stderr)
                del done[unit]
        return done

    def _record(self, found: Any) -> dict[str, Any]:
        """A line of a journal. ValueError, TypeError or KeyError where it is none of this job's."""
        unit, samples = found["unit"], found["samples"]
        file = f"data-{unit:06d}{self.suffix}" if samples else None
        rejects = [reject["reason"] for reject in found["rejects"]]
        if min(samples, 0) < 0 or not all(isinstance(reason, str) for reason in rejects):
            raise ValueError("samples or rejects are none")
        if unit not in range(self.units) or (found["first"], found["rows"]) != _bounds(self.rows(unit)):
            raise ValueError(f"this job has no unit {unit!r:.20} of those rows")
        if found["file"] != file or samples + len(rejects) != found["rows"]:
            raise ValueError("file, samples and rejects do not agree")
        if file and not (type(found["bytes"]) is int and re.fullmatch("[0-9a-f]{64}", found["sha256"])):
            raise ValueError("its file has no size or no hash")
        return found

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
                record |= {"file": name, "bytes": part.stat().st_size, "sha256": sha256_of([part])}
        record |= {**more, "rejects": rejects}
        with open(self.journal, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(record) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.done[unit] = record

    # -- the result ----------------------------------------------------------------------------------

    def manifest(
        self, about: dict[str, Any], before: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any] | None:
        """Write manifest.json and rejects.jsonl when all ranks' units are done, else None; first call `before` with
        the manifest, since what stands beside it must be whole when it appears.

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
        if before is not None and shards:
            before(manifest)
        with atomic_path(self.folder / "rejects.jsonl") as part:
            part.write_text("".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects), **TEXT)
        with atomic_path(self.folder / "manifest.json") as part:
            part.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", **TEXT)
        return json.loads(json.dumps(manifest))  # as it is read back: no tuples


def _bounds(rows: range) -> tuple[int, int]:
    return rows.start, len(rows)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {key: v for name, below in tree.items() for key, v in flat(below, f"{prefix}.{name}".lstrip(".")).items()}
