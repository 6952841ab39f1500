"""The maths of training and sampling: paths, timesteps, guidance, samplers, losses, randomness.

Plain torch, no network: a network enters only as a callable. One convention holds throughout: ``t`` is the
timestep on the 0..1000 scale (1000 = noise, 0 = data), the number every diffusers transformer takes as
``timestep``.
"""

from emmdit.flow.guidance import guided
from emmdit.flow.loss import MinSNR, TimestepWeight, flow_loss
from emmdit.flow.paths import EpsilonDDPM, Path, RectifiedFlow
from emmdit.flow.samplers import GRIDS, SAMPLERS, dpm_solver, euler, heun, sample, timestep_grid
from emmdit.flow.timesteps import (
    LogitNormal,
    LogitNormalGrid,
    TimestepSampler,
    Uniform,
    UniformGrid,
    resolution_shift,
    shift_timesteps,
)
from emmdit.seeding import generator, step_noise

__all__ = [
    "GRIDS",
    "SAMPLERS",
    "EpsilonDDPM",
    "LogitNormal",
    "LogitNormalGrid",
    "MinSNR",
    "Path",
    "RectifiedFlow",
    "TimestepSampler",
    "TimestepWeight",
    "Uniform",
    "UniformGrid",
    "dpm_solver",
    "euler",
    "flow_loss",
    "generator",
    "guided",
    "heun",
    "resolution_shift",
    "sample",
    "shift_timesteps",
    "step_noise",
    "timestep_grid",
]
