"""Building blocks of E-MMDiT: positions, modulation, subregions, joint attention (docs/papers.md, B2, B5, B6).

Shapes throughout: image tokens `x (B, N, D)`, text tokens `c (B, T, D)`, `N = H * W` in row-major order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Modulation = Literal["affine", "single", "zero"]
Subregion = Literal["full", "strided", "chunked"]


# -- positions ---------------------------------------------------------------------------------------


def sincos_2d(size: int, dim: int, spacing: float) -> Tensor:
    """Fixed sine-cosine table `(size, size, dim)` for a square grid with `spacing` between neighbors.

    The first half of the channels codes the column, the second half the row; each half is [sin, cos] over
    `dim / 4` frequencies 10000^(-k / (dim/4)). Computed in float64, returned in float32.
    """
    if dim % 4:
        raise ValueError(f"The width must be divisible by 4 for a 2D sine-cosine table, got {dim}.")
    frequencies = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4.0))
    angles = (torch.arange(size, dtype=torch.float64) * spacing)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (size, dim / 2)
    columns = axis[None, :, :].expand(size, size, -1)
    rows = axis[:, None, :].expand(size, size, -1)
    return torch.cat([columns, rows], dim=-1).float()


def timestep_features(timestep: Tensor, dim: int = 256) -> Tensor:
    """Sinusoidal features `(B, dim)`, [cos, sin], of a timestep on the 0..1000 scale; always float32."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=timestep.device, dtype=torch.float32))
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """timestep (B,) -> (B, D): sinusoid 256, Linear, SiLU, Linear."""

    def __init__(self, dim: int, frequency_dim: int = 256) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.linear_1 = nn.Linear(frequency_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, timestep: Tensor) -> Tensor:
        features = timestep_features(timestep, self.frequency_dim).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(features)))


# -- modulation --------------------------------------------------------------------------------------


class AdaLN(nn.Module):
    """One stream's modulation of one block: -> six (B, 1, D): shift, scale, gate for attention, then for the FF.

    - `affine` (E-MMDiT): learned `bias + t * (1 + scale)`, `t (B, 6, D)` shared by all blocks.
    - `single` (PixArt): `bias + t`.
    - `zero` (DiT): an own Linear on SiLU of the time embedding `(B, D)`, initialized to zero.
    """

    def __init__(self, dim: int, kind: Modulation) -> None:
        super().__init__()
        self.kind = kind
        if kind == "zero":
            self.linear = nn.Linear(dim, 6 * dim)
        else:
            self.bias = nn.Parameter(torch.randn(6, dim) / dim**0.5)
            if kind == "affine":
                self.scale = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(self, time: Tensor) -> tuple[Tensor, ...]:
        if self.kind == "zero":
            modulation = self.linear(F.silu(time)).unflatten(1, (6, -1))
        elif self.kind == "single":
            modulation = self.bias + time
        else:
            modulation = self.bias + time * (1 + self.scale)
        return modulation.chunk(6, dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


# -- subregions --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subregions:
    """How Alternating Subregion Attention cuts a token sequence into `groups` (docs/papers.md, B5).

    `strided` puts token i into group i mod G; `chunked` puts runs of `run` tokens in turn into the groups.
    """

    kind: Subregion = "full"
    groups: int = 4
    run: int = 4

    @property
    def _layout(self) -> tuple[int, int]:
        return (self.groups, self.run) if self.kind == "chunked" else (self.groups, 1)

    @property
    def multiple(self) -> int:
        """What a token count must be divisible by."""
        groups, run = self._layout
        return 1 if self.kind == "full" else groups * run

    def split(self, x: Tensor) -> Tensor:
        """(B, N, ...) -> (B * G, N / G, ...)."""
        if self.kind == "full":
            return x
        groups, run = self._layout
        x = x.unflatten(1, (-1, groups, run)).movedim(2, 1)  # (B, G, N / (G run), run, ...)
        return x.flatten(2, 3).flatten(0, 1)

    def merge(self, x: Tensor) -> Tensor:
        """The inverse of `split`: (B * G, N / G, ...) -> (B, N, ...)."""
        if self.kind == "full":
            return x
        groups, run = self._layout
        x = x.unflatten(0, (-1, groups)).unflatten(2, (-1, run)).movedim(1, 2)
        return x.flatten(1, 3)


# -- attention and feed-forward ----------------------------------------------------------------------


class HeadNorm(nn.RMSNorm):
    """RMS norm of each head in the precision of its weight: float32 under mixed precision, where torch's own would
    leave the fused kernel because input and weight differ."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.eps)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention, (B, heads, N, d) -> the same."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class JointAttention(nn.Module):
    """Softmax attention over image and text tokens together, each stream with its own weights.

    Per-head RMS norm on queries and keys of both streams; image tokens come first. With subregions,
    group g of the image attends with group g of the text only.

    Args:
        context_pre_only: the text only serves as keys, values and (unused) queries; no text output.
    """

    def __init__(
        self, dim: int, heads: int, subregions: Subregions = Subregions(), context_pre_only: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.subregions = subregions
        self.context_pre_only = context_pre_only
        head_dim = dim // heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (HeadNorm(head_dim) for _ in range(4))
        self.to_out = nn.Linear(dim, dim)
        self.to_add_out = None if context_pre_only else nn.Linear(dim, dim)
        self.to_qkv: nn.Linear | None = None  # set by fuse()
        self.to_added_qkv: nn.Linear | None = None

    def forward(self, x: Tensor, c: Tensor, context_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x (B, N, D), c (B, T, D), context_mask (B, T) True where text may be attended -> the same shapes."""
        image = self._qkv(x, self.to_qkv, (self.to_q, self.to_k, self.to_v), self.norm_q, self.norm_k)
        linears = self.add_q_proj, self.add_k_proj, self.add_v_proj
        text = self._qkv(c, self.to_added_qkv, linears, self.norm_added_q, self.norm_added_k)
        q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(image, text, strict=True))
        image_tokens, mask = image[0].shape[1], None
        if context_mask is not None:
            mask = F.pad(self.subregions.split(context_mask), (image_tokens, 0), value=True)[:, None, None, :]
        out = attention(q, k, v, mask).transpose(1, 2).flatten(2)  # (B', N' + T', D) of (B', heads, N' + T', head_dim)
        x = self.to_out(self.subregions.merge(out[:, :image_tokens]))
        if self.to_add_out is None:
            return x, None
        return x, self.to_add_out(self.subregions.merge(out[:, image_tokens:]))

    def _qkv(self, x: Tensor, fused: nn.Linear | None, linears, norm_q: HeadNorm, norm_k: HeadNorm) -> list[Tensor]:
        """One stream's tokens (B, N, D) -> queries, keys and values of each subregion, (B', N', heads, head_dim)."""
        q, k, v = fused(x).chunk(3, -1) if fused else (linear(x) for linear in linears)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        return [self.subregions.split(t) for t in (norm_q(q), norm_k(k), v)]

    @torch.no_grad()
    def fuse(self) -> None:
        """Merge the three projections of each stream into one matrix product (inference)."""
        self.to_qkv = _concatenate(self.to_q, self.to_k, self.to_v)
        self.to_added_qkv = _concatenate(self.add_q_proj, self.add_k_proj, self.add_v_proj)

    def unfuse(self) -> None:
        self.to_qkv = self.to_added_qkv = None


