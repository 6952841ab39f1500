"""Linear compressed attention and the hybrid joint attention, against closed forms and hand computations."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emmdit.networks.edit.attention import (
    ConvFusion,
    LinearAttention,
    SpatialCompressor,
    linear_attention,
    softmax_attention,
)
from emmdit.networks.edit.baselines import MixFeedForward, TokenMLP
from emmdit.networks.edit.config import BASELINES, AttentionChoices
from emmdit.networks.edit.grids import on_grids
from emmdit.networks.edit.hybrid import HybridAttention

DIM, HEADS, HEIGHT, WIDTH, TEXT = 16, 2, 4, 6, 5
GRIDS = ((HEIGHT, WIDTH),)


def teacher(prompt: bool = False, out: bool = True) -> dict[str, nn.Module | None]:
    """Projections of a teacher's attention, as its student takes them over."""
    linears = ["to_q", "to_k", "to_v", "to_out"] + ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"] * prompt
    norms = ["norm_q", "norm_k"] + ["norm_added_q", "norm_added_k"] * prompt
    parts: dict[str, nn.Module | None] = {name: nn.Linear(DIM, DIM) for name in linears}
    parts |= {name: nn.RMSNorm(DIM // HEADS) for name in norms}
    if not out:
        parts["to_add_out"] = None
    return parts


def student(kind: type, choices: dict, **sizes) -> LinearAttention:
    """An attention whose zero-initialised parts are random: a test must see them."""
    module = kind(teacher(kind is HybridAttention, **sizes), HEADS, AttentionChoices.of(choices))
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


def transposed(x: Tensor, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """The tokens of the same picture with rows and columns swapped."""
    return x.unflatten(1, (height, width)).transpose(1, 2).flatten(1, 2)


# -------------------------------------------------------------------------------- maths


@pytest.mark.parametrize("float32", [True, False])
def test_linear_attention_is_its_quadratic_form(float32: bool):
    q, k = (torch.randn(2, HEADS, n, 8).relu() for n in (11, 7))
    v = torch.randn(2, HEADS, 7, 8)
    eps = 1e-2
    weights = q @ k.transpose(-2, -1)  # N x M, which the linear form never builds
    expected = (weights @ v) / (weights.sum(-1, keepdim=True) + eps * k.shape[-2])
    y, normaliser = linear_attention(q, k, v, eps, float32)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(normaliser, weights.mean(-1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_a_query_that_relu_kills_gives_zero_and_finite_gradients():
    q, k, v = (torch.randn(1, 1, 4, 8) for _ in range(3))
    q[:, :, 1] = -1
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    y, _ = linear_attention(q.relu(), k.relu(), v)
    y.square().sum().backward()
    assert torch.equal(y[:, :, 1], torch.zeros(1, 1, 8))
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def test_sums_are_in_float32_under_autocast():
    """4096 keys: a sum that rounds to bf16 at each step, or inputs that round twice, are off by more."""
    q, k = (torch.rand(1, 1, n, 8) for n in (16, 4096))
    v = torch.randn(1, 1, 4096, 8) + 1
    exact, _ = linear_attention(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast, _ = linear_attention(q, k, v)
        coarse, _ = linear_attention(q, k, v, float32=False)
    assert torch.equal(under_autocast, exact)
    assert (coarse - exact).abs().max() > 1e-3


def test_softmax_attention_gives_output_and_normaliser():
    q, k, v = torch.randn(2, HEADS, 5, 8), torch.randn(2, HEADS, 7, 8), torch.randn(2, HEADS, 7, 8)
    mask = torch.rand(2, 1, 1, 7) > 0.4
    y, log_sum = softmax_attention(q, k, v, mask)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(8)
    torch.testing.assert_close(log_sum, (scores.exp() * mask).sum(-1, keepdim=True).log())


# -------------------------------------------------------------------------------- grids


def test_tokens_are_rows_one_after_the_other():
    """A depthwise kernel that picks the right neighbour moves token (r, c) to (r, c - 1), and nothing else."""
    compressor = SpatialCompressor(1, AttentionChoices(compressor_stride=1))
    with torch.no_grad():
        compressor.conv.weight.zero_()
        compressor.conv.weight[0, 0, 1, 2] = 1
    tokens = torch.arange(1.0, 7)[None, :, None]  # 1 2 3 / 4 5 6
    assert compressor(tokens, ((2, 3),)).flatten().tolist() == [2, 3, 0, 5, 6, 0]
    assert compressor(tokens, ((3, 2),)).flatten().tolist() == [2, 0, 4, 0, 6, 0]  # 1 2 / 3 4 / 5 6


def test_average_compressor_by_hand():
    tokens = torch.arange(1.0, 13)[None, :, None]  # 3 x 4; windows centred at rows 0, 2 and columns 0, 2
    windows = [1 + 2 + 5 + 6, 2 + 3 + 4 + 6 + 7 + 8, 5 + 6 + 9 + 10, 6 + 7 + 8 + 10 + 11 + 12]
    compressed = SpatialCompressor(1, AttentionChoices())(tokens, ((3, 4),))
    torch.testing.assert_close(compressed.flatten(), torch.tensor(windows) / 9)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 4), (5, 7), (6, 3)])
@pytest.mark.parametrize("kernel", [2, 3])
def test_compressed_count_for_any_size(size: tuple[int, int], kernel: int):
    compressor = SpatialCompressor(DIM, AttentionChoices(compressor_kernel=kernel))
    tokens = image(tokens=size[0] * size[1])
    assert compressor(tokens, (size,)).shape[1] == math.ceil(size[0] / 2) * math.ceil(size[1] / 2)


def test_two_grids_in_one_sequence_do_not_mix():
    fusion = student(LinearAttention, {}).fuse_q
    a, b = image(tokens=12), image(tokens=6)
    both = fusion(torch.cat([a, b], dim=1), ((3, 4), (2, 3)))
    torch.testing.assert_close(both, torch.cat([fusion(a, ((3, 4),)), fusion(b, ((2, 3),))], dim=1))


def test_on_grids_keeps_the_order():
    assert torch.equal(on_grids(nn.Identity(), x := image(), GRIDS), x)


@pytest.mark.parametrize("kind", [LinearAttention, HybridAttention])
@pytest.mark.parametrize("baseline", ["edit", "kv_compression"])
def test_transposed_picture_with_transposed_kernels_gives_the_transposed_output(kind: type, baseline: str):
    """Fails wherever rows and columns are taken for each other."""
    attention = student(kind, dict(baseline=baseline)).double()
    x, rest = image().double(), ([prompt().double()] if kind is HybridAttention else [])
    y = attention(x, *rest, grids=GRIDS)
    wrong = attention(x, *rest, grids=((WIDTH, HEIGHT),))
    for module in attention.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.transpose(2, 3)
    y_transposed = attention(transposed(x), *rest, grids=((WIDTH, HEIGHT),))
    if kind is HybridAttention:
        torch.testing.assert_close(y[1], y_transposed[1])
        y, y_transposed, wrong = y[0], y_transposed[0], wrong[0]
    torch.testing.assert_close(transposed(y), y_transposed)
    assert not torch.allclose(y, wrong, atol=1e-3)


def test_without_convolutions_image_tokens_may_come_in_any_order():
    attention = student(HybridAttention, dict(query="linear", key="linear", value="linear"))
    x, c, order = image(), prompt(), torch.randperm(HEIGHT * WIDTH)
    y, p = attention(x, c, grids=GRIDS)
    y_shuffled, p_shuffled = attention(x[:, order], c, grids=GRIDS)
    torch.testing.assert_close(y_shuffled, y[:, order])
    torch.testing.assert_close(p_shuffled, p)


@pytest.mark.parametrize("kind", [LinearAttention, HybridAttention])
@pytest.mark.parametrize("query", ["conv_fusion", "linear"])
def test_tokens_that_do_not_match_the_grid_are_refused(kind: type, query: str):
    attention = student(kind, dict(query=query, key="linear", value="linear"))
    rest = [prompt()] if kind is HybridAttention else []
    with pytest.raises(ValueError, match=r"\b24\b.*4 x 5.*\b20\b") as error:
        attention(image(), *rest, grids=((4, 5),))
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------- modules


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


@pytest.mark.parametrize("form", ["v2", "v1"])
def test_edit_attention_is_the_papers_equations(form: str):
    m = student(LinearAttention, dict(conv_fusion_form=form, compressor_init="delta"))
    x = image()
    grid = x.transpose(1, 2).unflatten(2, (HEIGHT, WIDTH))
    a = m.fuse_q.conv_a(grid)
    a = F.leaky_relu(m.fuse_q.norm(a), 0.01) if form == "v2" else m.fuse_q.norm(F.leaky_relu(a, 0.01))
    fused = x + m.fuse_q.conv_b(a).flatten(2).transpose(1, 2)
    q = m.norm_q(heads(m.to_q(fused) if form == "v2" else fused)).relu()

    def compressed(linear: nn.Linear, conv: nn.Conv2d) -> Tensor:
        return heads(conv(linear(x).transpose(1, 2).unflatten(2, (HEIGHT, WIDTH))).flatten(2).transpose(1, 2))

    k = m.norm_k(compressed(m.to_k, m.compress_k.conv)).relu()
    v = compressed(m.to_v, m.compress_v.conv)
    assert k.shape[2] == 6
    weights = q @ k.transpose(-2, -1)
    y = (weights @ v) / (weights.sum(-1, keepdim=True) + 1e-4 * 6)
    expected = m.to_out(y.transpose(1, 2).flatten(2))
    torch.testing.assert_close(m(x, grids=GRIDS), expected, rtol=1e-5, atol=1e-5)
    assert (m.to_q is None) == (form == "v1")


def joint_sdpa(m: HybridAttention, x: Tensor, c: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Plain joint attention of a teacher with these projections."""
    q, k, v = m.norm_q(heads(m.to_q(x))), m.norm_k(heads(m.to_k(x))), heads(m.to_v(x))
    pq, pk = m.norm_added_q(heads(m.add_q_proj(c))), m.norm_added_k(heads(m.add_k_proj(c)))
    q, k, v = torch.cat([q, pq], 2), torch.cat([k, pk], 2), torch.cat([v, heads(m.add_v_proj(c))], 2)
    if mask is not None:
        mask = F.pad(mask, (x.shape[1], 0), value=True)[:, None, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    return m.to_out(y[:, : x.shape[1]]), m.to_add_out(y[:, x.shape[1] :])


PLAIN = dict(query="linear", key="linear", value="linear", kernel="softmax")
MASKS = [None, torch.tensor([[True, True, False, False, False], [True, False, True, True, True]])]


@pytest.mark.parametrize("mask", MASKS, ids=["all", "masked"])
@pytest.mark.parametrize("choices", [dict(image_mix="exact"), dict(joint="softmax")], ids=["exact mixture", "softmax"])
def test_hybrid_with_softmax_and_exact_normaliser_is_joint_sdpa(choices: dict, mask: Tensor | None):
    m = student(HybridAttention, PLAIN | choices)
    x, c = image(), prompt()
    for got, expected in zip(m(x, c, mask, grids=GRIDS), joint_sdpa(m, x, c, mask), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_text_that_is_all_masked_leaves_image_attention():
    x, c, mask = image(), prompt(), torch.tensor([[False] * TEXT, [True] * TEXT])
    for mix in ("exact", "token_share"):
        m = student(HybridAttention, dict(image_mix=mix))
        alone, _ = m.image_to_image(
            m.queries(x, GRIDS), *(m.split(t) for t in m.compress(*m.keys_values(x, GRIDS), GRIDS))
        )
        y, p = m(x, c, mask, grids=GRIDS)
        torch.testing.assert_close(y[0], m.project(m.to_out, alone)[0])
        assert p.isfinite().all()


@pytest.mark.parametrize("rows", ["joint", "token_share"])
def test_token_share_mixes_by_counts(rows: str):
    m = student(HybridAttention, dict(prompt_rows=rows))
    x, c = image(), prompt()
    k, v = (m.split(t) for t in m.compress(*m.keys_values(x, GRIDS), GRIDS))
    q = m.queries(x, GRIDS)
    pk, pv = m.norm_added_k(heads(m.add_k_proj(c))), heads(m.add_v_proj(c))
    pq = m.norm_added_q(heads(m.add_q_proj(c)))
    linear, _ = linear_attention(m.norm_q(q).relu(), m.norm_k(k).relu(), v)
    share = 24 / (24 + TEXT)  # tokens before compression
    sdpa = F.scaled_dot_product_attention
    image_rows = share * linear + (1 - share) * sdpa(m.norm_q(q), pk, pv)
    k = m.norm_k(k)
    if rows == "joint":
        prompt_rows = sdpa(pq, torch.cat([k, pk], 2), torch.cat([v, pv], 2))
    else:
        prompt_rows = share * sdpa(pq, k, v) + (1 - share) * sdpa(pq, pk, pv)
    y, p = m(x, c, grids=GRIDS)
    torch.testing.assert_close(y, m.to_out(image_rows.transpose(1, 2).flatten(2)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(p, m.to_add_out(prompt_rows.transpose(1, 2).flatten(2)), rtol=1e-5, atol=1e-5)


def test_exact_share_of_the_linear_normaliser():
    """One joint attention with weights q . k / sqrt d on image keys and exp(q . k / sqrt d) on prompt keys."""
    m = student(HybridAttention, dict(image_mix="exact", eps=0.0))
    x, c = image(), prompt()
    k, v = (m.split(t) for t in m.compress(*m.keys_values(x, GRIDS), GRIDS))
    q, k = m.norm_q(m.queries(x, GRIDS)), m.norm_k(k)
    pk, pv = m.norm_added_k(heads(m.add_k_proj(c))), heads(m.add_v_proj(c))
    weights = torch.cat([q.relu() @ k.relu().mT / 8**0.5, (q @ pk.mT / 8**0.5).exp()], dim=-1)
    y = (weights / weights.sum(-1, keepdim=True)) @ torch.cat([v, pv], dim=2)
    expected = m.to_out(y.transpose(1, 2).flatten(2))
    torch.testing.assert_close(m(x, c, grids=GRIDS)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS, ids=["all", "masked"])
def test_compensated_compression_of_equal_tokens_is_no_compression(mask: Tensor | None):
    """Where all image tokens are equal, a key that counts four times is as good as four keys."""
    m = student(HybridAttention, PLAIN | dict(key="compressor", value="compressor", image_mix="exact", compensate=True))
    for compressor in (m.compress_k, m.compress_v):
        nn.init.zeros_(compressor.conv.weight)
        compressor.conv.weight.data[:, :, 1, 1] = 1
    x, c = image()[:, :1].expand(-1, 24, -1), prompt()
    for got, expected in zip(m(x, c, mask, grids=GRIDS), joint_sdpa(m, x, c, mask), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_masked_text_does_not_matter():
    mask = MASKS[1]
    c = prompt()
    other = torch.where(mask[..., None], c, torch.randn_like(c))
    for choices in ({}, dict(joint="linear"), dict(image_mix="exact"), dict(prompt_rows="token_share")):
        m, x = student(HybridAttention, choices), image()
        y, p = m(x, c, mask, grids=GRIDS)
        y_other, p_other = m(x, other, mask, grids=GRIDS)
        torch.testing.assert_close(y, y_other)
        torch.testing.assert_close(p[mask], p_other[mask])
        assert not torch.allclose(y, m(x, other, grids=GRIDS)[0])


OPTIONS = [
    dict(key="conv_fusion", value="linear"),
    dict(key="linear", value="linear"),
    dict(query="linear"),
    dict(rectified=True),
    dict(prompt_keys="full"),
    dict(qk_norm=False),
    dict(kernel="elu", image_mix="exact", compensate=True),
    dict(compressor_stride=4),
    dict(baseline="linear"),
    dict(baseline="linfusion"),
    dict(baseline="kv_compression"),
]


@pytest.mark.parametrize("choices", OPTIONS, ids=str)
def test_every_option_changes_the_output_and_reaches_every_parameter(choices: dict):
    default, m = student(HybridAttention, {}), student(HybridAttention, choices)
    own = m.state_dict()
    shared = {key: value for key, value in default.state_dict().items() if key in own and value.shape == own[key].shape}
    m.load_state_dict(shared, strict=False)
    x, c = image(), prompt()
    y, p = m(x, c, grids=GRIDS)
    assert not torch.allclose(y, default(x, c, grids=GRIDS)[0], atol=1e-4) or not torch.allclose(
        p, default(x, c, grids=GRIDS)[1], atol=1e-4
    )
    (y.square().sum() + p.square().sum()).backward()
    assert [name for name, parameter in m.named_parameters() if parameter.grad is None] == []


def test_last_block_has_no_prompt_rows_nor_their_weights():
    m = student(HybridAttention, {}, out=False)
    y, p = m(image(), prompt(), grids=GRIDS)
    assert p is None and m.add_q_proj is None and m.norm_added_q is None
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in m.parameters())


@pytest.mark.parametrize("choices", [{}, dict(image_mix="exact"), *({"baseline": name} for name in BASELINES)], ids=str)
def test_bf16_against_fp32(choices: dict):
    m = student(HybridAttention, choices)
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


def test_token_mlp_starts_as_the_identity_and_sees_no_neighbour():
    assert torch.equal(TokenMLP(DIM)(x := image(), GRIDS), x)
    mlp = TokenMLP(DIM, zero_init=False)
    order = torch.randperm(24)
    torch.testing.assert_close(mlp(x[:, order], GRIDS), mlp(x, GRIDS)[:, order])


def test_mix_feed_forward_equals_diffusers():
    from diffusers.models.transformers.sana_transformer import GLUMBConv

    mix, theirs = MixFeedForward(DIM, 2.5), GLUMBConv(DIM, DIM, expand_ratio=2.5, residual_connection=False)
    names = dict(conv_in="conv_inverted", conv_depth="conv_depth", conv_out="conv_point")
    for own, other in names.items():
        getattr(theirs, other).load_state_dict(getattr(mix, own).state_dict())
    mix.grids, x = GRIDS, image()
    expected = theirs(x.transpose(1, 2).unflatten(2, (HEIGHT, WIDTH))).flatten(2).transpose(1, 2)
    torch.testing.assert_close(mix(x), expected)


def test_plain_linear_baseline_equals_diffusers_sana_attention():
    from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0

    theirs = Attention(DIM, heads=HEADS, dim_head=DIM // HEADS, bias=True, processor=SanaLinearAttnProcessor2_0())
    names = ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k")
    choices = AttentionChoices.of(dict(baseline="sana", eps=1e-12))
    ours = LinearAttention({name: getattr(theirs, name) for name in names}, HEADS, choices)
    torch.testing.assert_close(ours(x := image(), grids=GRIDS), theirs(x), rtol=1e-4, atol=1e-5)


REFUSED = [
    (dict(kernal="relu"), "'kernal'.*kernel"),
    (dict(baseline="sona"), "'sona'.*sana"),
    (dict(kernel="gelu"), "kernel.*relu, elu, softmax.*'gelu'"),
    (dict(key="linear"), "key.*'linear'.*value.*'compressor'"),
    (dict(conv_fusion_kernel=4), r"conv_fusion_kernel.*\b4\b"),
    (dict(conv_fusion_ratio=0), r"conv_fusion_ratio.*\b1\b.*\b0\b"),
    (dict(rectified="yes"), "rectified.*'yes'"),
    (dict(eps=-1.0), r"\beps\b.*-1\.0"),
    (dict(kernel="softmax", joint="linear"), 'joint.*kernel.*"relu".*"elu"'),
]


@pytest.mark.parametrize(("choices", "match"), REFUSED, ids=lambda value: str(value)[:30])
def test_choices_that_do_not_fit_are_refused_in_one_sentence(choices: dict, match: str):
    with pytest.raises(ValueError, match=match) as error:
        AttentionChoices.of(choices)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_every_choice_is_documented():
    fields = [field.name for field in dataclasses.fields(AttentionChoices)]
    assert [name for name in fields if name not in AttentionChoices.__doc__] == []


def test_choices_survive_their_config():
    choices = AttentionChoices.of(dict(baseline="kv_compression", layers=(0, 2)))
    assert AttentionChoices.of(choices.as_config()).as_config() == choices.as_config()
    assert choices.replaces(2) and not choices.replaces(1)
