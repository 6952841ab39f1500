"""Linear compressed attention of EDiT (arXiv 2503.16726, section 3; papers.md A1-A3).

    queries  ReLU(to_q(ConvFusion(x)))          one for each image token
    keys     ReLU(compress_k(to_k(x)))          one for each 2 x 2 tokens
    values   compress_v(to_v(x))

    y_i = q_i (sum_j k_j^T v_j) / (q_i sum_j k_j^T)

Shapes: image tokens `x (B, N, D)` in row-major order, N of them; M <= N compressed keys; heads split D into d.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emmdit.networks.edit.baselines import TokenMLP
from emmdit.networks.edit.config import AttentionChoices
from emmdit.networks.edit.grids import Grids, check_grids, on_grids
from emmdit.networks.emmdit.layers import attention

# -- maths -------------------------------------------------------------------------------------------


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-4, float32: bool = True) -> tuple[Tensor, Tensor]:
    """Attention with weights q_i . k_j, in O(N d^2 + M d^2).

    Args:
        q: (B, heads, N, d), not negative. k, v: (B, heads, M, d), k not negative.
        eps: added to the mean normaliser, so that its meaning does not depend on M.
        float32: sums in float32, also under autocast.

    Returns:
        y (B, heads, N, d) in the dtype of v, and the mean normaliser z_i = q_i . mean_j k_j, (B, heads, N, 1).
    """
    with _no_autocast(q) if float32 else nullcontext():
        dtype = v.dtype
        if float32:
            q, k, v = q.float(), k.float(), v.float()
        k = k / k.shape[-2]
        normaliser = q @ k.sum(dim=-2).unsqueeze(-1)
        y = (q @ (k.transpose(-2, -1) @ v)) / (normaliser + eps)
        return y.to(dtype), normaliser


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention that also gives the log of its normaliser, log sum_j exp(q_i . k_j / sqrt d), (B, heads, N, 1).

    The fused kernels keep that number to themselves, so the scores are computed here: O(N M) memory.
    """
    with _no_autocast(q):
        scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return (scores.softmax(dim=-1) @ v.float()).to(v.dtype), scores.logsumexp(dim=-1, keepdim=True)


def _no_autocast(x: Tensor) -> AbstractContextManager:
    # FLOPs are counted on the meta device, which knows no autocast.
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


# -- parts -------------------------------------------------------------------------------------------


