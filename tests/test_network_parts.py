"""The parts of E-MMDiT, each against a naive computation written from its definition (docs/papers.md, B2-B6)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emmdit.networks.emmdit.compression import TokenCompressor, TokenReconstructor, shuffle, unshuffle
from emmdit.networks.emmdit.layers import (
    MLP,
    AdaLN,
    EMMDiTBlock,
    JointAttention,
    Subregions,
    sincos_2d,
    timestep_features,
)

GRIDS = [(4, 4), (4, 12), (8, 4)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, H*W, D) -> an image (B, D, H, W), as the released code's convolutions see it."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)


def to_tokens(image: Tensor) -> Tensor:
    return image.flatten(2).transpose(1, 2)


# -------------------------------------------------------------------------------- positions and time


def test_position_table_entry_by_entry():
    size, dim, spacing = 5, 8, 0.25
    table = sincos_2d(size, dim, spacing)
    for row in range(size):
        for column in range(size):
            expected = []
            for index in (column, row):  # the column's half comes first
                angles = [index * spacing / 10000 ** (k / (dim // 4)) for k in range(dim // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(table[row, column], torch.tensor(expected), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"\b4\b.*\b10\b"):
        sincos_2d(4, 10, 1.0)


def test_timestep_features_are_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 1.0, 333.3, 1000.0])
    expected = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_features(t), expected)
    # cos(1000) of a bfloat16 network's timestep must not be computed in bfloat16
    assert torch.equal(timestep_features(t.to(torch.float64)), timestep_features(t))


# -------------------------------------------------------------------------------- modulation


@pytest.mark.parametrize("kind", ["affine", "single", "zero"])
def test_modulation_by_hand(kind: str):
    dim, batch = 4, 3
    adaln = AdaLN(dim, kind)
    if kind == "zero":
        time = randn(batch, dim)
        expected = F.linear(time * torch.sigmoid(time), adaln.linear.weight, adaln.linear.bias).view(batch, 6, dim)
    else:
        time = randn(batch, 6, dim)
        scale = adaln.scale if kind == "affine" else torch.zeros(6, dim)
        expected = adaln.bias[None] + time * (1 + scale[None])
    parts = adaln(time)
    assert len(parts) == 6
    for i, part in enumerate(parts):
        torch.testing.assert_close(part, expected[:, i, None])


@pytest.mark.parametrize("context_pre_only", [False, True])
def test_block_by_hand(context_pre_only: bool):
    """Where each of the six vectors goes: modulation, gates, residuals, both streams."""
    dim, block = 8, EMMDiTBlock(8, 2, 3.0, "affine", Subregions(), context_pre_only)
    for norm in (block.norm1, block.norm1_context):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x, c, time = randn(2, 6, dim), randn(2, 4, dim, seed=1), randn(2, 6, dim, seed=2)

    def norm(tokens: Tensor, affine: nn.LayerNorm | None, eps: float) -> Tensor:
        mean, variance = tokens.mean(-1, keepdim=True), tokens.var(-1, unbiased=False, keepdim=True)
        tokens = (tokens - mean) / (variance + eps).sqrt()
        return tokens if affine is None else tokens * affine.weight + affine.bias

    shift, scale, gate, ff_shift, ff_scale, ff_gate = block.modulation(time)
    normed_c = norm(c, block.norm1_context, 1e-5)
    if not context_pre_only:
        c_shift, c_scale, c_gate, c_ff_shift, c_ff_scale, c_ff_gate = block.modulation_context(time)
        normed_c = normed_c * (1 + c_scale) + c_shift
    attended, attended_c = block.attn(norm(x, block.norm1, 1e-5) * (1 + scale) + shift, normed_c)
    expected = x + gate * attended
    expected = expected + ff_gate * block.ff(norm(expected, None, 1e-6) * (1 + ff_scale) + ff_shift)
    found, found_c = block(x, c, time)
    torch.testing.assert_close(found, expected)
    if context_pre_only:
        assert found_c is None and attended_c is None
        return
    expected = c + c_gate * attended_c
    expected = expected + c_ff_gate * block.ff_context(norm(expected, None, 1e-6) * (1 + c_ff_scale) + c_ff_shift)
    torch.testing.assert_close(found_c, expected)


def test_feed_forward_width_survives_a_ratio_read_off_a_file():
    block = EMMDiTBlock(176, 11, 240 / 176, "affine", Subregions())
    assert block.ff.proj_in.out_features == 240  # 176 * (240 / 176) < 240 in floats


# -------------------------------------------------------------------------------- subregions


def group_of(index: int, regions: Subregions) -> int:
    """Which group a token belongs to, by the definition (docs/papers.md, B5)."""
    if regions.kind == "full":
        return 0
    return (index if regions.kind == "strided" else index // regions.run) % regions.groups


REGIONS = [
    Subregions("full"),
    Subregions("strided", 4),
    Subregions("chunked", 4, 4),
    Subregions("strided", 2),
    Subregions("chunked", 2, 3),
]


@pytest.mark.parametrize("regions", REGIONS, ids=str)
def test_split_gathers_groups_in_order_and_merge_undoes_it(regions: Subregions):
    count = 48
    x = randn(3, count, 2, 5)
    split = regions.split(x)
    groups = 1 if regions.kind == "full" else regions.groups
    assert split.shape == (3 * groups, count // groups, 2, 5)
    for row in range(3):
        for group in range(groups):
            members = [i for i in range(count) if group_of(i, regions) == group]
            assert torch.equal(split[row * groups + group], x[row, members])
    assert torch.equal(regions.merge(split), x)
    assert torch.equal(regions.merge(split.flatten(2)), x.flatten(2))


def test_what_a_token_count_must_be_divisible_by():
    assert [regions.multiple for regions in REGIONS] == [1, 4, 16, 2, 6]


# -------------------------------------------------------------------------------- attention


def naive_attention(attn: JointAttention, x: Tensor, c: Tensor, text_mask: Tensor | None = None):
    """Joint attention as one dense softmax in float64, in which tokens of other groups are masked."""
    attn, x, c = attn.double(), x.double(), c.double()

    def heads(tokens: Tensor, linear: nn.Linear, norm: nn.RMSNorm | None = None) -> Tensor:
        t = (tokens @ linear.weight.T + linear.bias).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        if norm is None:
            return t
        return t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

    q = torch.cat([heads(x, attn.to_q, attn.norm_q), heads(c, attn.add_q_proj, attn.norm_added_q)], 2)
    k = torch.cat([heads(x, attn.to_k, attn.norm_k), heads(c, attn.add_k_proj, attn.norm_added_k)], 2)
    v = torch.cat([heads(x, attn.to_v), heads(c, attn.add_v_proj)], 2)
    groups = torch.tensor([group_of(i, attn.subregions) for n in (x.shape[1], c.shape[1]) for i in range(n)])
    allowed = (groups[:, None] == groups[None, :])[None, None]
    if text_mask is not None:
        allowed = allowed & F.pad(text_mask, (x.shape[1], 0), value=True)[:, None, None]
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    image, text = out[:, : x.shape[1]], out[:, x.shape[1] :]
    return attn.to_out(image), None if attn.to_add_out is None else attn.to_add_out(text)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("context_pre_only", [False, True])
@pytest.mark.parametrize("regions", REGIONS, ids=str)
def test_attention_is_a_softmax_within_groups(regions: Subregions, context_pre_only: bool, masked: bool):
    attn = JointAttention(24, 3, regions, context_pre_only)
    for norm in (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k):
        nn.init.normal_(norm.weight, 1, 0.5)
    x, c = randn(2, 48, 24), randn(2, 48, 24, seed=1)
    mask = torch.arange(48)[None] < torch.tensor([[5], [30]]) if masked else None
    found, found_c = attn(x, c, mask)
    expected, expected_c = naive_attention(attn, x, c, mask)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert (found_c is None) == context_pre_only
    if found_c is not None:
        torch.testing.assert_close(found_c.double(), expected_c, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------- compression


@pytest.mark.parametrize(("height", "width"), GRIDS)
@pytest.mark.parametrize("ratio", [2, 4])
def test_unshuffle_and_shuffle_are_torchs(height: int, width: int, ratio: int):
    x = randn(2, height * width, 16)
    small = unshuffle(x, height, width, ratio)
    assert torch.equal(small, to_tokens(nn.PixelUnshuffle(ratio)(to_map(x, height, width))))
    assert torch.equal(shuffle(small, height, width, ratio), x)
    few = randn(2, height * width // ratio**2, 32)
    large = nn.PixelShuffle(ratio)(to_map(few, height // ratio, width // ratio))
    assert torch.equal(shuffle(few, height, width, ratio), to_tokens(large))


def convolutions(path: MLP, image: Tensor) -> Tensor:
    """A path as the released network has it: two 1x1 convolutions with a GELU between."""
    hidden = F.conv2d(image, path.proj_in.weight[..., None, None], path.proj_in.bias)
    hidden = F.gelu(hidden, approximate="tanh")
    return F.conv2d(hidden, path.proj_out.weight[..., None, None], path.proj_out.bias)


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_compressor_and_reconstructor_as_convolutions(height: int, width: int):
    dim, ratios = 16, (2, 4)
    x = randn(2, height * width, dim)
    compressor, reconstructor = TokenCompressor(dim, ratios), TokenReconstructor(dim, ratios)
    image = to_map(x, height, width)
    expected = [
        to_tokens(convolutions(path, F.pixel_unshuffle(image, r)))
        for r, path in zip(ratios, compressor.paths, strict=True)
    ]
    found = compressor(x, height, width)
    torch.testing.assert_close(found, torch.cat(expected, 1))  # the 2x path's tokens come first
    assert found.shape[1] == height * width // 4 + height * width // 16

    parts = [
        convolutions(path, F.pixel_shuffle(to_map(part, height // r, width // r), r))
        for r, path, part in zip(ratios, reconstructor.paths, expected, strict=True)
    ]
    merged = torch.cat([*parts, image], 1)
    hidden = F.gelu(reconstructor.merge.proj_in(to_tokens(merged)), approximate="tanh")
    torch.testing.assert_close(
        reconstructor(found, x, height, width), reconstructor.merge.proj_out(hidden), rtol=1e-4, atol=1e-5
    )
