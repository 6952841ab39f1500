"""Layout of tokens in rows and columns, which convolutions in attention need.

A sequence may hold several grids one after the other (E-MMDiT's compressed tokens: one for each ratio), so a layout is
a tuple of (height, width), each grid in row-major order. It is passed with every call and kept nowhere: the layout of
one forward pass cannot leak into another, be it a second resolution or a recomputation under activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Grids = tuple[tuple[int, int], ...]


def check_grids(tokens: int, grids: Grids) -> None:
    """Raise a ValueError when `tokens` are not the tokens of `grids`."""
    expected = sum(height * width for height, width in grids)
    if tokens != expected:
        layout = " + ".join(f"{height} x {width}" for height, width in grids)
        raise ValueError(f"Attention got {tokens} image tokens, but the grid {layout} has {expected}: they must agree.")


def on_grids(function: Callable[[Tensor], Tensor], x: Tensor, grids: Grids) -> Tensor:
    """Apply a map (B, D, h, w) -> (B, D', h', w') to each grid of tokens (B, N, D) -> (B, N', D')."""
    check_grids(x.shape[1], grids)
    # Views in channels-last layout: nothing is copied on either side. By transpose and then unflatten, a batch of one
    # would get strides that convolutions take for channels first; a split of one part costs a copy in the backward.
    sizes = [height * width for height, width in grids]
    parts = x.split(sizes, dim=1) if len(grids) > 1 else [x]
    images = [part.unflatten(1, grid).permute(0, 3, 1, 2) for part, grid in zip(parts, grids, strict=True)]
    tokens = [function(image).flatten(2).transpose(1, 2) for image in images]
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)
