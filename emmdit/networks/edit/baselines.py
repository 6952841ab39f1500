"""Parts that only the baselines of the papers' tables need (their choices: `attention_choices.BASELINES`)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from emmdit.networks.edit.grids import Grids, on_grids


class TokenMLP(nn.Module):
    """LinFusion's map: x + Linear(LeakyReLU(LayerNorm(Linear(x)))), (B, N, D) -> the same, each token by itself."""

    def __init__(self, dim: int, negative_slope: float = 0.01, zero_init: bool = True) -> None:
        super().__init__()
        self.proj_in = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.proj_out = nn.Linear(dim, dim)
        self.negative_slope = negative_slope
        if zero_init:
            nn.init.zeros_(self.proj_out.weight)
            nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor, grids: Grids) -> Tensor:
        """`grids` is for the interface that it shares with `ConvFusion`: tokens have no neighbours here."""
        return x + self.proj_out(F.leaky_relu(self.norm(self.proj_in(x)), self.negative_slope))


class MixFeedForward(nn.Module):
    """SANA's Mix-FFN in place of a block's feed-forward: (B, N, D) -> the same.

    1x1 convolution to twice the hidden width, SiLU, depthwise 3x3, gate of one half by SiLU of the other, 1x1 back. It
    has no counterpart in the teacher, so it starts from random weights.

    The blocks of diffusers call their feed-forward with tokens only, so the grid comes through `grids`, which a hook
    sets from the block's own arguments each time the block runs, recomputation included.
    """

    def __init__(self, dim: int, ratio: float = 2.5) -> None:
        super().__init__()
        hidden = round(dim * ratio)
        self.conv_in = nn.Conv2d(dim, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_out = nn.Conv2d(hidden, dim, 1, bias=False)
        self.grids: Grids = ()

    def forward(self, x: Tensor) -> Tensor:
        return on_grids(self._convolve, x, self.grids)

    def _convolve(self, image: Tensor) -> Tensor:
        image, gate = self.conv_depth(F.silu(self.conv_in(image))).chunk(2, dim=1)
        return self.conv_out(image * F.silu(gate))
