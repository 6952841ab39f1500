"""Compilation, FSDP2 sharding and attention kernels, applied to a network from outside."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel

from emmdit.checkpoint_files import entry
from emmdit.checkpoint_reader import load_sharded, save_sharded, state_metadata
from emmdit.weights import find_checkpoint, read_file, read_meta
from lightning_modules.checkpoint_io import (
    PART,
    check_fits,
    check_keys,
    check_optimizers,
    delete,
    install,
    new_part,
    not_written,
    write_manifest,
)


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

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """All ranks write their shards under a hidden name, which rank zero renames when all is written and synced.

        Raises:
            OSError: with one sentence, on every rank; nothing is left under the final name.
        """
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)
            return
        state = {"state_dict": checkpoint.pop("state_dict")}
        state |= {f"optimizer_{i}": value for i, value in enumerate(checkpoint.pop("optimizer_states", []))}
        part = path.with_name(PART)
        self._agree(path, lambda: new_part(path).mkdir() if self.is_global_zero else None)
        self._agree(path, lambda: save_sharded(state, part))
        own = part.glob(f"__{self.global_rank}_*.distcp")
        files = self._agree(path, lambda: {file.name: entry(file) for file in own})
        self._agree(path, lambda: self._finish(checkpoint, part, path, files) if self.is_global_zero else None)

    def _agree(self, path: Path, work: Callable[[], Any]) -> list[Any]:
        """What `work` returned on each rank; if it raised on any, one OSError of one sentence on all."""
        try:
            mine = (None, work())
        except (Exception, CheckpointException) as error:
            if isinstance(error, CheckpointException):  # of all ranks' causes, one
                error = next(iter(error.failures.values()))[0]
            mine = (not_written(path, error), None)
        found = [None] * self.world_size
        torch.distributed.all_gather_object(found, mine)
        if told := [sentence for sentence, _ in found if sentence]:
            if self.is_global_zero:
                delete(path.with_name(PART))
            raise OSError(told[0])
        return [result for _, result in found]

    def _finish(self, rest: dict[str, Any], part: Path, path: Path, files: list[dict[str, Any]]) -> None:
        with (part / "meta.pt").open("wb") as file:
            torch.save(rest, file)
            file.flush()
            os.fsync(file.fileno())
        own = {name: entry(part / name) for name in (".metadata", "meta.pt")}
        write_manifest(part, {name: value for found in (*files, own) for name, value in found.items()})
        install(part, path)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """As in Lightning, but verified, compared with the module, and read without unpickling what a folder holds.

        Lightning leaves the choice of a reader to torch, whose own unpickles: for this call, ours takes its place.
        """
        path = find_checkpoint(checkpoint_path)
        if path.is_dir():
            checkpoint, tensors = read_meta(path), state_metadata(path)
            shapes = {key: entry.size for key, entry in tensors.items()}
            checkpoint = checkpoint | {"state_dict": {}}
        else:
            _, checkpoint = read_file(path)
            shapes = {key: value.shape for key, value in checkpoint["state_dict"].items()}
        check_keys(checkpoint, path, self.lightning_module.trainer)
        check_fits(shapes, self.lightning_module, path)
        check_optimizers(checkpoint, self.lightning_module.trainer)
        with patch("lightning.fabric.strategies.model_parallel._distributed_checkpoint_load", load_sharded):
            return super().load_checkpoint(path, True if weights_only is None else weights_only)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensors, where the CPU trains.

    By default each large tensor is mapped anew, cleared page by page and unmapped, which a small network feels. Other
    C libraries are left as they are.
    """
    m_trim_threshold, m_top_pad, m_mmap_threshold, m_arena_max = -1, -2, -3, -8  # malloc.h
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(m_mmap_threshold, 32 * 2**20)  # the most that it takes
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_top_pad, 64 * 2**20)
        mallopt(m_arena_max, 1)
