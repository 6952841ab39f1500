"""Linear compressed attention and the hybrid joint attention, against closed forms and hand computations."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import emmdit.networks.edit.attention
from emmdit.networks.edit.attention import EPS, ConvFusion, LinearAttention, SpatialCompressor, linear_attention
from emmdit.networks.edit.baselines import (
    KVCompressor,
    MixFeedForward,
    TokenMLP,
    attention_class,
    softmax_attention_and_normalizer,
)
from emmdit.networks.edit.config import BASELINES, LinearAttentionConfig
from emmdit.networks.edit.hybrid import HybridAttention

DIM, HEADS, HEIGHT, WIDTH, TEXT = 16, 2, 4, 6, 5
GRIDS = ((HEIGHT, WIDTH),)


def teacher(prompt: bool = False, out: bool = True) -> dict[str, nn.Module | None]:
    """Modules of a teacher's attention, by name."""
    linears = ["to_q", "to_k", "to_v", "to_out"] + ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"] * prompt
    norms = ["norm_q", "norm_k"] + ["norm_added_q", "norm_added_k"] * prompt
    parts: dict[str, nn.Module | None] = {name: nn.Linear(DIM, DIM) for name in linears}
    parts |= {name: nn.RMSNorm(DIM // HEADS) for name in norms}
    if not out:
        parts["to_add_out"] = None
    return parts


def student(kind: str, choices: dict, **sizes) -> LinearAttention:
    """An "image" or "joint" attention whose zero-initialized parts are random: a test must see them."""
    config = LinearAttentionConfig.of(choices)
    module = attention_class(kind, config)(teacher(kind == "joint", **sizes), HEADS, config)
    for part in module.modules():
        if isinstance(part, ConvFusion):
            nn.init.normal_(part.conv_b.weight, std=0.3)
        if isinstance(part, TokenMLP):
            nn.init.normal_(part.proj_out.weight, std=0.3)
        if isinstance(part, SpatialCompressor):
            nn.init.normal_(part.conv.weight, std=0.3)
    return module


def image(batch: int = 2, tokens: int = HEIGHT * WIDTH) -> Tensor:
    return torch.randn(batch, tokens, DIM)


def prompt(batch: int = 2) -> Tensor:
    return torch.randn(batch, TEXT, DIM)


# -------------------------------------------------------------------------------- maths


def test_linear_attention_is_its_quadratic_form():
    q, k = (torch.randn(2, HEADS, n, 8).relu() for n in (11, 7))
    v = torch.randn(2, HEADS, 7, 8)
    eps = 1e-2
    weights = q @ k.transpose(-2, -1)  # N x M, which the linear form never builds
    expected = (weights @ v) / (weights.sum(-1, keepdim=True) + eps * k.shape[-2])
    torch.testing.assert_close(linear_attention(q, k, v, eps), expected, rtol=1e-5, atol=1e-6)


def test_a_query_that_relu_kills_gives_zero_and_finite_gradients():
    q, k, v = (torch.randn(1, 1, 4, 8) for _ in range(3))
    q[:, :, 1] = -1
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    y = linear_attention(q.relu(), k.relu(), v)
    y.square().sum().backward()
    assert torch.equal(y[:, :, 1], torch.zeros(1, 1, 8))
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def test_sums_are_in_float32_under_autocast():
    q, k = (torch.rand(1, 1, n, 8) for n in (16, 4096))
    v = torch.randn(1, 1, 4096, 8) + 1
    exact = linear_attention(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_attention(q, k, v), exact)


def test_softmax_attention_gives_output_and_normalizer():
    q, k, v = torch.randn(2, HEADS, 5, 8), torch.randn(2, HEADS, 7, 8), torch.randn(2, HEADS, 7, 8)
    mask = torch.rand(2, 7) > 0.4
    y, log_sum = softmax_attention_and_normalizer(q, k, v, mask)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(8)
    torch.testing.assert_close(log_sum, (scores.exp() * mask[:, None, None]).sum(-1, keepdim=True).log())


# -------------------------------------------------------------------------------- grids


def test_tokens_are_rows_one_after_the_other():
    """A depthwise kernel that picks the right neighbor moves token (r, c) to (r, c - 1), and nothing else."""
    compressor = SpatialCompressor(1, stride=1)
    with torch.no_grad():
        compressor.conv.weight.zero_()
        compressor.conv.weight[0, 0, 1, 2] = 1
    tokens = torch.arange(1.0, 7)[None, :, None]  # 1 2 3 / 4 5 6
    assert compressor(tokens, ((2, 3),)).flatten().tolist() == [2, 3, 0, 5, 6, 0]
    assert compressor(tokens, ((3, 2),)).flatten().tolist() == [2, 0, 4, 0, 6, 0]  # 1 2 / 3 4 / 5 6


def test_average_compressor_by_hand():
    tokens = torch.arange(1.0, 13)[None, :, None]  # 3 x 4; windows centered at rows 0, 2 and columns 0, 2
    windows = [1 + 2 + 5 + 6, 2 + 3 + 4 + 6 + 7 + 8, 5 + 6 + 9 + 10, 6 + 7 + 8 + 10 + 11 + 12]
    compressed = SpatialCompressor(1)(tokens, ((3, 4),))
    torch.testing.assert_close(compressed.flatten(), torch.tensor(windows) / 9)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 4), (5, 7), (6, 3)])
