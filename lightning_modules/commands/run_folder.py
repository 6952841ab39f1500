"""The folder of a training: whether it is free, the lock on it, and where a run is cloned to."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from emmdit.files import resolved
from emmdit.weights import find_checkpoint, last_checkpoint
from lightning_modules.commands.config_files import default_run_dir, is_run_config
from lightning_modules.mlflow_store import RUN_FILE
from lightning_modules.runs import numbered_configs

LOCK = ".lock"
say = rank_zero_only(print)


def sign_of_use(folder: Path, checkpoints: Path) -> Path | None:
    """A file that a training left in its folder, or in the one of its checkpoints; None where there is none."""
    found = [*sorted(checkpoints.glob("*.ckpt")), *sorted(folder.glob("hpc_ckpt_*.ckpt"))]
    found += [path for _, path in numbered_configs(folder)]
    found += [path for path in (folder / RUN_FILE,) if path.exists()]
    return next(iter(found), None)


@contextmanager
def locked(folders: Iterable[Path]) -> Iterator[None]:
    """Keep other trainings out of the folders while the block runs; the system frees them when this process ends.

    Raises:
        ValueError: another training is in one of them.
    """
    locks = [FileLock(folder / LOCK, thread_local=False) for folder in dict.fromkeys(folders)]
    try:
        for lock in locks:
            folder = Path(lock.lock_file).parent
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise ValueError(
                    f"Another training is running in {folder}: wait for its end, or name another folder with "
                    "--trainer.default_root_dir."
                ) from None
            except (NotImplementedError, OSError) as error:
                if isinstance(error, PermissionError):
                    raise
                # a network file system without locks
                rank_zero_warn(f"{folder} cannot be locked ({error}): nothing keeps a second training out of it.")
        yield
    finally:
        for lock in locks:
            lock.release()


class RunFolder:
    """The folder of a run and that of its checkpoints, by default inside of it."""

    def __init__(self, folder: str, checkpoints: str) -> None:
        self.folder, self.checkpoints = Path(folder), Path(checkpoints)
        self._resumed = False

    def start(self, command: str, ckpt_path: str | None, writes_nothing: bool) -> str | None:
        """What Lightning is to load, for `--ckpt_path`; only reads.

        Raises:
            FileNotFoundError, ValueError: there is no such checkpoint, or the folder holds a run that is not resumed.
        """
        path = self._checkpoint(command, ckpt_path)
        self._resumed = path is not None and self._is_own(path) or ckpt_path == "last" or self._is_requeued()
        if command == "fit" and not writes_nothing:
            self._refuse_used()
        return path

    @contextmanager
    def held(self, trains: bool) -> Iterator[None]:
        """Keep other trainings out while the block runs; rank zero holds the locks for all."""
        if not trains or rank_zero_only.rank:
            yield
            return
        with locked((self.folder, self.checkpoints) if self.checkpoints.parent != self.folder else (self.folder,)):
            self._refuse_used()  # again: a training may have ended since
            yield

    def _refuse_used(self) -> None:
        sign = None if self._resumed or rank_zero_only.rank else sign_of_use(self.folder, self.checkpoints)
        if sign:
            raise ValueError(
                f"{self.folder} holds a run already ({sign}): add --ckpt_path last to go on with it, or name another "
                "folder with --trainer.default_root_dir."
            )

    def _checkpoint(self, command: str, ckpt_path: str | None) -> str | None:
        if ckpt_path is None and command == "validate":
            raise ValueError("validate needs a checkpoint: add --ckpt_path last, or the path of one.")
        if ckpt_path == "last":
            if last_checkpoint(self.checkpoints) is not None:
                return ckpt_path
            if command == "validate":
                raise FileNotFoundError(f"No checkpoint in {self.checkpoints}: name one with --ckpt_path.")
            if any(self.folder.glob("hpc_ckpt_*.ckpt")):
                return "hpc"
            say(f"No checkpoint in {self.checkpoints} yet: training starts from zero.")
            return None
        if ckpt_path is None or ckpt_path in ("hpc", "registry") or re.match(r"\w+:", str(ckpt_path)):
            return ckpt_path
        if ckpt_path == "best":
            raise ValueError("--ckpt_path best is for a training that has just ended: give last, or a path.")
        return str(find_checkpoint(ckpt_path))  # itself, the last one of a run folder, or the sentence

    def _is_own(self, path: str) -> bool:
        places = (resolved(self.folder), resolved(self.checkpoints))
        return path == "hpc" or any(resolved(path).is_relative_to(place) for place in places)

    def _is_requeued(self) -> bool:
        """Lightning resumes by itself what it has requeued."""
        return SLURMEnvironment.detect() and any(self.folder.glob("hpc_ckpt_*.ckpt"))


def clone_of(folder: Path) -> Path:
    """runs/x-2, or the first such name that no run has."""
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(name for name in names if sign_of_use(name, name / "checkpoints") is None)


def run_dir_of(files: Sequence[str], command: str | None, ckpt_path: str | None) -> str:
    """The run folder where none is given: that of a run's own config to resume or validate it, otherwise a new one."""
    clones = [Path(file) for file in files if is_run_config(file)]
    if not clones:
        return default_run_dir(files)
    own = clones[-1].parent
    resumed = ckpt_path == "last" or (ckpt_path and resolved(ckpt_path).is_relative_to(resolved(own)))
    if command == "validate" or resumed:
        return str(own)
    others = [file for file in files if not is_run_config(file) and Path(file).parent.name != "trainer"]
    if others and files.index(others[-1]) > files.index(str(clones[-1])):
        return default_run_dir(files)  # what is laid over it names the new run
    new = clone_of(own)
    say(f"{clones[-1]} is the configuration of another run: this one goes to {new}.")
    return str(new)
