"""Progress lines of long jobs that are not training, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


def counter(what: str, seconds: float = 2.0) -> Callable[[int, int], None]:
    """progress(done, total) that prints "12/300 WHAT" at most every `seconds`, and at the end."""
    latest = [0.0]

    def progress(done: int, total: int) -> None:
        now = time.monotonic()
        if now - latest[0] > seconds or done == total:
            latest[0] = now
            print(f"{done:,}/{total:,} {what}", file=sys.stderr, flush=True)

    return progress
