"""Work beside the training (images, metrics, loggers, reports) whose failure costs a warning and not the run."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from lightning_modules.commands.config_errors import one_line

Result = TypeVar("Result")
CALLS = ("log_metrics", "log_hyperparams", "log_graph", "log_image", "log_text", "log_dataset", "save")
CALLS += ("after_save_checkpoint", "finalize")


class Failed(Exception):
    """Work of `together` failed on some rank; each such rank has warned of it."""


@contextmanager
def survives(what: str) -> Iterator[None]:
    """A warning for an error in the block, which must hold no collective: other ranks would wait in it."""
    try:
        yield
    except Exception as error:
        warn(what, error)


def together(trainer: Trainer, what: str, work: Callable[[], Result]) -> Result:
    """What `work` returns, on every rank, or `Failed` on every rank: those it worked on must not go on alone."""
    error = result = None
    try:
        result = work()
    except Exception as caught:
        error = caught
        warn(what, error)
    failed = torch.tensor(float(error is not None), device=trainer.strategy.root_device)
    if trainer.world_size > 1:
        failed = trainer.strategy.reduce(failed, reduce_op="max")
    if failed:
        raise Failed(what) from error
    return result


def warn(what: str, error: BaseException) -> None:
    warnings.warn(f"{what} failed, and training goes on: {one_line(error)}", stacklevel=2)


def make_survivable(logger: Logger) -> None:
    """Let no error in what is sent to a logger during training end it."""
    for name in CALLS:
        if callable(call := getattr(logger, name, None)):
            setattr(logger, name, _surviving(call, f"{type(logger).__name__}.{name}"))


def _surviving(call: Callable, what: str) -> Callable:
    @functools.wraps(call)
    def surviving(*args: Any, **kwargs: Any) -> Any:
        with survives(what):
            return call(*args, **kwargs)

    return surviving
