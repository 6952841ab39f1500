"""Launcher of work on every rank: the devices and nodes of a trainer's file, torchrun, or SLURM.

`emmdit evaluate`, `precompute` and `generate-dataset` use it, so that the files of `experiments/trainer` mean the same
for all of them as for training.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_modules.commands.ranks import end_with_rank_zero, rank_zero

Work = Callable[[torch.device, int, int], None]  # device, rank, number of processes
GRACE = 5.0  # seconds from a signal to the end, where the process is in a call that does not return


def add_trainer_arguments(parser: ArgumentParser) -> None:
    """`--trainer`, so that the files of `experiments/trainer` can be given as they are for training."""
    parser.add_argument(
        "--trainer",
        type=dict[str, Any],
        default={"accelerator": "auto", "devices": 1, "num_nodes": 1},
        help="accelerator, devices and num_nodes are used, the other keys of a trainer's file are for training; "
        "torchrun sets devices and num_nodes by itself",
    )


def on_all_ranks(section: dict[str, Any], work: Work) -> None:
    """Call `work(device, rank, world_size)` once on each process, without gradients.

    The networks are frozen and nothing is wrapped: of the strategy only the process group is used. SIGTERM and Ctrl-C
    end all ranks within seconds, with exit status 143 or 130; no rank outlives rank 0, whatever ends it.

    Raises:
        ValueError: the port of the process group is taken.
    """
    accelerator = section.get("accelerator", "auto")
    devices, nodes = section.get("devices", 1), section.get("num_nodes", 1)
    if torch.distributed.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    one = devices in (1, "1") or (isinstance(devices, list) and len(devices) == 1)
    alone = nodes == 1 and (one or (devices == "auto" and accelerator == "cpu"))
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Metrics are reduced where they lie. Ranks end hours apart: barriers must wait for the last one.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and accelerator != "cpu" else "gloo"
    strategy = "auto" if alone else DDPStrategy(process_group_backend=backend, timeout=timedelta(days=30))
    trainer = Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,  # tensors made here may be used by metrics later
    )
    launcher = trainer.strategy.launcher
    end_with_rank_zero()
    with _ended_by_signals(launcher) as install, rank_zero():
        try:
            trainer.predict(_OneCall(work, install), DataLoader([0]), return_predictions=False)
            if not alone:
                torch.distributed.destroy_process_group()  # else gloo's threads may abort the exit
        except torch.distributed.DistNetworkError as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            why = str(error).splitlines()[0]
            raise ValueError(f"The ranks cannot meet at {address} ({why}): set MASTER_PORT to a free port.") from error
        except BaseException:
            _end(launcher)
            raise
    sys.stdout.flush()


class _OneCall(LightningModule):
    def __init__(self, work: Work, install: Callable[[], None]) -> None:
        super().__init__()
        self.work, self.install = work, install

    def predict_step(self, batch: Any, batch_idx: int) -> bool:
        self.install()  # Lightning put its own handlers in place, which wait for this step to end
        self.work(self.device, self.global_rank, self.trainer.world_size)
        return True  # Lightning warns of None


@contextmanager
def _ended_by_signals(launcher: Any) -> Iterator[Callable[[], None]]:
    """SIGTERM and Ctrl-C raise SystemExit here; gives a function that installs the handlers again.

    A thread ends the process where that has no effect: a barrier waits for other ranks in a call into C.
    """
    signals, owner, over = (signal.SIGTERM, signal.SIGINT), os.getpid(), threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may
        yield lambda: None
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a loader process, which its rank ends; with 0, or torch takes it for a crash
            if number == signal.SIGTERM:
                os._exit(0)
            return
        for each in signals:
            signal.signal(each, signal.SIG_DFL)  # the second one ends it at once
        if os.environ.get("LOCAL_RANK", "0") == "0":
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            text = f"\nemmdit: ended by {name}. What is finished is kept: the same command resumes.\n"
            os.write(2, text.encode())  # print may not be called again from within itself
        raise SystemExit(128 + number)

    def watch(pipe: int) -> None:
        number = next((byte for byte in iter(lambda: os.read(pipe, 1), b"") if byte[0] in signals), b"")
        if number and not over.wait(GRACE):
            _end(launcher, 0)
            os._exit(128 + number[0])

    def install() -> None:
        for each in signals:
            signal.signal(each, handle)

    before = [signal.getsignal(each) for each in signals]
    end, start = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(end, True)
    woken = signal.set_wakeup_fd(start, warn_on_full_buffer=False)
    threading.Thread(target=watch, args=(end,), daemon=True).start()
    install()
    try:
        yield install
    finally:
        over.set()
        signal.set_wakeup_fd(woken)
        os.close(start)
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, signal.SIG_DFL if handler is None else handler)


def _end(launcher: Any, seconds: float = GRACE) -> None:
    """The ranks that this process started: asked to end, and after `seconds` made to."""
    ranks: list[subprocess.Popen] = getattr(launcher, "procs", [])
    started = list(ranks)
    ranks.clear()  # Lightning's observer kills this process, too, when it sees one of them end
    for process in started:
        process.terminate()
    limit = time.monotonic() + seconds
    for process in started:
        try:
            process.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
