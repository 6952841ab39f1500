"""What a kill would leave on disk: a copy of a folder before every system call that writes, renames or deletes."""

from __future__ import annotations

import io
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_modules.checkpoint_io import PART

NAMES = {"open", "replace", "rename", "remove", "unlink", "rmdir", "mkdir", "symlink"}
CALLS = NAMES | {"write", "write_record", "write_end_of_file", "flush", "fsync", "close", "truncate"}


@contextmanager
def snapshots(folder: Path, into: Path) -> Iterator[list[str]]:
    """Copies of `folder` as `into/<n>`, one before each call n, in the list, that finds it different.

    What a file has buffered and not flushed is not in the copy, as it would be lost in a kill. Files under their final
    names, which are never written again, are links. Of those being written, names count, not sizes.
    """
    calls: list[str] = []
    into.mkdir(parents=True)
    lock, states = threading.Lock(), set()

    def state() -> tuple:
        found = sorted(folder.rglob("*"))
        return tuple((str(path), os.readlink(path) if path.is_symlink() else "") for path in found)

    def copy(source: str, target: str) -> None:
        (shutil.copy2 if PART in Path(source).parts else os.link)(source, target)

    def hook(frame: Any, event: str, argument: Any) -> None:
        owner = getattr(argument, "__self__", None)
        places = {getattr(owner, "__name__", ""), type(owner).__module__}  # of a function, of a method
        on_disk = not isinstance(owner, io.BytesIO | io.StringIO)
        if event == "c_call" and argument.__name__ in CALLS and on_disk and places & {"posix", "io", "_io", "torch._C"}:
            sys.setprofile(None)
            with lock:
                if (not calls or calls[-1] in NAMES) and (now := state()) not in states:
                    states.add(now)
                    shutil.copytree(folder, into / str(len(calls)), symlinks=True, copy_function=copy)
                calls.append(argument.__name__)
            sys.setprofile(hook)

    sys.setprofile(hook)
    threading.setprofile(hook)  # of threads that begin from here on
    try:
        yield calls
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
