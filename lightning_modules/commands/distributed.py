"""Work that is not training on every process of a trainer section: its devices and nodes, torchrun or SLURM."""

from __future__ import annotations

import logging
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
        help="accelerator, devices and num_nodes count; what else a trainer's file says is for training",
    )


def on_all_ranks(section: dict[str, Any], work: Work) -> None:
    """Call `work` once on each process. They share nothing: the network is frozen, and the strategy of no account."""
    devices, nodes = section.get("devices", 1), section.get("num_nodes", 1)
    alone = nodes == 1 and devices in (1, "1", [0], "auto") and section.get("accelerator") == "cpu"
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Ranks end hours apart; the barriers around the work must wait for the last one.
    strategy = "auto" if alone else DDPStrategy(process_group_backend="gloo", timeout=timedelta(days=30))
    trainer = Trainer(
        accelerator=section.get("accelerator", "auto"),
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.predict(_OneCall(work), DataLoader([0]), return_predictions=False)
    sys.stdout.flush()


class _OneCall(LightningModule):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def predict_step(self, batch: Any, batch_idx: int) -> bool:
        self.work(self.device, self.global_rank, self.trainer.world_size)
        return True  # Lightning warns of None
