"""Distributions of training timesteps: ``sampler(n, generator, device) -> t (n,)``, float32, 0..1000.

Numbers are drawn on the generator's own device and then moved, so a CPU generator gives the same timesteps on
every machine. Ask for the whole global batch at once and take your rows: only so are the strata those of the
global batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """s' = shift s / (1 + (shift - 1) s) with s = t / 1000: above 1 towards noise; 0 and 1000 stay."""
    _check_positive("shift", shift)
    if shift == 1:
        return t
    return 1000 * shift * t / (1000 + (shift - 1) * t)


def resolution_shift(tokens: int, base_tokens: int, base_shift: float = 1.0) -> float:
    """The shift for ``tokens`` image tokens: base_shift sqrt(tokens / base_tokens).

    The more tokens carry one image, the more noise it takes to hide it equally well (Stable Diffusion 3, arXiv
    2403.03206, section 5.3.2).
    """
    _check_positive("tokens", tokens)
    _check_positive("base_tokens", base_tokens)
    _check_positive("base_shift", base_shift)
    return base_shift * math.sqrt(tokens / base_tokens)


class TimestepSampler(ABC):
    """Draws timesteps; a subclass says from which distribution, in `draw`.

    >>> t = LogitNormal(mean=0.6, stratified=True)(n_global, generator(seed, "timesteps", samples_seen))[rows]

    Args:
        shift: see `shift_timesteps`; `resolution_shift` computes it.
        stratified: draw one value from each of n equally likely strata, in random order, instead of n
            independent ones. The distribution of each value stays the same and the mean over the batch varies
            far less.
    """

    def __init__(self, shift: float = 1.0, stratified: bool = False) -> None:
        _check_positive("shift", shift)
        self.shift = shift
        self.stratified = stratified

    @abstractmethod
    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """n timesteps before the shift."""

    def __call__(
        self, n: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """n timesteps (n,), float32, on ``device`` (the generator's if not given)."""
        if n < 1:
            raise ValueError(f"The number of timesteps to draw must be 1 or more, but is {n}.")
        t = shift_timesteps(self.draw(n, generator or torch.default_generator), self.shift).float()
        return t if device is None else t.to(device)

    def _uniform(self, n: int, generator: torch.Generator) -> Tensor:
        """n numbers in [0, 1), float64, one in each of n strata if stratified."""
        u = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
        if self.stratified:
            u = (torch.randperm(n, generator=generator, device=generator.device) + u) / n
        return u

    def _normal(self, n: int, generator: torch.Generator) -> Tensor:
        """n standard normal numbers, one in each of n equally likely strata if stratified."""
        if not self.stratified:
            return torch.randn(n, generator=generator, device=generator.device)
        tiny = torch.finfo(torch.float64).eps
        return torch.special.ndtri(self._uniform(n, generator).clamp(tiny, 1 - tiny))


class LogitNormal(TimestepSampler):
    """logit(t / 1000) is normal(mean, std): a ``mean`` above 0 draws noisier images (SD3, section 3.1)."""

    def __init__(self, mean: float = 0.0, std: float = 1.0, shift: float = 1.0, stratified: bool = False) -> None:
        super().__init__(shift, stratified)
        _check_positive("std", std)
        self.mean = mean
        self.std = std

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return 1000 * torch.sigmoid(self.mean + self.std * self._normal(n, generator))


class LogitNormalGrid(LogitNormal):
    """The draw of Nitro-E's training: a logit-normal floored to the ``num`` timesteps 1000, 999, ..., 1.

    u = sigmoid(normal), index = floor(u num), t = 1000 (num - index) / num: pure noise is drawn, clean data
    never. ``mean`` has the sign it has in `LogitNormal`; in the diffusers training scripts, where u counts
    from noise to data, it has the opposite one. At Nitro-E's mean of 0 the draws are the same.
    """

    def __init__(
        self, mean: float = 0.0, std: float = 1.0, shift: float = 1.0, num: int = 1000, stratified: bool = False
    ) -> None:
        super().__init__(mean, std, shift, stratified)
        _check_positive("num", num)
        self.num = num

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        u = torch.sigmoid(self.std * self._normal(n, generator) - self.mean)
        index = (u * self.num).floor().clamp(max=self.num - 1)  # u rounds to 1 far out in the tail
        return 1000 * (self.num - index) / self.num


class Uniform(TimestepSampler):
    """Uniform on (0, 1000]."""

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return 1000 * (1 - self._uniform(n, generator))


class UniformGrid(TimestepSampler):
    """Uniform on the integers ``first``..``last``; the default, 0..999, is the draw of `EpsilonDDPM`."""

    def __init__(self, first: int = 0, last: int = 999, stratified: bool = False) -> None:
        super().__init__(stratified=stratified)
        if not 0 <= first <= last <= 1000:
            raise ValueError(f"first and last must satisfy 0 <= first <= last <= 1000, but are {first} and {last}.")
        self.first = first
        self.last = last

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return self.first + (self._uniform(n, generator) * (self.last - self.first + 1)).floor()


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, but is {value}.")
