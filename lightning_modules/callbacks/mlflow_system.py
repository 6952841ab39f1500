"""CPU, memory, disk, network and GPU use of each node, in MLflow's system metrics."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from lightning_modules.mlflow_logger import MLflowLogger


class MLflowSystemMetrics(Callback):
    """Starts MLflow's monitor thread on the first process of each node while training.

    MLflow's own switch (`enable_system_metrics_logging`) works on runs begun by `mlflow.start_run`, which
    Lightning does not use. Metrics need psutil (CPU), nvidia-ml-py (NVIDIA) or pyrsmi (AMD); what is missing is left
    out. With an sqlite store only the first node reports: such a file must not be written from two machines.

    Args:
        interval: seconds between samples.
        samples: how many of them are averaged for one point.
    """

    def __init__(self, interval: float = 10.0, samples: int = 3) -> None:
        self.interval, self.samples = interval, samples
        self._monitor: SystemMetricsMonitor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logger = next((one for one in trainer.loggers if isinstance(one, MLflowLogger)), None)
        if logger is None:
            return
        run_id = trainer.strategy.broadcast(logger.run_id)  # known on rank zero; a collective, so before any return
        if trainer.local_rank != 0 or (trainer.node_rank > 0 and logger.tracking_uri.startswith("sqlite")):
            return
        self._monitor = SystemMetricsMonitor(
            run_id,
            sampling_interval=self.interval,
            samples_before_logging=self.samples,
            resume_logging=True,
            node_id=f"node_{trainer.node_rank}" if trainer.num_nodes > 1 else None,
            tracking_uri=logger.tracking_uri,
        )
        self._monitor.start()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.on_train_end(trainer, pl_module)
