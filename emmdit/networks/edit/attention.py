"""Linear compressed attention of EDiT (arXiv 2503.16726; docs/papers.md, A1 to A3).

    queries  ReLU(to_q(ConvFusion(x)))          one for each image token
    keys     ReLU(compress_k(to_k(x)))          one for each 2 x 2 tokens
    values   compress_v(to_v(x))

    y_i = q_i (sum_j k_j^T v_j) / (q_i sum_j k_j^T)

Shapes: image tokens x (B, N, D) in row-major order; M <= N compressed keys; heads split D into d. [paper] marks what is
reported of the paper: docs/papers.md says by whom; [ours] what it leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emmdit.networks.edit.config import LinearAttentionConfig
from emmdit.networks.edit.grids import Grids, check_grids, on_grids

EPS = 1e-4  # beside the mean normalizer, which ReLU can make zero [ours: LinFusion's]


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = EPS) -> Tensor:
    """Attention with the weights q_i . k_j / sum_j q_i . k_j, in O(N d^2 + M d^2).

    Sums are in float32 under autocast, too [ours: in bf16 a sum over thousands of keys loses the small ones].

    Args:
        q: (B, heads, N, d), nonnegative. k, v: (B, heads, M, d), k nonnegative.
        eps: added to the normalizer over the mean key, so that its meaning does not depend on M.

    Returns:
        (B, heads, N, d) in the dtype of v.
    """
    with no_autocast(q):
        dtype = v.dtype
        q, k, v = q.float(), k.float(), v.float()
        k = k / k.shape[-2]
        normalizer = q @ k.sum(dim=-2).unsqueeze(-1)
        return ((q @ (k.transpose(-2, -1) @ v)) / (normalizer + eps)).to(dtype)


def no_autocast(x: Tensor) -> AbstractContextManager:
    # FLOPs are counted on the meta device, which has no autocast.
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


class ConvFusion(nn.Module):
    """x + conv_b(LeakyReLU(GroupNorm(conv_a(x)))) on the token grid: (B, N, D) -> the same (docs/papers.md, A2).

    conv_a is 3 x 3 and narrows the width, conv_b is 1 x 1 and widens it again [paper]. The branch starts at zero, hence
    the queries as the teacher's [ours].

    Args:
        ratio: width / narrowed width [ours: 8 costs about one more Linear of the block's fourteen and fits the
            published speed at 1024 px; 4 would double that].
        groups: of GroupNorm; at most, since they must divide the narrowed width [ours].
    """

    def __init__(self, dim: int, ratio: int = 8, groups: int = 32) -> None:
        super().__init__()
        narrow = max(1, dim // ratio)
        self.conv_a = nn.Conv2d(dim, narrow, 3, padding=1)
        self.norm = nn.GroupNorm(math.gcd(groups, narrow), narrow)
        self.conv_b = nn.Conv2d(narrow, dim, 1)
        nn.init.zeros_(self.conv_b.weight)
        nn.init.zeros_(self.conv_b.bias)

    def forward(self, x: Tensor, grids: Grids) -> Tensor:
        return x + on_grids(self.branch, x, grids)

    def branch(self, image: Tensor) -> Tensor:
        return self.conv_b(F.leaky_relu(self.norm(self.conv_a(image))))  # slope 0.01 [ours: torch's default]


class SpatialCompressor(nn.Module):
    """Depthwise convolution with stride on the token grid: (B, N, D) -> (B, M, D) (docs/papers.md, A3).

    3 x 3 with stride 2 [paper], zero padding, so h rows become ceil(h / 2). It starts as the average of its window
    [ours: as PixArt-Sigma's].
    """

    def __init__(self, dim: int, kernel: int = 3, stride: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel, stride, padding=(kernel - 1) // 2, groups=dim)
        nn.init.constant_(self.conv.weight, 1 / kernel**2)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, grids: Grids) -> Tensor:
        return on_grids(self.compress, x, grids)

    def compress(self, image: Tensor) -> Tensor:
        if image.device.type != "cpu":
            return self.conv(image)
        # In bfloat16 the backward of a depthwise convolution costs ten times that in float32 on a CPU (torch 2.14).
        with no_autocast(image):
            return self.conv(image.to(self.conv.weight.dtype)).to(image.dtype)


class Unchanged(nn.Module):
    """In place of ConvFusion or SpatialCompressor where an ablation leaves it out."""

    def forward(self, x: Tensor, grids: Grids) -> Tensor:
        return x


class LinearAttention(nn.Module):
    """Image self-attention of EDiT, and of MM-EDiT's image-only layers: (B, N, D) -> the same.

    Args:
        teacher: its modules by name: `to_q`, `to_k`, `to_v` (Linears), `to_out` (a Linear or a list of layers), and
            `norm_q`, `norm_k` on heads or None. They are shared with the student, not copied.
        heads: number of heads.
        config: which parts stand before and behind the projections.
    """

    def __init__(self, teacher: Mapping[str, nn.Module | None], heads: int, config: LinearAttentionConfig) -> None:
        super().__init__()
        self.heads = heads
        for name, module in teacher.items():
            if isinstance(module, nn.ModuleList):
                module = nn.Sequential(*module)
            # The teacher's norm of queries and keys holds in the linear part, too [ours].
            self.add_module(name, nn.Identity() if module is None and name.startswith("norm_") else module)
        dim, inner = self.to_k.in_features, self.to_k.out_features
        self.fuse_q = ConvFusion(dim) if config.query == "conv_fusion" else Unchanged()
        self.fuse_k = ConvFusion(dim) if config.key == "conv_fusion" else Unchanged()
        self.compress_k = SpatialCompressor(inner) if config.key == "compressor" else Unchanged()
        self.compress_v = SpatialCompressor(inner) if config.value == "compressor" else Unchanged()

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, *, grids: Grids
    ) -> Tensor:
        """Called as a diffusers attention layer, with the layout of the tokens; there is no mask of image tokens."""
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("Linear self-attention takes image tokens only, without a mask.")
        check_grids(hidden_states.shape[1], grids)
        q = self.queries(hidden_states, grids)
        k = self.keys(hidden_states, grids)
        v = self.values(hidden_states, grids)
        y = linear_attention(F.relu(q), F.relu(k), v)
        return self.to_out(merge_heads(y))

    def queries(self, x: Tensor, grids: Grids) -> Tensor:
        """(B, N, D) -> (B, heads, N, d), before ReLU."""
        return self.norm_q(self.split_heads(self.to_q(self.fuse_q(x, grids))))

    def keys(self, x: Tensor, grids: Grids) -> Tensor:
        """(B, N, D) -> (B, heads, M, d), before ReLU."""
        return self.norm_k(self.split_heads(self.compress_k(self.to_k(self.fuse_k(x, grids)), grids)))

    def values(self, x: Tensor, grids: Grids) -> Tensor:
        """(B, N, D) -> (B, heads, M, d)."""
        return self.split_heads(self.compress_v(self.to_v(x), grids))

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, heads, N, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, D)."""
    return x.transpose(1, 2).flatten(2)
