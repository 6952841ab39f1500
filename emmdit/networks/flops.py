"""How much work a network is: counted on the meta device, where nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(network: Callable[[], nn.Module], latents: Sequence[int], condition: Mapping[str, Tensor]) -> int:
    """FLOPs (2 x multiply-add of matrix products and attention) of one forward pass.

    Args:
        network: makes the network; called on the meta device.
        latents: (B, C, H, W).
        condition: its keyword tensors; only shapes and types are used.
    """
    with torch.device("meta"):
        denoiser = network()
        hidden_states, timestep = torch.empty(*latents), torch.empty(latents[0])
    keywords = {key: torch.empty_like(value, device="meta") for key, value in condition.items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(hidden_states, timestep=timestep, **keywords)
    return counter.get_total_flops()
