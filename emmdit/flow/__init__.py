"""The mathematics of training and sampling: paths, timesteps, schedules, guidance, samplers, loss.

Plain torch, no network: a network enters only as a callable. One convention holds throughout: ``t`` is the
timestep on the 0..1000 scale (1000 = noise, 0 = data), the number every diffusers transformer takes as
``timestep``.
"""

from emmdit.flow.guidance import classifier_free_guidance
from emmdit.flow.loss import MinSNR, RelativeLoss, TimestepWeight, flow_loss
from emmdit.flow.paths import EpsilonDDPM, Path, RectifiedFlow
from emmdit.flow.samplers import SAMPLERS, Predict, State, dpm_solver, euler, heun, sample, trajectory
from emmdit.flow.schedules import schedule
from emmdit.flow.timesteps import (
    LogitNormal,
    LogitNormalGrid,
    TimestepSampler,
    Uniform,
    UniformGrid,
    resolution_shift,
    shift_timesteps,
)

__all__ = [
    "SAMPLERS",
    "EpsilonDDPM",
    "LogitNormal",
    "LogitNormalGrid",
    "MinSNR",
    "Path",
    "Predict",
    "RectifiedFlow",
    "RelativeLoss",
    "State",
    "TimestepSampler",
    "TimestepWeight",
    "Uniform",
    "UniformGrid",
    "classifier_free_guidance",
    "dpm_solver",
    "euler",
    "flow_loss",
    "heun",
    "resolution_shift",
    "sample",
    "schedule",
    "shift_timesteps",
    "trajectory",
]
