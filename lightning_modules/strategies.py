"""Ways to spread training over devices that Lightning does not offer as they are needed here."""

from __future__ import annotations

from datetime import timedelta

from lightning.pytorch.strategies import ModelParallelStrategy


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
