"""Compilation, FSDP2 sharding and attention kernels, applied to a network from outside."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel

from emmdit.checkpoint_reader import load_sharded


def parallelize(
    network: nn.Module, compile: bool, mesh: DeviceMesh | None, precision: str = "32-true", trained: bool = True
) -> None:
    """Compile each block in place (names in checkpoints stay the same), then shard each block, then the rest (FSDP2).

    Args:
        mesh: Lightning's device mesh under `FSDP2Strategy`; None: no sharding.
        precision: the trainer's. Under bf16-mixed the float32 shards are gathered in bfloat16, which halves the
            traffic, and gradients are reduced in float32.
        trained: False for weights that are only read (EMA, a teacher), which must not stay gathered after a forward
            without backward.
    """
    if compile:
        if getattr(network, "_repeated_blocks", None):
            network.compile_repeated_blocks()
        else:
            for block in blocks_of(network):
                block.compile()
    if mesh is not None:
        # Inputs are not cast: a timestep of 999 is not a bfloat16 number. Autocast sees to the rest.
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if precision == "bf16-mixed":
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        settings = {"mesh": mesh["data_parallel"], "mp_policy": policy}
        for block in blocks_of(network):
            fully_shard(block, **settings)
        fully_shard(network, **settings, reshard_after_forward=None if trained else True)


def attention_kernels(device: torch.device) -> AbstractContextManager:
    """Which kernels attention takes in training: torch's choice, but on a CPU under autocast the plain formula, since
    the backward of the fused bfloat16 kernel costs more there than all the rest of a step (torch 2.14)."""
    slow = device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a diffusers-style network, by the class names it gives."""
    names = set(getattr(network, "_no_split_modules", None) or getattr(network, "_repeated_blocks", None) or ())
    return [module for module in network.modules() if type(module).__name__ in names]


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 with every rank data-parallel, whatever the number of nodes and devices.

    Lightning's own strategy makes the devices of a node tensor-parallel unless told otherwise: they would all
    be given the same batch, and one node would shard nothing. The module shards itself in `configure_model`,
    over `self.device_mesh["data_parallel"]`. Runs on CPU too.

    Args:
        save_distributed_checkpoint: a folder with one file per rank, which any number of ranks can resume;
            otherwise a single file, gathered on rank zero.
        process_group_backend: `nccl` (RCCL on ROCm) on GPUs and `gloo` on CPU when not given.
        timeout_minutes: how long a collective may wait for a rank.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout_minutes: float = 30,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # known only now
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """As in Lightning, but a sharded folder is read without unpickling what it holds.

        Lightning leaves the choice of a reader to torch, whose own unpickles: for this call, ours takes its place.
        """
        with patch("lightning.fabric.strategies.model_parallel._distributed_checkpoint_load", load_sharded):
            return super().load_checkpoint(checkpoint_path, True if weights_only is None else weights_only)
