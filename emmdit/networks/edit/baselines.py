"""Baselines and ablations of the papers' tables, beside the paper's own form: `config.BASELINES` and `image_mix`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from emmdit.networks.edit.attention import (
    EPS,
    LinearAttention,
    SpatialCompressor,
    linear_attention,
    merge_heads,
    no_autocast,
)
from emmdit.networks.edit.config import LinearAttentionConfig
from emmdit.networks.edit.grids import Grids, check_grids, on_grids
from emmdit.networks.edit.hybrid import HybridAttention, join, mixture, softmax_attention, with_image_keys

# -- one attention over all tokens -------------------------------------------------------------------


class AllTokensAttention(HybridAttention):
    """Joint attention without the hybrid: one function `attend(q, k, v, mask)` over image and prompt tokens.

    Made of a teacher's layer without prompt projections, it is attention of image tokens among themselves.
    """

    attend: Callable[..., Tensor]

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, *, grids: Grids):
        """As `HybridAttention.forward`; without a prompt -> image rows."""
        x, c, mask = hidden_states, encoder_hidden_states, attention_mask
        check_grids(x.shape[1], grids)
        q, k, v = self.queries(x, grids), self.keys(x, grids), self.values(x, grids)
        if c is None:
            return self.to_out(merge_heads(self.attend(q, k, v, mask)))
        k_p, v_p, q_p = self.prompt_keys(c), self.prompt_values(c), self.prompt_queries(c)
        q = q if q_p is None else join(q, q_p)
        y = self.attend(q, join(k, k_p), join(v, v_p), with_image_keys(mask, k))
        image, prompt = y[..., : x.shape[1], :], y[..., x.shape[1] :, :]
        return self.to_out(merge_heads(image)), None if q_p is None else self.to_add_out(merge_heads(prompt))


class LinearJointAttention(AllTokensAttention):
    """All four parts linear."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        k = self.feature_map(k)
        if mask is not None:
            k = k * mask[:, None, :, None]
        return linear_attention(self.feature_map(q), k, v)

    def feature_map(self, x: Tensor) -> Tensor:
        return F.relu(x)


# -- LinFusion ---------------------------------------------------------------------------------------


class TokenMLP(nn.Module):
    """x + Linear(LeakyReLU(LayerNorm(Linear(x)))), (B, N, D) -> the same, each token by itself; starts as x."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.proj_out = nn.Linear(dim, dim)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor, grids: Grids) -> Tensor:
        return x + self.proj_out(F.leaky_relu(self.norm(self.proj_in(x))))


class LinFusionAttention(LinearJointAttention):
    """LinFusion's token maps and feature map, elu + 1 (arXiv 2409.02097)."""

    def __init__(self, teacher: Mapping[str, nn.Module | None], heads: int, config: LinearAttentionConfig) -> None:
        super().__init__(teacher, heads, config)
        if config.query == "mlp":
            self.fuse_q = TokenMLP(self.to_q.in_features)
        if config.key == "mlp":
            self.fuse_k = TokenMLP(self.to_k.in_features)

    def feature_map(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1


# -- PixArt-Sigma's KV compression -------------------------------------------------------------------


class KVCompressor(SpatialCompressor):
    """Depthwise 2 x 2 convolution with stride 2, which starts as the average, and LayerNorm: (B, N, D) -> (B, M, D).

    The last row or column is repeated where the stride does not divide the grid.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, kernel=2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, grids: Grids) -> Tensor:
        return self.norm(super().forward(x, grids))

    def compress(self, image: Tensor) -> Tensor:
        height, width = image.shape[2:]
        return super().compress(F.pad(image, (0, -width % 2, 0, -height % 2), mode="replicate"))


class KVCompressionAttention(AllTokensAttention):
    """Softmax attention, and one compressor for keys and values (arXiv 2403.04692)."""

    attend = staticmethod(softmax_attention)

    def __init__(self, teacher: Mapping[str, nn.Module | None], heads: int, config: LinearAttentionConfig) -> None:
        super().__init__(teacher, heads, dataclasses.replace(config, key="linear", value="linear"))
        if config.key == "compressor":
            self.compress_k = KVCompressor(self.to_k.out_features)

    def values(self, x: Tensor, grids: Grids) -> Tensor:
        return self.split_heads(self.compress_k(self.to_v(x), grids))


# -- the exact eta_I ---------------------------------------------------------------------------------


class ExactHybridAttention(HybridAttention):
    """Hybrid attention whose eta_I is the share of the linear part in the sum of both normalizers.

    That needs the prompt scores (B, heads, N, T), which fused softmax kernels keep to themselves.
    """

    def forward(self, hidden_states, encoder_hidden_states, attention_mask=None, *, grids: Grids):
        x, c, mask = hidden_states, encoder_hidden_states, attention_mask
        check_grids(x.shape[1], grids)
        q_i, k_i, v_i = self.queries(x, grids), self.keys(x, grids), self.values(x, grids)
        k_p, v_p, q_p = self.prompt_keys(c), self.prompt_values(c), self.prompt_queries(c)
        a_linear = linear_attention(F.relu(q_i), F.relu(k_i), v_i)
        a_softmax, log_p = softmax_attention_and_normalizer(q_i, k_p, v_p, mask)
        eta_i = (linear_log_normalizer(F.relu(q_i), F.relu(k_i)) - log_p).sigmoid()
        image = self.to_out(merge_heads(mixture(eta_i, a_linear, a_softmax)))
        if q_p is None:
            return image, None
        prompt = softmax_attention(q_p, join(k_i, k_p), join(v_i, v_p), with_image_keys(mask, k_i))
        return image, self.to_add_out(merge_heads(prompt))


def softmax_attention_and_normalizer(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`softmax_attention`, and log sum_j exp(q_i . k_j / sqrt d), (B, heads, N, 1), -inf where a mask leaves no key."""
    with no_autocast(q):
        scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])
        if mask is None:
            log_sum = scores.logsumexp(dim=-1, keepdim=True)
        else:
            some = mask.any(dim=-1, keepdim=True)
            scores = scores.masked_fill(~(mask | ~some)[:, None, None, :], -math.inf)
            log_sum = scores.logsumexp(dim=-1, keepdim=True).masked_fill(~some[:, None, None, :], -math.inf)
        return (scores.softmax(dim=-1) @ v.float()).to(v.dtype), log_sum


