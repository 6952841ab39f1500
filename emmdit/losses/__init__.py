"""Auxiliary losses of the training step, each a component given by configuration, never an `if` in the step."""

from .base import LossComponent, TrainingStep
from .repa import REPA

__all__ = ["LossComponent", "REPA", "TrainingStep"]
