"""Auxiliary losses of the training step, each a component given by configuration, never an `if` in the step."""

from emmdit.losses.base import LossComponent, TrainingStep
from emmdit.losses.distillation import FeatureDistillation, OutputDistillation, Teacher, TeacherOutput
from emmdit.losses.repa import REPA

__all__ = [
    "FeatureDistillation",
    "LossComponent",
    "OutputDistillation",
    "REPA",
    "Teacher",
    "TeacherOutput",
    "TrainingStep",
]
