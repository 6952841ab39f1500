"""Prompts to images with any denoiser: the one place where text, guidance, sampler and codec meet."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emmdit.encoders import ImageCodec, TextConditioner
from emmdit.flow import Path, generator, guided, sample
from emmdit.types import Condition


@dataclass(frozen=True)
class Sampling:
    """How pictures are made; defaults are those of the released model (20 Euler steps, guidance 4.5).

    Args:
        steps: number of network evaluations (times two with guidance; Heun takes nearly twice as many).
        guidance: classifier-free guidance scale; 1 turns it off.
        guidance_interval: timesteps (low, high) on the 0..1000 scale in which guidance acts.
        sampler: euler, heun or dpm_solver.
        grid: nitro (the released grid: 1000 to 1, then 0) or uniform.
        shift: timestep shift of the grid.
        height, width: in pixels; None: the network's own size.
    """

    steps: int = 20
    guidance: float = 4.5
    guidance_interval: tuple[float, float] = (0.0, 1000.0)
    sampler: str = "euler"
    grid: str = "nitro"
    shift: float = 1.0
    height: int | None = None
    width: int | None = None

    def replace(self, **settings) -> Sampling:
        return dataclasses.replace(self, **settings)


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
    callback=None,
) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1], one for each prompt and seed.

    Raises:
        ValueError: unequal numbers of prompts and seeds, or a size that codec or network can not make.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"Each prompt needs a seed: got {len(prompts)} prompts and {len(seeds)} seeds.")
    latents = codec.downsample
    side = network.config.sample_size * latents
    height, width = sampling.height or side, sampling.width or side
    if height % latents or width % latents:
        raise ValueError(f"Pictures of {height} x {width} do not fit the codec: both sides must divide by {latents}.")
    shape = (codec.latent_channels, height // latents, width // latents)

    def denoise(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return network(x.to(dtype), timestep=t, **condition).sample[:, : x.shape[1]]

    # A network in half precision gets its inputs in it; under autocast its weights are float32.
    dtype = next(network.parameters()).dtype
    condition, null = (
        {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in part.items()}
        for part in (text(prompts), text.null(len(prompts)))
    )
    x = sample(
        guided(denoise, condition, null, sampling.guidance, tuple(sampling.guidance_interval)),
        initial_noise(seeds, shape, device),
        path,
        steps=sampling.steps,
        sampler=sampling.sampler,
        grid=sampling.grid,
        shift=sampling.shift,
        callback=callback,
    )
    return codec.decode(x)