class ConvFusion(nn.Module):
    """x + conv_b(LeakyReLU(GroupNorm(conv_a(x)))) on the token grid: (B, N, D) -> the same (papers.md A2).

    conv_a is dense, k x k, and narrows the width by `ratio`; conv_b is 1x1 and widens it again. Form "v1" has the
    activation before the norm.
    """

    def __init__(self, dim: int, choices: AttentionChoices) -> None:
        super().__init__()
        middle = max(1, dim // choices.conv_fusion_ratio)
        k = choices.conv_fusion_kernel
        self.conv_a = nn.Conv2d(dim, middle, k, padding=k // 2)
        self.norm = nn.GroupNorm(math.gcd(choices.conv_fusion_groups, middle), middle)
        self.conv_b = nn.Conv2d(middle, dim, 1)
        self.norm_first = choices.conv_fusion_form == "v2"
        self.negative_slope = choices.negative_slope
        if choices.zero_init:
            nn.init.zeros_(self.conv_b.weight)
            nn.init.zeros_(self.conv_b.bias)

    def forward(self, x: Tensor, grids: Grids) -> Tensor:
        return x + on_grids(self._branch, x, grids)

    def _branch(self, image: Tensor) -> Tensor:
        image = self.conv_a(image)
        if self.norm_first:
            image = F.leaky_relu(self.norm(image), self.negative_slope)
        else:
            image = self.norm(F.leaky_relu(image, self.negative_slope))
        return self.conv_b(image)


class SpatialCompressor(nn.Module):
    """Depthwise convolution with stride on the token grid: (B, N, D) -> (B, M, D) (papers.md A3).

    Odd kernels are padded with zeros and give ceil(h / stride) rows; even ones (PixArt-Sigma's 2 x 2) get as many by
    repeating the last row or column where the stride does not divide it.
    """

    def __init__(self, dim: int, choices: AttentionChoices) -> None:
        super().__init__()
        k, self.stride = choices.compressor_kernel, choices.compressor_stride
        self.conv = nn.Conv2d(dim, dim, k, self.stride, padding=(k - 1) // 2, groups=dim)
        self.norm = nn.LayerNorm(dim) if choices.compressor_norm else None
        nn.init.zeros_(self.conv.bias)
        with torch.no_grad():
            if choices.compressor_init == "average":
                self.conv.weight.fill_(1 / k**2)
            else:
                self.conv.weight.zero_()
                self.conv.weight[:, :, (k - 1) // 2, (k - 1) // 2] = 1

    def forward(self, x: Tensor, grids: Grids) -> Tensor:
        x = on_grids(self._compress, x, grids)
        return x if self.norm is None else self.norm(x)

    def _compress(self, image: Tensor) -> Tensor:
        if self.conv.kernel_size[0] % 2 == 0:
            height, width = image.shape[2:]
            image = F.pad(image, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")
        if image.device.type != "cpu":
            return self.conv(image)
        # In bfloat16 the backward of a depthwise convolution costs ten times that in float32 on a CPU (torch 2.14).
        with _no_autocast(image):
            return self.conv(image.to(self.conv.weight.dtype)).to(image.dtype)


def input_map(kind: str, dim: int, choices: AttentionChoices) -> nn.Module | None:
    """What tokens go through before a projection."""
    if kind == "conv_fusion":
        return ConvFusion(dim, choices)
    return TokenMLP(dim, choices.negative_slope, choices.zero_init) if kind == "mlp" else None


# -- attention ---------------------------------------------------------------------------------------


class LinearAttention(nn.Module):
    """Image self-attention of EDiT, and of MM-EDiT's second attention: (B, N, D) -> the same.

    Args:
        teacher: its projections by name: `to_q`, `to_k`, `to_v` (Linears), `to_out` (a Linear or a list of layers), and
            `norm_q`, `norm_k` on heads or None. They are taken over, not copied.
        heads: number of heads.
        choices: see there.
    """

    def __init__(self, teacher: Mapping[str, nn.Module | None], heads: int, choices: AttentionChoices) -> None:
        super().__init__()
        self.heads, self.choices = heads, choices
        for name, module in teacher.items():
            self.add_module(name, module)
        dim = self.to_k.in_features
        if choices.query == "conv_fusion" and choices.conv_fusion_form == "v1":
            self.to_q = None
        self.fuse_q = input_map(choices.query, dim, choices)
        self.fuse_k = input_map(choices.key, dim, choices)
        self.compress_k, self.compress_v = None, None
        if choices.key == "compressor":
            self.compress_k = SpatialCompressor(self.to_k.out_features, choices)
            if not choices.compressor_shared:
                self.compress_v = SpatialCompressor(self.to_v.out_features, choices)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        *,
        grids: Grids,
    ) -> Tensor:
        """The call of a diffusers attention layer, and the layout of the tokens; there is nothing to mask."""
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("Linear self-attention takes image tokens only, without a mask.")
        check_grids(hidden_states.shape[1], grids)
        q = self.queries(hidden_states, grids)
        k, v = self.compress(*self.keys_values(hidden_states, grids), grids)
        y, _ = self.image_to_image(q, self.split(k), self.split(v))
        return self.project(self.to_out, y)

    # The steps, which the joint form shares.

    def queries(self, x: Tensor, grids: Grids) -> Tensor:
        """(B, heads, N, d), before norm and kernel."""
        x = x if self.fuse_q is None else self.fuse_q(x, grids)
        return self.split(x if self.to_q is None else self.to_q(x))

    def keys_values(self, x: Tensor, grids: Grids) -> tuple[Tensor, Tensor]:
        """Two of (B, N, D), before compression."""
        return self.to_k(x if self.fuse_k is None else self.fuse_k(x, grids)), self.to_v(x)

    def compress(self, k: Tensor, v: Tensor, grids: Grids) -> tuple[Tensor, Tensor]:
        """(B, N, D) -> (B, M, D), both."""
        if self.compress_k is None:
            return k, v
        compress_v = self.compress_k if self.compress_v is None else self.compress_v
        return self.compress_k(k, grids), compress_v(v, grids)

    def image_to_image(self, q: Tensor, k: Tensor, v: Tensor, normaliser: bool = False) -> tuple[Tensor, Tensor | None]:
        """Heads of queries, keys (before norm and kernel) and values -> output and, where wanted, the log of the sum
        over all keys that it was divided by, (B, heads, N, 1)."""
        if self.normalises:
            q, k = normed(self.norm_q, q), normed(self.norm_k, k)
        return self.normed_image_to_image(q, k, v, normaliser)

    @property
    def normalises(self) -> bool:
        """Whether the teacher's norm of queries and keys holds among image tokens."""
        return self.choices.qk_norm or self.choices.kernel == "softmax"

    def normed_image_to_image(self, q: Tensor, k: Tensor, v: Tensor, normaliser: bool) -> tuple[Tensor, Tensor | None]:
        """The same for queries and keys behind their norm, which the joint form needs elsewhere too."""
        choices = self.choices
        if choices.kernel == "softmax":
            return softmax_attention(q, k, v) if normaliser else (attention(q, k, v), None)
        y, z = linear_attention(self.kernel(q), self.kernel(k), v, choices.eps, choices.float32)
        if not normaliser:
            return y, None
        # On the scale of the softmax scores, so that the two normalisers can be compared: q . k / sqrt d.
        return y, (z + choices.eps).log() + math.log(k.shape[-2]) - math.log(q.shape[-1]) / 2

    def kernel(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1 if self.choices.kernel == "elu" else F.relu(x)

    def split(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, heads, N, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    @staticmethod
    def project(layers: nn.Module, y: Tensor) -> Tensor:
        """Heads (B, heads, N, d) -> (B, N, D) through a Linear, or through a list of layers as in diffusers."""
        y = y.transpose(1, 2).flatten(2)
        for layer in layers if isinstance(layers, nn.ModuleList) else [layers]:
            y = layer(y)
        return y


def normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)
