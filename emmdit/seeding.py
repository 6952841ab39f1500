"""Random generators as a function of (seed, purpose, samples seen): a resume needs no saved random state.

Every process seeds the same generator and draws for the whole global batch, then keeps its own rows: one
device and N ranks, or a run and its resume on another number of ranks, train on the same noise and timesteps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def digest(seed: int, purpose: str, position: int) -> int:
    """64 random bits for one purpose at one position: `digest(...) / 2**64` is uniform in [0, 1)."""
    key = f"{int(seed)}|{purpose}|{int(position)}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def generator(seed: int, purpose: str, position: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one purpose ("noise", "timesteps", "dropout", ...) at one position.

    Args:
        seed: the run's seed.
        purpose: keeps uses apart that share seed and position.
        position: samples seen (or a sample's own index, where something belongs to the sample).
        device: CPU numbers are the same on every machine; those of an accelerator are faster and its own.
            (torch's CPU generator reads only 32 bits of the seed: among 100,000 steps about one pair shares
            its noise. Harmless.)
    """
    return torch.Generator(device).manual_seed(digest(seed, purpose, position) & (2**63 - 1))


def step_noise(
    shape: Sequence[int],
    rows: slice | Sequence[int] | Tensor,
    n_global: int,
    generator: torch.Generator,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise (len(rows), *shape), float32, for ``rows`` of a batch of ``n_global``.

    >>> noise = step_noise(x0.shape[1:], rows, n_global, generator(seed, "noise", samples_seen), x0.device)

    All (n_global, *shape) numbers are drawn, on the generator's device, whichever rows are asked for; the
    rows are then moved to ``device`` if given.
    """
    noise = torch.randn(n_global, *shape, generator=generator, device=generator.device)[rows]
    return noise if device is None else noise.to(device)
