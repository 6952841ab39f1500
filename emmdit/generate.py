"""Text to image with any denoiser: the one place where text, guidance, sampler and codec meet."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emmdit.encoders import ImageCodec, TextConditioner
from emmdit.flow import SAMPLERS, Path, Predict, State, classifier_free_guidance, schedule, trajectory
from emmdit.seeding import generator
from emmdit.types import Condition

LARGEST_SIDE, MOST_STEPS = 16384, 10_000  # pixels, network evaluations


@dataclass(frozen=True)
class Sampling:
    """How images are generated; defaults are those of the released model (20 Euler steps, guidance 4.5).

    Args:
        steps: network evaluations (times two with guidance; Heun takes nearly twice as many). None: as many as the
            schedule lists, 20 if it is a name.
        guidance: classifier-free guidance scale; 1 turns it off.
        guidance_interval: timesteps (low, high) on the 0..1000 scale in which guidance acts.
        sampler: euler, heun or dpm_solver.
        schedule: flow_match_euler (the released one), uniform, ddpm, or a list of falling timesteps on the 0..1000
            scale, such as [1000, 750, 500, 250]; see `emmdit.flow.schedule`.
        shift: timestep shift of a named schedule.
        height, width: in pixels; None: the network's own size.
    """

    steps: int | None = None
    guidance: float = 4.5
    guidance_interval: tuple[float, float] = (0.0, 1000.0)
    sampler: str = "euler"
    schedule: list[float] | str = "flow_match_euler"  # this order: a list given on the command line is no name
    shift: float = 1.0
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for values that no image can be made with; `steps` by `timesteps`."""
        for name in ("height", "width"):
            side = getattr(self, name)
            if side is not None and (type(side) is not int or not 1 <= side <= LARGEST_SIDE):
                raise ValueError(f"{name} is {side!r}: give a whole number of pixels from 1 to {LARGEST_SIDE:,}.")
        if not (_finite(self.guidance) and _finite(self.shift)):
            raise ValueError(f"guidance {self.guidance!r} and shift {self.shift!r} must be finite numbers.")
        interval = self.guidance_interval
        if not (isinstance(interval, Sequence) and len(interval) == 2 and all(map(_finite, interval))):
            raise ValueError(f"guidance_interval must be two timesteps, not {interval!r}.")
        if not (self.steps is None or (type(self.steps) is int and 1 <= self.steps <= MOST_STEPS)):
            raise ValueError(f"steps is {self.steps!r}: give a whole number from 1 to {MOST_STEPS:,}.")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"There is no sampler {self.sampler!r}: choose one of {', '.join(SAMPLERS)}.")
        listed = self.schedule if isinstance(self.schedule, list | tuple) else []
        if not (isinstance(self.schedule, str) or listed) or not all(map(_finite, listed)):
            raise ValueError(f"schedule must be a name or a list of timesteps, not {self.schedule!r}.")
        object.__setattr__(self, "steps", len(self.timesteps()) - 1)

    def timesteps(self) -> Tensor:
        return schedule(self.steps, self.schedule, self.shift)

    def replace(self, **settings: Any) -> Sampling:
        """A copy with other settings; a listed schedule brings its own number of steps."""
        if not isinstance(settings.get("schedule", ""), str):
            settings = {"steps": None, **settings}
        return dataclasses.replace(self, **settings)


def _finite(number: Any) -> bool:
    return isinstance(number, int | float) and math.isfinite(number)