@pytest.mark.parametrize("kind", [SpatialCompressor, KVCompressor])
def test_compressed_count_for_any_size(size: tuple[int, int], kind: type):
    tokens = image(tokens=size[0] * size[1])
    assert kind(DIM)(tokens, (size,)).shape[1] == math.ceil(size[0] / 2) * math.ceil(size[1] / 2)


def test_two_grids_in_one_sequence_do_not_mix():
    fusion = student("image", {}).fuse_q
    a, b = image(tokens=12), image(tokens=6)
    both = fusion(torch.cat([a, b], dim=1), ((3, 4), (2, 3)))
    torch.testing.assert_close(both, torch.cat([fusion(a, ((3, 4),)), fusion(b, ((2, 3),))], dim=1))


def test_without_convolutions_image_tokens_may_come_in_any_order():
    attention = student("joint", dict(query="linear", key="linear", value="linear"))
    x, c, order = image(), prompt(), torch.randperm(HEIGHT * WIDTH)
    y, p = attention(x, c, grids=GRIDS)
    y_shuffled, p_shuffled = attention(x[:, order], c, grids=GRIDS)
    torch.testing.assert_close(y_shuffled, y[:, order])
    torch.testing.assert_close(p_shuffled, p)


@pytest.mark.parametrize("kind", ["image", "joint"])
@pytest.mark.parametrize("query", ["conv_fusion", "linear"])
def test_tokens_that_do_not_match_the_grid_are_refused(kind: str, query: str):
    attention = student(kind, dict(query=query, key="linear", value="linear"))
    rest = [prompt()] if kind == "joint" else []
    with pytest.raises(ValueError, match=r"\b24\b.*4 x 5.*\b20\b") as error:
        attention(image(), *rest, grids=((4, 5),))
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------- modules


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def test_edit_attention_is_the_papers_equations():
    m = student("image", {})
    x = image()
    grid = x.transpose(1, 2).unflatten(2, (HEIGHT, WIDTH))
    a = F.leaky_relu(m.fuse_q.norm(m.fuse_q.conv_a(grid)), 0.01)
    fused = x + m.fuse_q.conv_b(a).flatten(2).transpose(1, 2)
    q = m.norm_q(heads(m.to_q(fused))).relu()

    def compressed(linear: nn.Linear, conv: nn.Conv2d) -> Tensor:
        return heads(conv(linear(x).transpose(1, 2).unflatten(2, (HEIGHT, WIDTH))).flatten(2).transpose(1, 2))

    k = m.norm_k(compressed(m.to_k, m.compress_k.conv)).relu()
    v = compressed(m.to_v, m.compress_v.conv)
    assert k.shape[2] == 6
    weights = q @ k.transpose(-2, -1)
    y = (weights @ v) / (weights.sum(-1, keepdim=True) + 1e-4 * 6)
    expected = m.to_out(y.transpose(1, 2).flatten(2))
    torch.testing.assert_close(m(x, grids=GRIDS), expected, rtol=1e-5, atol=1e-5)