def _concatenate(*linears: nn.Linear) -> nn.Linear:
    fused = nn.Linear(linears[0].in_features, sum(linear.out_features for linear in linears), device="meta")
    fused.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    fused.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    return fused


class MLP(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, in_dim: int, hidden_dim: int, dim: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(in_dim, hidden_dim)
        self.proj_out = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(F.gelu(self.proj_in(x), approximate="tanh"))


class EMMDiTBlock(nn.Module):
    """One joint block: x, c -> x, c. With `context_pre_only` (the last block) the text ends here: -> x, None."""

    def __init__(
        self,
        dim: int,
        heads: int,
        ff_ratio: float,
        modulation: Modulation,
        subregions: Subregions,
        context_pre_only: bool = False,
    ) -> None:
        super().__init__()
        ff_dim = round(dim * ff_ratio)  # a ratio read off a file may lie just below a whole number of channels
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.norm1_context = nn.LayerNorm(dim, eps=1e-5)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = AdaLN(dim, modulation)
        self.attn = JointAttention(dim, heads, subregions, context_pre_only)
        self.ff = MLP(dim, ff_dim, dim)
        self.modulation_context = None if context_pre_only else AdaLN(dim, modulation)
        self.ff_context = None if context_pre_only else MLP(dim, ff_dim, dim)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        time: Tensor,
        context_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, N, D), c (B, T, D), time (B, 6, D) or, for `zero` modulation, (B, D).

        `attention_kwargs` goes to the attention: none for `JointAttention`, the grids for a linearized one."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.modulation(time)
        c_normed = self.norm1_context(c)
        if self.modulation_context is not None:
            c_shift, c_scale, c_gate, c_ff_shift, c_ff_scale, c_ff_gate = self.modulation_context(time)
            c_normed = modulate(c_normed, c_shift, c_scale)

        x_normed = modulate(self.norm1(x), shift, scale)
        attended, c_attended = self.attn(x_normed, c_normed, context_mask, **attention_kwargs or {})
        x = torch.addcmul(x, gate, attended)
        x = torch.addcmul(x, ff_gate, self.ff(modulate(self.norm2(x), ff_shift, ff_scale)))
        if self.modulation_context is None:
            return x, None
        c = torch.addcmul(c, c_gate, c_attended)
        c = torch.addcmul(c, c_ff_gate, self.ff_context(modulate(self.norm2(c), c_ff_shift, c_ff_scale)))
        return x, c
