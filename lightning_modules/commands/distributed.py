"""Launcher of work on every rank: the devices and nodes of a trainer's file, torchrun, or SLURM.

`emmdit evaluate`, `precompute` and `generate-dataset` use it, so that the files of `experiments/trainer` mean the same
for all of them as for training.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

Work = Callable[[torch.device, int, int], None]  # device, rank, number of processes


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

    The networks are frozen and nothing is wrapped: of the strategy only the process group is used.
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
    trainer.predict(_OneCall(work), DataLoader([0]), return_predictions=False)
    if not alone:
        torch.distributed.destroy_process_group()  # else gloo's threads may abort the exit
    sys.stdout.flush()


class _OneCall(LightningModule):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def predict_step(self, batch: Any, batch_idx: int) -> bool:
        self.work(self.device, self.global_rank, self.trainer.world_size)
        return True  # Lightning warns of None
