"""Auxiliary losses of the training step, each a component given by configuration, never an `if` in the step."""

from emmdit.losses.base import LossComponent, LossInputs
from emmdit.losses.distillation import TeacherDistillation
from emmdit.losses.repa import REPA

__all__ = ["LossComponent", "LossInputs", "REPA", "TeacherDistillation"]