def linear_log_normalizer(q: Tensor, k: Tensor) -> Tensor:
    """log sum_j q_i . k_j / sqrt d, the counterpart for linear attention, (B, heads, N, 1)."""
    with no_autocast(q):
        k = k.float() / k.shape[-2]
        mean = q.float() @ k.sum(dim=-2).unsqueeze(-1) + EPS
        return mean.log() + math.log(k.shape[-2]) - math.log(q.shape[-1]) / 2


# -- SANA's feed-forward -----------------------------------------------------------------------------


class MixFeedForward(nn.Module):
    """SANA's Mix-FFN in place of a block's feed-forward: (B, N, D) -> the same.

    1x1 convolution to twice the hidden width, SiLU, depthwise 3x3, gate of one half by SiLU of the other, 1x1 back. It
    has no counterpart in the teacher, so it starts from random weights.

    Blocks call their feed-forward with tokens only, so the grids come from the attention, which has run before it:
    `read_grids_of`.
    """

    def __init__(self, dim: int, ratio: float = 2.5) -> None:
        super().__init__()
        hidden = round(dim * ratio)
        self.conv_in = nn.Conv2d(dim, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_out = nn.Conv2d(hidden, dim, 1, bias=False)
        self.grids: Grids = ()

    def forward(self, x: Tensor) -> Tensor:
        return on_grids(self.convolve, x, self.grids)

    def convolve(self, image: Tensor) -> Tensor:
        image, gate = self.conv_depth(F.silu(self.conv_in(image))).chunk(2, dim=1)
        return self.conv_out(image * F.silu(gate))

    def read_grids_of(self, attention: LinearAttention) -> None:
        attention.feed_forward = (self,)  # in a tuple: no submodule, and a copy of the network refers to its own
        attention.register_forward_pre_hook(pass_grids, with_kwargs=True)


def pass_grids(attention: LinearAttention, args: tuple, kwargs: Mapping[str, Any]) -> None:
    (feed_forward,) = attention.feed_forward
    feed_forward.grids = kwargs["grids"]


# -- which baseline has what -------------------------------------------------------------------------

NEW_PARTS = (TokenMLP, KVCompressor, MixFeedForward)  # without a counterpart in the teacher
ALL_TOKENS: dict[str, type[AllTokensAttention]] = {
    "linear": LinearJointAttention,
    "sana": LinearJointAttention,
    "linfusion": LinFusionAttention,
    "kv_compression": KVCompressionAttention,
}


def attention_class(kind: Literal["image", "joint"], config: LinearAttentionConfig) -> type[LinearAttention]:
    """What replaces attention of image tokens among themselves, or joint attention."""
    if kind == "image" and config.baseline in ("edit", "linear", "sana"):
        return LinearAttention
    if config.image_mix == "exact":
        return ExactHybridAttention
    return ALL_TOKENS.get(config.baseline, HybridAttention)
