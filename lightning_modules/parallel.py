"""Compilation, FSDP2 sharding and attention kernels, applied to a network from outside."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel


def parallelise(network: nn.Module, compile: bool, mesh: DeviceMesh | None, trained: bool = True) -> None:
    """Compile each block in place (names in checkpoints stay the same), then shard each block, then the rest (FSDP2).

    Args:
        mesh: Lightning's device mesh under `FSDP2Strategy`; None: no sharding.
        trained: False for an average that is only read. It must not stay gathered after a forward without backward.
    """
    if compile:
        if getattr(network, "_repeated_blocks", None):
            network.compile_repeated_blocks()
        else:
            for block in blocks_of(network):
                block.compile()
    if mesh is not None:
        for block in blocks_of(network):
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(network, mesh=mesh["data_parallel"], reshard_after_forward=None if trained else True)


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
