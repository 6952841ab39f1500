"""CPU, memory, disk, network and GPU use of each node, in MLflow's system metrics."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

from lightning_modules.mlflow_logger import MLflowLogger
from lightning_modules.mlflow_sender import Sender


class MLflowSystemMetrics(Callback):
    """Samples the machine in a thread on the first process of each node while training, over the training step.

    MLflow's own monitor thread asks the store before each sample, and ends, or holds up the end of training, when that
    does not answer. Metrics need psutil (CPU), nvidia-ml-py (NVIDIA) or pyrsmi (AMD); what is missing is left
    out. With an sqlite store only the first node reports: such a file must not be written from two machines.

    Args:
        interval: seconds between samples.
        samples: how many of them are averaged for one point.
    """

    def __init__(self, interval: float = 10.0, samples: int = 3) -> None:
        self.interval, self.samples = interval, samples
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._sender: Sender | None = None  # of another node than the first
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logger = next((one for one in trainer.loggers if isinstance(one, MLflowLogger)), None)
        if logger is None:
            return
        run = trainer.strategy.broadcast(logger.run)  # known on rank zero; a collective, so before any return
        if trainer.local_rank != 0 or (trainer.node_rank > 0 and logger.tracking_uri.startswith("sqlite")):
            return
        prefix = f"system/node_{trainer.node_rank}/" if trainer.num_nodes > 1 else "system/"
        log = logger.log_metrics
        if not trainer.is_global_zero:
            name = f"-node_{trainer.node_rank}"
            folder = Path(logger.save_dir or ".")
            self._sender = Sender(logger.tracking_uri, run, folder, create=False, name=name)
            log = self._sender.log_metrics
        self._step = trainer.global_step
        self._stop.clear()
        self._thread = threading.Thread(target=self._sample, args=(log, prefix), name="system-metrics", daemon=True)
        self._thread.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._step = getattr(pl_module, "training_steps", trainer.global_step)

    def _sample(self, log: Callable[[dict[str, float], int], None], prefix: str) -> None:
        monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        for kind in (GPUMonitor, ROCMMonitor):
            try:
                monitors.append(kind())
                break
            except Exception:  # without such a device or its library they raise what they like
                continue
        stopped = False
        while not stopped:
            for _ in range(self.samples):
                for monitor in monitors:
                    monitor.collect_metrics()
                stopped = self._stop.wait(self.interval)
                if stopped:
                    break
            for monitor in monitors:
                log({f"{prefix}{key}": value for key, value in monitor.aggregate_metrics().items()}, self._step)
                monitor.clear_metrics()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join(timeout=5)
            self._thread = None
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.on_train_end(trainer, pl_module)