def check_finite(images: Tensor, prompts: list[str], seeds: list[int]) -> Tensor:
    """`images` (B, ...) of these prompts, all finite. Raises ValueError that names the first one which is not."""
    for i in (~images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist():
        raise ValueError(
            f"The image of {prompts[i][:80]!r} with seed {seeds[i]} is not finite: the model overflows, or its weights "
            "are damaged; use --dtype float32 or bfloat16, an earlier checkpoint, or a lower guidance."
        )
    return images


def initial_noise(seeds: list[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """(len(seeds), *shape): each image's noise is a function of its own seed, whatever the batch or device."""
    noise = [torch.randn(shape, generator=generator(seed, "sample", 0)) for seed in seeds]
    return torch.stack(noise).to(device)


@torch.no_grad()
def generate(
    network: nn.Module,
    codec: ImageCodec,
    text: TextConditioner,
    prompts: list[str],
    seeds: list[int],
    path: Path,
    sampling: Sampling,
    device: torch.device | str = "cpu",
    callback: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1], one for each prompt and seed; arguments as for `generate_trajectory`.

    An image whose latents are not finite is NaN.

    >>> images = generate(network, DCTCodec(), ShapesText(), ["a photo of a star"], [0], RectifiedFlow(), Sampling())

    Args:
        callback: called as `callback(i, n)` after step i of n.
    """
    latents = generate_latents(network, codec, text, prompts, seeds, path, sampling, device, callback)
    broken = ~latents.isfinite().flatten(1).all(1)
    return codec.decode(latents).masked_fill_(broken.view(-1, 1, 1, 1), torch.nan)  # decoders clamp what is infinite


@torch.no_grad()
def generate_latents(
    network: nn.Module,
    codec: ImageCodec,
    text: TextConditioner,
    prompts: list[str],
    seeds: list[int],
    path: Path,
    sampling: Sampling,
    device: torch.device | str = "cpu",
    callback: Callable[[int, int], None] | None = None,
) -> Tensor:
    """What `generate` decodes: latents (B, C, h, w), float32."""
    for i, _, x, _ in generate_trajectory(network, codec, text, prompts, seeds, path, sampling, device):
        latents = x
        if callback is not None and i > 0:
            callback(i, sampling.steps)
    return latents


def generate_trajectory(
    network: nn.Module,
    codec: ImageCodec,
    text: TextConditioner,
    prompts: list[str],
    seeds: list[int],
    path: Path,
    sampling: Sampling,
    device: torch.device | str = "cpu",
) -> Iterator[State]:
    """All states (i, t, x, prediction) from noise to latents, as the sampler yields them; gradients as they are set.

    Args:
        network: a denoiser on `device`; other arguments move there.
        codec: gives the shape of the latents.
        prompts, seeds: one of each for an image.

    Raises:
        ValueError: unequal numbers of prompts and seeds, or a size that the codec or the network cannot make.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"Each prompt needs a seed: got {len(prompts)} prompts and {len(seeds)} seeds.")
    height, width = image_size(network, codec, sampling)
    shape = (codec.latent_channels, height // codec.downsample, width // codec.downsample)
    dtype = next(network.parameters()).dtype  # half precision: inputs in it too; under autocast this is float32

    def denoise(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return network(x.to(dtype), timestep=t, **condition).sample[:, : x.shape[1]]  # without a predicted variance

    predict = predictor(denoise, text, prompts, sampling, device, dtype)
    return trajectory(predict, initial_noise(seeds, shape, device), path, sampling.timesteps(), sampling.sampler)


def image_size(network: nn.Module, codec: ImageCodec, sampling: Sampling) -> tuple[int, int]:
    """Height and width of the images in pixels. ValueError for sides that the codec cannot make."""
    side = network.config.sample_size * codec.downsample
    height = side if sampling.height is None else sampling.height
    width = side if sampling.width is None else sampling.width
    if max(height, width) > LARGEST_SIDE:
        raise ValueError(f"Images of {height:,} x {width:,} are larger than {LARGEST_SIDE:,}: give height and width.")
    if height % codec.downsample or width % codec.downsample:
        raise ValueError(
            f"Images of {height} x {width} do not fit the codec: both sides must be divisible by {codec.downsample}."
        )
    return height, width


def predictor(
    denoise: Callable[[Tensor, Tensor, Condition], Tensor],
    text: TextConditioner,
    prompts: list[str],
    sampling: Sampling,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Predict:
    """`denoise` for these prompts, with the guidance of `sampling`; conditions on `device`, in `dtype`."""
    condition, null = (
        {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in part.items()}
        for part in (text(prompts), text.null(len(prompts)))
    )
    return classifier_free_guidance(denoise, condition, null, sampling.guidance, tuple(sampling.guidance_interval))
