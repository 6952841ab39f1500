"""Guard around one reading of an input: what a reader may raise, open, run and take.

The reader returns, or raises ValueError or OSError with a sentence that names a file of the input. It runs no code of
the input's choice, opens and writes nothing outside its folder, and its time and memory are bounded.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tests.fuzz.mutations import Tree, write
from tests.fuzz.target import Target

ROOT = Path(__file__).parents[2]
SECONDS = 5  # of the processor, for one input
MEMORY = 1 << 30  # more than before; an image may have 89 million pixels
ADDRESSES = 2 << 30
RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile", "pty.spawn")
RUNS += ("subprocess.Popen", "socket.connect", "socket.bind", "socket.getaddrinfo", "webbrowser.open", "os.kill")
# places of the paths that are changed among an event's arguments, each with that of the folder it is relative to
CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    **{"os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.mkdir": ((0, 2),), "os.rename": ((0, 2), (1, 3))},
    **{"os.link": ((1, 3),), "os.symlink": ((1, 2),), "os.chmod": ((0, 2),), "os.chown": ((0, 3),)},
    **{"os.truncate": ((0, None),), "shutil.rmtree": ((0, None),), "shutil.move": ((0, None), (1, None))},
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
READABLE = tuple(map(str, (sys.prefix, sys.base_prefix, ROOT, "/usr", "/proc", "/sys", "/dev/null", "/dev/urandom")))
READABLE += ("/etc/localtime", "/etc/mime.types", "/etc/ssl")


class Fault(Exception):
    """What a reader must not do; `signature` is the same for the same fault of other inputs."""

    def __init__(self, told: str, signature: str = "") -> None:
        super().__init__(told)
        self.signature = signature or told


class Forbidden(BaseException):
    """Ends a reader that did what it must not, whatever it catches."""


class TooSlow(BaseException):
    pass


class Guard:
    """A folder for one input after the other, and the hook that watches; one for a process.

    Attributes:
        case: the folder of the input.
    """

    installed: Guard | None = None
    hooked = False

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.case, self.scratch = self.root / "case", self.root / "scratch"
        self.secret = self.root / "secret.txt"
        self.active, self.reads = False, ""
        self.seen: list[str] = []
        self.linked: list[str] = []
        self.modules: frozenset[str] = frozenset()
        self.most = 0  # bytes of addresses
        if not Guard.hooked:  # for good: a hook cannot be removed
            Guard.hooked = True
            sys.addaudithook(lambda *event: Guard.installed and Guard.installed._watch(*event))
        Guard.installed = self

    def _watch(self, event: str, arguments: tuple) -> None:
        if not self.active:
            return
        if event in RUNS:
            self._forbid(f"{event} {arguments[0]!r:.80}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path, _, flags = arguments
            follow = not flags & os.O_NOFOLLOW
            if flags & WRITING and not self._inside(path, follow) and os.fsdecode(path) != "/dev/null":
                self._forbid(f"writes {os.fsdecode(path)!r:.80}")
            elif not (self.reads == "anything" or self._readable(path)):
                self._forbid(f"reads {os.fsdecode(path)!r:.80}")
        elif event == "import" and self.modules and arguments[0].partition(".")[0] not in self.modules:
            self._forbid(f"imports {arguments[0]!r:.80}")
        elif event in CHANGES:
            for place, relative in CHANGES[event]:
                path, base = arguments[place], arguments[relative] if relative is not None else -1
                if not isinstance(path, str | bytes | os.PathLike):
                    continue
                base = os.readlink(f"/proc/self/fd/{base}") if isinstance(base, int) and base >= 0 else os.getcwd()
                if not self._inside(os.path.join(base, os.fsdecode(path)), follow=False):
                    self._forbid(f"{event} {os.fsdecode(path)!r:.80}")

    def _readable(self, path: Any) -> bool:
        follow = self.reads == "inside" or os.fsdecode(path).startswith("/dev/fd/")
        place = os.path.realpath(os.fsdecode(path))
        if self.reads == "linked" and any(
            place == link or place.startswith(os.path.join(link, "")) for link in self.linked
        ):
            return True
        return self._inside(path, follow) or place.startswith(READABLE)

    def _inside(self, path: Any, follow: bool) -> bool:
        name = os.fsdecode(path)
        place = os.path.realpath(name) if follow else os.path.abspath(name)
        folders = (str(self.case), str(self.scratch))
        return place in folders or place.startswith(tuple(f"{folder}/" for folder in folders))

    def _forbid(self, what: str) -> None:
        self.seen.append(what)
        raise Forbidden(what)

    def check(self, target: Target, tree: Tree) -> str:
        """What the target's reader ends with: "read", or the kind of the error.

        Raises:
            Fault: the reader did what it must not.
        """
        for folder in (self.case, self.scratch):
            shutil.rmtree(folder, ignore_errors=True)
        self.scratch.mkdir()
        self.secret.write_text("not of the input\n")
        try:
            write(tree, self.case)
        except (OSError, ValueError):
            return "not written"  # names that a file system does not take
        self.seen, self.reads = [], target.reads
        self.linked = [os.path.realpath(self.case / name) for name, content in tree.items() if isinstance(content, str)]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        error: BaseException | None = None
        if self.most and addresses() > self.most - MEMORY:
            gc.collect()  # an error keeps what its frames hold
            self.most = addresses() + ADDRESSES  # what libraries keep is no reader's fault
        with limits(self.most), warnings.catch_warnings(action="ignore"):
            self.active = True
            try:
                target.read(self.case)
            except BaseException as raised:  # a Forbidden may have been caught and wrapped
                error = raised
            finally:
                self.active = False
        if isinstance(error, KeyboardInterrupt):
            raise error
        if self.seen:
            raise Fault(self.seen[0], f"{self.seen[0].split()[0]} {_where(error)}")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        if grown > MEMORY or _of_memory(error):
            raise Fault(
                f"takes {grown >> 20} MiB, or asks for more than there is: {error!r:.100}", f"memory {_where(error)}"
            )
        if isinstance(error, TooSlow):
            raise Fault(f"takes more than {SECONDS} s", f"slow {_where(error)}")
        if set(os.listdir(self.root)) != {"case", "scratch", "secret.txt"} or self.secret.stat().st_size != 17:
            raise Fault(f"leaves {sorted(os.listdir(self.root))}")
        if error is None:
            return "read"
        self._check_message(error, tree, target.named)
        return type(error).__name__

    def _check_message(self, error: BaseException, tree: Tree, named: bool) -> None:
        told = f"{type(error).__name__}: {error!s:.300}"
        signature = f"{type(error).__name__} {_where(error)}"
        if not isinstance(error, ValueError | OSError | ArgumentError):
            raise Fault(told, signature) from error
        names = {str(self.case), *(Path(name).name for name in tree)}
        if named and not any(name in str(error) for name in names):
            raise Fault(f"no file is named: {told}", f"nameless {signature}") from error


@contextmanager
def limits(most: int) -> Iterator[None]:
    """Bounds of time and of addresses (0: none), for this process alone and until the end of the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, _too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (most or soft, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor: this machine may be busy
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def guarded(targets: Iterable[Target]) -> Iterator[Guard]:
    """A guard on a folder in memory, where there is one.

    What the readers import for valid inputs may be imported for all, and of the standard library everything.
    """
    import datasets
    import diffusers
    from PIL import Image

    Image.init()  # imports all plugins of Pillow at the first image of no common kind
    datasets.disable_progress_bars()
    diffusers.utils.logging.disable_progress_bar()
    logging.disable()  # what libraries say of broken files
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="emmdit-fuzz-", dir=place) as folder, mock.patch.dict(os.environ):
        guard = Guard(Path(folder))
        os.environ["EMMDIT_CACHE"] = str(guard.scratch)
        try:
            targets = [target for target in targets if target.valid]
            guard.scratch.mkdir()
            with (
                mock.patch.object(datasets.config, "HF_DATASETS_CACHE", guard.scratch),
                mock.patch.object(tempfile, "tempdir", str(guard.scratch)),
            ):
                for target in targets:
                    write(target.valid, guard.root / target.name)
                    target.read(guard.root / target.name)
                    shutil.rmtree(guard.root / target.name)
                for target in targets:
                    ended = guard.check(target, target.valid)
                    assert ended == "read", f"the valid input of {target.name} ends in {ended}"
                loaded = {name.partition(".")[0] for name in sys.modules}
                guard.modules = frozenset(loaded | sys.stdlib_module_names)
                guard.most = addresses() and addresses() + ADDRESSES
                yield guard
        finally:
            Guard.installed = None
            logging.disable(logging.NOTSET)


def addresses() -> int:
    """Bytes of this process' address space; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0


def _too_slow(*_: object) -> None:
    if Guard.installed is not None and Guard.installed.active:  # else it has just ended
        raise TooSlow


def _of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "bad_alloc" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _where(error: BaseException | None) -> str:
    """The innermost line of this suite that the error, or its cause, came through."""
    while error is not None:
        frames = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        own = [(file, name) for file, name in zip(frames, names, strict=True) if _of_suite(file)]
        if own:
            return f"{own[-1][0].relative_to(ROOT)}:{own[-1][1]}"
        error = error.__cause__
    return "outside the suite"


def _of_suite(file: Path) -> bool:
    return file.is_relative_to(ROOT) and not {".venv", "fuzz"} & set(file.relative_to(ROOT).parts)
