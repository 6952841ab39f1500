"""What is applied to a network from outside, while it knows nothing of it: compilation, sharding, attention kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
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
