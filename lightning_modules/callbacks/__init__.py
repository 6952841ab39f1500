"""Callbacks of the suite, to be named in an experiment's YAML as `lightning_modules.callbacks.<Name>`."""

from lightning_modules.callbacks.checkpoint import Checkpoint
from lightning_modules.callbacks.ema import EMA
from lightning_modules.callbacks.evaluation import CLIPScoreCallback, Evaluation, FIDCallback, GenEvalCallback
from lightning_modules.callbacks.image_grid import ImageGrid
from lightning_modules.callbacks.lineage import DataLineage
from lightning_modules.callbacks.mlflow_system import MLflowSystemMetrics
from lightning_modules.callbacks.non_finite import NonFinite
from lightning_modules.callbacks.progress import ProgressBar
from lightning_modules.callbacks.save_config import SaveConfig
from lightning_modules.callbacks.summary import Summary
from lightning_modules.callbacks.throughput import Throughput

__all__ = [
    "EMA",
    "CLIPScoreCallback",
    "Checkpoint",
    "DataLineage",
    "Evaluation",
    "FIDCallback",
    "GenEvalCallback",
    "ImageGrid",
    "MLflowSystemMetrics",
    "NonFinite",
    "ProgressBar",
    "SaveConfig",
    "Summary",
    "Throughput",
]
