"""Multi-path token compression and its inverse (docs/papers.md, B3).

The 1x1 convolutions of the released network are Linears on tokens here: the same product, one reshape less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from emmdit.networks.emmdit.layers import MLP


def unshuffle(x: Tensor, height: int, width: int, ratio: int) -> Tensor:
    """Tokens (B, H*W, D) -> (B, H*W / r^2, D r^2), channels ordered as in `nn.PixelUnshuffle`."""
    x = x.unflatten(1, (height // ratio, ratio, width // ratio, ratio))  # B, h, r, w, r, D
    return x.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)


def shuffle(x: Tensor, height: int, width: int, ratio: int) -> Tensor:
    """The inverse of `unshuffle`; `height` and `width` are those of the large grid."""
    x = x.unflatten(2, (-1, ratio, ratio)).unflatten(1, (height // ratio, width // ratio))  # B, h, w, D, r, r
    return x.permute(0, 1, 4, 2, 5, 3).flatten(1, 4)


class TokenCompressor(nn.Module):
    """(B, N, D) -> (B, sum of N / r^2 over the ratios, D): every path reads the same full-resolution tokens."""

    def __init__(self, dim: int, ratios: Sequence[int]) -> None:
        super().__init__()
        self.ratios = tuple(ratios)
        self.paths = nn.ModuleList(MLP(dim * ratio**2, dim, dim) for ratio in ratios)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return torch.cat(
            [path(unshuffle(x, height, width, r)) for r, path in zip(self.ratios, self.paths, strict=True)], dim=1
        )


class TokenReconstructor(nn.Module):
    """Compressed tokens and the skip (B, N, D) from before compression -> (B, N, D)."""

    def __init__(self, dim: int, ratios: Sequence[int]) -> None:
        super().__init__()
        self.ratios = tuple(ratios)
        self.paths = nn.ModuleList(MLP(dim // ratio**2, dim, dim) for ratio in ratios)
        self.merge = MLP(dim * (len(self.ratios) + 1), dim, dim)

    def forward(self, x: Tensor, skip: Tensor, height: int, width: int) -> Tensor:
        parts = x.split([height * width // r**2 for r in self.ratios], dim=1)
        paths = [
            path(shuffle(part, height, width, r)) for r, path, part in zip(self.ratios, self.paths, parts, strict=True)
        ]
        return self.merge(torch.cat([*paths, skip], dim=-1))
