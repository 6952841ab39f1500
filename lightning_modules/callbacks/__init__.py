"""Callbacks of the suite, to be named in an experiment's YAML as `lightning_modules.callbacks.<Name>`."""

from __future__ import annotations

from emmdit.lazy import attach

__getattr__, __all__ = attach(
    __name__,
    {
        "checkpoint": ("Checkpoint",),
        "ema": ("EMA",),
        "evaluation": ("CLIPScoreCallback", "Evaluation", "FIDCallback", "GenEvalCallback"),
        "image_grid": ("ImageGrid",),
        "lineage": ("DataLineage",),
        "mlflow_system": ("MLflowSystemMetrics",),
        "non_finite": ("NonFinite",),
        "progress": ("ProgressBar",),
        "save_config": ("SaveConfig",),
        "stop": ("StopSignals",),
        "summary": ("Summary",),
        "throughput": ("Throughput",),
    },
)
