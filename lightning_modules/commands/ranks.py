"""Processes that rank zero starts for the other ranks of its node: they end when it does."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

RANK_ZERO = "EMMDIT_RANK_ZERO"  # its process id, in the environment of those that it starts


@contextmanager
def rank_zero() -> Iterator[None]:
    """Let processes started in the block know who started them."""
    if started_by_rank_zero():
        yield
        return
    os.environ[RANK_ZERO] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(RANK_ZERO, None)


def started_by_rank_zero() -> bool:
    """Whether this process is a rank that Lightning started from rank zero (not torchrun, not SLURM)."""
    return RANK_ZERO in os.environ and int(os.environ.get("LOCAL_RANK", 0)) > 0


def end_with_rank_zero() -> None:
    """End this process, if rank zero started it, within a second of rank zero's end, however that came about.

    Lightning looks after this only from the other side; a rank in a collective would wait for half an hour.
    """
    if not started_by_rank_zero():
        return

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, args=(int(os.environ[RANK_ZERO]),), daemon=True, name="end-with-rank-zero").start()
