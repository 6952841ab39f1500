"""Configurations of older versions: renamed classes and settings, translated to their present names."""

from __future__ import annotations

from typing import Any

# Class paths, the modules of a pipeline's components, and the class of a pipeline.
CLASSES = {
    "EMMDiTPipeline": "TextToImagePipeline",
    "emmdit.encoders.ShapesText": "emmdit.shapes.ShapesText",
    "emmdit.evaluation.AskedColor": "emmdit.shapes.AskedColor",
    "emmdit.evaluation.ShapesDetector": "emmdit.shapes.ShapesDetector",
    "emmdit.evaluation.ShapesPrompts": "emmdit.shapes.ShapesPrompts",
    "emmdit.networks.linearize": "emmdit.networks.edit.students",
}
KEYS = {"grid": "schedule", "licence": "license"}
VALUES = {("schedule", "nitro"): "flow_match_euler"}  # (key, old value)


def modernize(config: Any) -> Any:
    """A copy of a pipeline's or a run's configuration in present names; what has them already stays as it is.

    >>> modernize({"sampling": {"steps": 20, "grid": "nitro"}})
    {'sampling': {'steps': 20, 'schedule': 'flow_match_euler'}}
    """
    if isinstance(config, dict):
        renamed = {KEYS.get(key, key): modernize(value) for key, value in config.items()}
        return {key: VALUES.get((key, str(value)), value) for key, value in renamed.items()}
    if isinstance(config, list | tuple):
        return type(config)(modernize(value) for value in config)
    return CLASSES.get(config, config) if isinstance(config, str) else config
