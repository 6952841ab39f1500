"""Sampling schedules: the falling timesteps at which a sampler asks the network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emmdit.flow.timesteps import shift_timesteps

SCHEDULES = ("flow_match_euler", "uniform", "ddpm")
STEPS = 20


def schedule(
    steps: int | None = None, timesteps: str | Sequence[float] = "flow_match_euler", shift: float = 1.0
) -> Tensor:
    """The (steps + 1,) float32 timesteps of a sampling run on the 0..1000 scale, falling to 0.

    >>> schedule(4, "uniform")
    tensor([1000.,  750.,  500.,  250.,    0.])
    >>> schedule(timesteps=[1000, 900, 700, 400])
    tensor([1000.,  900.,  700.,  400.,    0.])

    Args:
        steps: number of steps; 20 for a named schedule if not given. A list has its own number, which `steps` must
            repeat or leave out.
        timesteps: a name, or the timesteps themselves, used as they are: falling, from at most 1000; the final 0 is
            appended unless it is there. Names:

            - "flow_match_euler": `steps` values from 1000 to 1, then 0, as diffusers' FlowMatchEulerDiscreteScheduler
              and so the released model have it. The last step is nearly a no-op (sigma 0.001 to 0): 20 steps do the
              work of 19.
            - "uniform": steps of equal length from 1000 to 0.
            - "ddpm": from 999 to 0, rounded: diffusers' "linspace" spacing, in use for PixArt. For `EpsilonDDPM`,
              whose networks know the integers 0..999 alone.
        shift: moves "flow_match_euler" and "uniform" towards noise (`shift_timesteps`). It is applied once (diffusers
            shifts its lower end twice).

    Raises:
        ValueError: an unknown name, values that do not fall, or arguments that contradict each other.
    """
    if not isinstance(timesteps, str):
        return _explicit(steps, timesteps, shift)
    steps = STEPS if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, but is {steps}.")
    if timesteps == "ddpm":
        if shift != 1:
            raise ValueError(f"The schedule 'ddpm' takes no shift, but shift is {shift}: set it to 1.")
        if steps > 999:
            raise ValueError(f"The schedule 'ddpm' has at most 999 steps, but steps is {steps}.")
        return torch.linspace(999, 0, steps + 1, dtype=torch.float64).round().float()
    if timesteps == "flow_match_euler":
        t = torch.cat([torch.linspace(1000, 1, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    elif timesteps == "uniform":
        t = torch.linspace(1000, 0, steps + 1, dtype=torch.float64)
    else:
        raise ValueError(
            f"There is no schedule {timesteps!r}: choose one of {', '.join(SCHEDULES)}, or list the timesteps."
        )
    return shift_timesteps(t, shift).float()


def _explicit(steps: int | None, timesteps: Sequence[float], shift: float) -> Tensor:
    t = [float(value) for value in timesteps]
    t += [0.0] * (not t or t[-1] != 0)
    check_falling(t)
    if steps not in (None, len(t) - 1):
        raise ValueError(
            f"The schedule lists {len(t) - 1} timesteps above 0, but steps is {steps}: leave steps out (null), or "
            f"name a schedule ({', '.join(SCHEDULES)}) in place of the list."
        )
    if shift != 1:
        raise ValueError(f"A schedule that lists its timesteps takes no shift, but shift is {shift}: set it to 1.")
    return torch.tensor(t)


def check_falling(timesteps: list[float]) -> None:
    """Raise a ValueError unless a sampler can follow ``timesteps``."""
    t = timesteps
    falling = all(before > after for before, after in zip(t, t[1:], strict=False))  # a NaN does not
    if len(t) < 2 or t[0] > 1000 or t[-1] != 0 or not falling:
        raise ValueError(f"The timesteps must be two or more that fall from at most 1000 down to 0, but are {t}.")