def joint_sdpa(m: HybridAttention, x: Tensor, c: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Plain joint attention of a teacher with these projections."""
    q, k, v = m.norm_q(heads(m.to_q(x))), m.norm_k(heads(m.to_k(x))), heads(m.to_v(x))
    pq, pk = m.norm_added_q(heads(m.add_q_proj(c))), m.norm_added_k(heads(m.add_k_proj(c)))
    q, k, v = torch.cat([q, pq], 2), torch.cat([k, pk], 2), torch.cat([v, heads(m.add_v_proj(c))], 2)
    if mask is not None:
        mask = F.pad(mask, (x.shape[1], 0), value=True)[:, None, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    return m.to_out(y[:, : x.shape[1]]), m.to_add_out(y[:, x.shape[1] :])


MASKS = [None, torch.tensor([[True, True, False, False, False], [True, False, True, True, True]])]


@pytest.mark.parametrize("mask", MASKS, ids=["all", "masked"])
def test_softmax_over_all_tokens_without_compression_is_joint_sdpa(mask: Tensor | None):
    m = student("joint", dict(baseline="kv_compression", key="linear", value="linear"))
    x, c = image(), prompt()
    for got, expected in zip(m(x, c, mask, grids=GRIDS), joint_sdpa(m, x, c, mask), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mix", ["exact", "token_share"])
def test_a_text_that_is_all_masked_leaves_image_attention(mix: str):
    x, c, mask = image(), prompt(), torch.tensor([[False] * TEXT, [True] * TEXT])
    m = student("joint", dict(image_mix=mix))
    y, p = m(x, c, mask, grids=GRIDS)
    torch.testing.assert_close(y[0], LinearAttention.forward(m, x, grids=GRIDS)[0])
    assert p.isfinite().all()


def test_the_four_terms_of_the_paper():
    """Image rows by token counts, prompt rows by the exact shares of the two softmax normalizers."""
    m = student("joint", {})
    x, c = image(), prompt()
    q, k, v = m.queries(x, GRIDS), m.keys(x, GRIDS), m.values(x, GRIDS)
    pq, pk = m.norm_added_q(heads(m.add_q_proj(c))), m.norm_added_k(heads(m.add_k_proj(c)))
    pv = heads(m.add_v_proj(c))
    sdpa, eta_i = F.scaled_dot_product_attention, 24 / (24 + TEXT)  # tokens before compression
    image_rows = eta_i * linear_attention(q.relu(), k.relu(), v) + (1 - eta_i) * sdpa(q, pk, pv)
    s_i, s_p = ((pq @ keys.mT / 8**0.5).exp().sum(-1, keepdim=True) for keys in (k, pk))
    eta_p = s_i / (s_i + s_p)
    prompt_rows = eta_p * sdpa(pq, k, v) + (1 - eta_p) * sdpa(pq, pk, pv)
    y, p = m(x, c, grids=GRIDS)
    torch.testing.assert_close(y, m.to_out(image_rows.transpose(1, 2).flatten(2)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(p, m.to_add_out(prompt_rows.transpose(1, 2).flatten(2)), rtol=1e-5, atol=1e-5)


def test_exact_share_of_the_linear_normalizer():
    """One joint attention with weights q . k / sqrt d on image keys and exp(q . k / sqrt d) on prompt keys."""
    m = student("joint", dict(image_mix="exact"))
    x, c = image(), prompt()
    q, k, v = m.queries(x, GRIDS), m.keys(x, GRIDS), m.values(x, GRIDS)
    pk, pv = m.norm_added_k(heads(m.add_k_proj(c))), heads(m.add_v_proj(c))
    weights = torch.cat([q.relu() @ k.relu().mT / 8**0.5, (q @ pk.mT / 8**0.5).exp()], dim=-1)
    total = weights.sum(-1, keepdim=True) + EPS * k.shape[-2] / 8**0.5
    expected = m.to_out((weights @ torch.cat([v, pv], dim=2) / total).transpose(1, 2).flatten(2))
    torch.testing.assert_close(m(x, c, grids=GRIDS)[0], expected, rtol=1e-4, atol=1e-5)


def test_masked_text_does_not_matter():
    mask = MASKS[1]
    c = prompt()
    other = torch.where(mask[..., None], c, torch.randn_like(c))
    for choices in ({}, dict(image_mix="exact"), dict(baseline="linear"), dict(baseline="kv_compression")):
        m, x = student("joint", choices), image()
        y, p = m(x, c, mask, grids=GRIDS)
        y_other, p_other = m(x, other, mask, grids=GRIDS)
        torch.testing.assert_close(y, y_other)
        torch.testing.assert_close(p[mask], p_other[mask])
        assert not torch.allclose(y, m(x, other, grids=GRIDS)[0])


OPTIONS = [
    dict(key="conv_fusion", value="linear"),
    dict(key="linear", value="linear"),
    dict(query="linear"),
    dict(image_mix="exact"),
    dict(baseline="linear"),
    dict(baseline="linfusion"),
    dict(baseline="kv_compression"),
]


@pytest.mark.parametrize("choices", OPTIONS, ids=str)
def test_every_option_changes_the_output_and_reaches_every_parameter(choices: dict):
    default, m = student("joint", {}), student("joint", choices)
    own = m.state_dict()
    shared = {key: value for key, value in default.state_dict().items() if key in own and value.shape == own[key].shape}
    m.load_state_dict(shared, strict=False)
    x, c = image(), prompt()
    rows, other = (torch.cat(network(x, c, grids=GRIDS), dim=1) for network in (m, default))
    assert not torch.allclose(rows, other, atol=1e-4)
    rows.square().sum().backward()
    assert [name for name, parameter in m.named_parameters() if parameter.grad is None] == []


def test_last_block_has_no_prompt_rows_nor_their_weights():
    m = student("joint", {}, out=False)
    y, p = m(image(), prompt(), grids=GRIDS)
    assert p is None and m.add_q_proj is None and m.norm_added_q is None
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in m.parameters())


@pytest.mark.parametrize("choices", [{}, dict(image_mix="exact"), *({"baseline": name} for name in BASELINES)], ids=str)
def test_bf16_against_fp32(choices: dict):
    m = student("joint", choices)
    x, c = image(), prompt()
    exact = m(x, c, grids=GRIDS)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = m(x, c, grids=GRIDS)
    half = m.bfloat16()(x.bfloat16(), c.bfloat16(), grids=GRIDS)
    for other in (mixed, half):
        for got, expected in zip(other, exact, strict=True):
            assert got.dtype == torch.bfloat16
            assert (got.float() - expected).norm() < 0.02 * expected.norm()


# -------------------------------------------------------------------------------- baselines and choices


def test_token_mlp_starts_as_the_identity_and_sees_no_neighbor():
    mlp, x, order = TokenMLP(DIM), image(), torch.randperm(24)
    assert torch.equal(mlp(x, GRIDS), x)
    nn.init.normal_(mlp.proj_out.weight)
    torch.testing.assert_close(mlp(x[:, order], GRIDS), mlp(x, GRIDS)[:, order])


def test_mix_feed_forward_equals_diffusers():
    from diffusers.models.transformers.sana_transformer import GLUMBConv

    mix, theirs = MixFeedForward(DIM), GLUMBConv(DIM, DIM, expand_ratio=2.5, residual_connection=False)
    names = dict(conv_in="conv_inverted", conv_depth="conv_depth", conv_out="conv_point")
    for own, other in names.items():
        getattr(theirs, other).load_state_dict(getattr(mix, own).state_dict())
    mix.grids, x = GRIDS, image()
    expected = theirs(x.transpose(1, 2).unflatten(2, (HEIGHT, WIDTH))).flatten(2).transpose(1, 2)
    torch.testing.assert_close(mix(x), expected)


def test_plain_linear_baseline_equals_diffusers_sana_attention(monkeypatch: pytest.MonkeyPatch):
    from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0

    theirs = Attention(DIM, heads=HEADS, dim_head=DIM // HEADS, bias=True, processor=SanaLinearAttnProcessor2_0())
    names = ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k")
    modules = {name: getattr(theirs, name) for name in names}
    ours = LinearAttention(modules, HEADS, LinearAttentionConfig.of(dict(baseline="sana")))
    almost_no_eps = functools.partial(linear_attention, eps=1e-12)
    monkeypatch.setattr(emmdit.networks.edit.attention, "linear_attention", almost_no_eps)
    torch.testing.assert_close(ours(x := image(), grids=GRIDS), theirs(x), rtol=1e-4, atol=1e-5)


REFUSED = [
    (dict(kernal="relu"), "'kernal'.*query"),
    (dict(baseline="sona"), "'sona'.*sana"),
    (dict(query="gelu"), "query .* conv_fusion, mlp, linear, .*'gelu'"),
    (dict(key="linear"), "'linear' .* 'compressor'"),
    (dict(query="mlp"), "mlp.*linfusion"),
    (dict(baseline="linear", image_mix="exact"), "image_mix.*'linear'"),
]


@pytest.mark.parametrize(("choices", "match"), REFUSED, ids=lambda value: str(value)[:30])
def test_choices_that_do_not_fit_are_refused_in_one_sentence(choices: dict, match: str):
    with pytest.raises(ValueError, match=match) as error:
        LinearAttentionConfig.of(choices)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


# What version 0.1.0 at commit fb89754 wrote into the config of a student, and how its baselines differed.
OLD = dict(query="conv_fusion", key="compressor", value="compressor", kernel="relu", eps=0.0001, float32=True)
OLD |= dict(qk_norm=True, conv_fusion_form="v2", conv_fusion_ratio=8, conv_fusion_groups=32, conv_fusion_kernel=3)
OLD |= dict(negative_slope=0.01, zero_init=True, compressor_kernel=3, compressor_stride=2, compressor_init="average")
OLD |= dict(compressor_shared=False, compressor_norm=False, joint="hybrid", image_mix="token_share")
OLD |= dict(prompt_rows="joint", prompt_keys="compressed", rectified=False, compensate=False, layers=None)
OLD |= dict(second_attention="linear", feed_forward="teacher", mix_ratio=2.5)
PLAIN = dict(query="linear", key="linear", value="linear", joint="linear")
COMPRESSED = dict(compressor_kernel=2, compressor_shared=True, compressor_norm=True)
OLD_BASELINES = dict(
    edit={},
    linear=PLAIN,
    sana=PLAIN | dict(feed_forward="mix"),
    linfusion=dict(query="mlp", key="mlp", value="linear", kernel="elu", joint="linear"),
    kv_compression=dict(query="linear", kernel="softmax", joint="softmax", **COMPRESSED),
)


@pytest.mark.parametrize("baseline", BASELINES)
def test_configs_of_earlier_versions(baseline: str):
    of = LinearAttentionConfig.of
    assert of(OLD | OLD_BASELINES[baseline]) == of(dict(baseline=baseline)) == of(dict(baseline=baseline, eps=1e-4))
    with pytest.raises(ValueError, match="compressor_stride=4"):
        of(OLD | OLD_BASELINES[baseline] | dict(compressor_stride=4))
    with pytest.raises(ValueError, match="rectified=True"):
        of(dict(baseline=baseline, rectified=True))
