"""Sender of a run's tracking: entries go to a journal at once, and to MLflow from one thread in the background."""

from __future__ import annotations

import atexit
import os
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from emmdit.config_text import mask_secrets
from lightning_modules.mlflow_journal import JOURNAL, Journal, open_journal
from lightning_modules.mlflow_store import connect, database_file, deliver, describe, find_or_create, short_requests

ARTIFACTS = ("text", "image")  # kinds that go to the artifact store, which may fail alone
INTERVAL = 0.5  # seconds between two sendings, so that the steps in between go together
BACKOFF = (2.0, 60.0)  # seconds of silence after a failure, doubled with each further one
LIMITS = {  # of the two journals: numbers, and artifacts (a line holds a whole image)
    "": {"limit": 64 << 20, "line_limit": 1 << 20},
    "_artifacts": {"limit": 256 << 20, "line_limit": 64 << 20},
}


def limits_of(path: Path) -> dict[str, int]:
    """The limits of the journal of that name."""
    return LIMITS["_artifacts" if path.name.startswith(f"{JOURNAL}_artifacts") else ""]


class Sender:
    """Takes entries of one run without ever waiting, and sends them when the store takes them.

    What has not been sent when the process ends waits in the journals: the next sender of the same run in the same
    folder, or `emmdit runs sync`, sends it.

    Args:
        tracking_uri: address of the store.
        run: the run, see `find_or_create`; `uid` is needed.
        folder: where the journals lie.
        artifact_location: of the experiment, if it has to be created.
        create: whether the run may be created; otherwise somebody else does.
        on_run: called once, in the thread, with the run as soon as it is known.
        name: of the journals, if several processes write into one folder.
    """

    def __init__(
        self,
        tracking_uri: str,
        run: Mapping[str, Any],
        folder: Path,
        artifact_location: str | None = None,
        create: bool = True,
        on_run: Callable[[Run], None] | None = None,
        name: str = "",
    ) -> None:
        self.tracking_uri, self.run, self.create = tracking_uri, run, create
        self.artifact_location, self.on_run = artifact_location, on_run
        self.trouble = ""  # the first failure
        self.remarks: list[str] = []  # what else the user should know
        self.failing = False  # whether the last attempt failed
        self.run_id: str | None = None  # once the store knows the run, and what came first
        self._run_id: str | None = None
        self._client: MlflowClient | None = None
        self._connecting = False  # to a database: making its tables takes many seconds on a busy machine
        self._since: float | None = None  # when the present attempt, or its last step, began
        self.left = True  # whether something has not been sent
        self._pid = os.getpid()
        self._wake, self._hurry, self._closing = threading.Event(), threading.Event(), threading.Event()
        header = {"run": dict(run)}
        journals = [open_journal(folder, f"{JOURNAL}{kind}{name}", header, **limits) for kind, limits in LIMITS.items()]
        self.lanes = [_Lane(journal) for journal in journals]
        self._settings = ExitStack()
        self._settings.enter_context(short_requests())
        _import_store(tracking_uri)
        self._thread = threading.Thread(target=self._loop, name="mlflow-sender", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def journal(self) -> Path:
        return self.lanes[0].journal.path

    def append(self, entry: Mapping[str, Any], always: bool = False) -> None:
        """Take an entry, whose first key is its kind; `always`: even if the journal is full."""
        self.lanes[next(iter(entry)) in ARTIFACTS].journal.append(dict(entry), always)
        self._wake.set()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Take metrics of a step, as of now."""
        numbers = {name: float(value) for name, value in metrics.items()}
        self.append({"metrics": numbers, "step": step, "time": int(time.time() * 1000)})

    def flush(self, patience: float = 10.0, limit: float = 60.0) -> bool:
        """Wait until all is sent, while the store answers within `patience` and for `limit` at most; whether it was."""
        self._wait(lambda: self.failing or self.all_sent, patience, limit)
        return self.all_sent

    def wait_for_run(self, patience: float = 10.0) -> str | None:
        """Id of the run, as soon as it is known; None if the store fails."""
        self._wait(lambda: self.run_id is not None or self.failing, patience, limit=60.0)
        return self.run_id or self._run_id

    def close(self, patience: float = 10.0, limit: float = 60.0) -> bool:
        """Try once more to send what is left, within that time, then let go of the journals; whether all was sent."""
        if self._closing.is_set() or os.getpid() != self._pid:
            return not self.left
        for lane in self.lanes:
            lane.journal.note_dropped()
        self._closing.set()
        self._wait(lambda: not self._thread.is_alive(), patience, limit)
        self.left = not self.all_sent
        for lane in self.lanes:
            lane.journal.close(keep=self.run_id is None and lane is self.lanes[0])
        self._settings.close()
        atexit.unregister(self.close)
        return not self.left

    def waiting(self, kind: str) -> Iterator[dict[str, Any]]:
        """The entries of a kind that have not been sent."""
        return (entry for lane in self.lanes for entry in lane.journal.waiting() if kind in entry)

    def message(self, folder: Path) -> str:
        """One sentence on a store that does not take what is logged, and the way out."""
        where, why = mask_secrets(self.tracking_uri), self.trouble or "no answer yet"
        return (
            f"MLflow at {where} does not work ({why}). Nothing else is held up: what is logged waits in {self.journal} "
            f"and is sent when MLflow is back, at the latest by: emmdit runs sync {shlex.quote(str(folder))}"
        )

    @property
    def all_sent(self) -> bool:
        return self.run_id is not None and all(lane.journal.empty for lane in self.lanes)

    def _wait(self, done: Callable[[], bool], patience: float, limit: float) -> None:
        end = time.monotonic() + limit
        self._hurry.set()
        self._wake.set()
        while not done() and (now := time.monotonic()) < end:
            if now - (self._since or now) > patience and not self._connecting:
                break
            time.sleep(0.01)
        self._hurry.clear()

    # -- in the thread -----------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while True:
            closing = self._closing.is_set()
            self._wake.clear()
            for lane in self.lanes:
                self._send(lane, closing)
                if closing and self._client is None:
                    break  # once is enough
            waiting = [lane.retry_at for lane in self.lanes if lane.retry_at]
            self.failing = bool(waiting)
            if closing:
                return
            self._wake.wait(max(min(waiting) - time.monotonic(), 0.01) if waiting else None)
            if not self._closing.is_set():
                self._hurry.wait(INTERVAL)

    def _send(self, lane: _Lane, now: bool) -> None:
        if not now and time.monotonic() < lane.retry_at:
            return
        self._since = time.monotonic()
        try:
            if self._client is None:
                self._connect()
            while True:
                entries, mark = lane.journal.pending()
                if entries:
                    self.remarks += deliver(self._client, self._run_id, entries)
                lane.journal.sent(mark)
                self._since = time.monotonic()
                if not entries:
                    break
        except Exception as error:
            lane.failures += 1
            lane.retry_at = time.monotonic() + min(BACKOFF[0] * 2 ** (lane.failures - 1), BACKOFF[1])
            self._client = None  # look at the store, and at the run, before the next attempt
            if not (isinstance(error, LookupError) and not self.create):
                self.trouble = self.trouble or describe(error)
        else:
            lane.failures, lane.retry_at = 0, 0.0
            self.run_id = self._run_id
        self._since = None

    def _connect(self) -> None:
        self._connecting = "://" in self.tracking_uri and not self.tracking_uri.startswith("http")
        try:
            client = connect(self.tracking_uri)
        finally:
            self._connecting = False
        run, remark = find_or_create(client, self.run, self.tracking_uri, self.artifact_location, self.create)
        if remark:
            self.remarks.append(remark)
        if self._run_id is None and self.on_run is not None:
            self.on_run(run)
        self._run_id, self._client = run.info.run_id, client
        self._since = time.monotonic()


class _Lane:
    """A journal and when to try it again after a failure."""

    def __init__(self, journal: Journal) -> None:
        self.journal, self.retry_at, self.failures = journal, 0.0, 0


def _import_store(tracking_uri: str) -> None:
    """What the thread will need, imported here: a data worker forked during an import would inherit its lock."""
    import mlflow.store.artifact.artifact_repository_registry
    import mlflow.store.tracking.rest_store  # noqa: F401

    if database_file(tracking_uri) is not None or not tracking_uri.startswith(("http", "file")):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
