"""Auxiliary losses of the training step, each a component given by configuration, never an `if` in the step."""

from .base import LossComponent, TrainingStep
from .distillation import FeatureDistillation, OutputDistillation, Teacher, TeacherOutput
from .repa import REPA

__all__ = [
    "FeatureDistillation",
    "LossComponent",
    "OutputDistillation",
    "REPA",
    "Teacher",
    "TeacherOutput",
    "TrainingStep",
]
