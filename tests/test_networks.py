"""E-MMDiT as a whole: sizes, geometry, switches, text mask, token grids. (Goldens: test_nitro_e.)"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from emmdit.networks import EMMDiTTransformer2DModel

FULL = ("full",)


def tiny(**config) -> EMMDiTTransformer2DModel:
    sizes = dict(sample_size=8, in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16)
    sizes |= dict(block_groups=(2, 2, 2), caption_channels=12, subregion_groups=2, subregion_run=2)
    return EMMDiTTransformer2DModel(**sizes | config)


def inputs(height: int = 8, width: int = 8, text: int = 8, batch: int = 2, channels: int = 4) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(height * 1000 + width)
    return dict(
        hidden_states=torch.randn(batch, channels, height, width, generator=g),
        timestep=torch.rand(batch, generator=g) * 1000,
        encoder_hidden_states=torch.randn(batch, text, 12, generator=g),
    )


@torch.no_grad()
def run(network: EMMDiTTransformer2DModel, **given) -> Tensor:
    return network(**given).sample


def refused(match: str, **config) -> None:
    with pytest.raises(ValueError, match=match) as error:
        tiny(**config)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


# -------------------------------------------------------------------------------- sizes


FREE = dict(subregion_pattern=FULL)
PATCHES = dict(patch_size=2, sample_size=16, out_channels=6)  # as many channels more as a predicted variance has
SIZES = [(FREE, 4, 4, 5), (FREE, 4, 12, 5), (FREE, 20, 8, 5), (FREE, 96, 4, 5)]
SIZES += [({}, 8, 8, 8), ({}, 16, 24, 8), (dict(out_channels=6), 8, 16, 8), (PATCHES, 16, 32, 8)]


@pytest.mark.parametrize(("config", "height", "width", "text"), SIZES, ids=str)
def test_sizes(config: dict, height: int, width: int, text: int):
    """Any multiple of the compression, and with subregions what they divide."""
    found = run(tiny(**config), **inputs(height, width, text))
    assert found.shape == (2, config.get("out_channels", 4), height, width)


@pytest.mark.parametrize(
    ("height", "width", "text", "match"),
    [
        (6, 8, 8, r"6 x 8.*\b4\b"),
        (8, 7, 8, r"8 x 7.*\b4\b"),
        (8, 0, 8, r"8 x 0\b"),
        (100, 8, 8, "100 x 8.*pos_embed_max_size"),
        (8, 12, 8, r"\b30\b.*image.*chunked.*\b4\b"),
        (8, 8, 7, r"\b7\b.*text.*strided.*\b2\b"),
        (8, 8, 6, r"\b6\b.*text.*chunked.*\b4\b"),
    ],
)
def test_other_sizes_end_in_a_sentence_before_anything_is_computed(height: int, width: int, text: int, match: str):
    network = tiny()
    network.patch_embed.forward = network.context_embedder.forward = lambda *_: pytest.fail("computed")
    with pytest.raises(ValueError, match=match) as error:
        network(**inputs(height, width, text))
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_contradicting_configurations_are_refused():
    refused(r"block_groups.*\(2, 2\)", block_groups=(2, 2))
    refused(r"block_groups.*\(0, 0, 0\)", block_groups=(0, 0, 0))
    refused(r"block_groups.*\(2, 2, 0\)", block_groups=(2, 2, 0))
    refused(r"width.*\b6\b.*\b4\b", num_attention_heads=1, attention_head_dim=6, compression_ratios=())
    refused(r"\b3\b.*\b32\b", compression_ratios=(3,))
    refused(r"(?i)compression ratio.*\b1\b", compression_ratios=(1, 2))
    refused(r"sample_size.*\b6\b.*\b4\b", sample_size=6)
    refused(r"sample_size.*\b9\b.*4\.5", sample_size=9, patch_size=2)
    refused("subregion_pattern.*strided.*'diagonal'", subregion_pattern=("full", "diagonal"))
    refused(r"subregion_pattern.*strided.*\[\]", subregion_pattern=())
    refused("modulation.*affine.*'double'", modulation="double")
    refused("init.*faithful.*'ones'", init="ones")


# -------------------------------------------------------------------------------- geometry


def without_attention(network: EMMDiTTransformer2DModel) -> EMMDiTTransformer2DModel:
    """No token hears of another, except through compression."""
    for block in network.blocks:
        torch.nn.init.zeros_(block.attn.to_out.weight)
    return network


@pytest.mark.parametrize(("height", "width"), [(8, 16), (16, 8)])
@pytest.mark.parametrize(("patch_size", "ratios"), [(1, ()), (2, ()), (1, (2,)), (1, (2, 4)), (2, (2,))])
def test_rows_and_columns_stay_in_place(height: int, width: int, patch_size: int, ratios: tuple[int, ...]):
    """Without attention a latent pixel is heard in its own patch (or compressed square) and nowhere else."""
    network = without_attention(tiny(patch_size=patch_size, compression_ratios=ratios, subregion_pattern=FULL))
    given, side = inputs(height, width), patch_size * max(ratios, default=1)
    before = run(network, **given)
    for row, column in [(0, 0), (1, 5), (5, 1), (height - 1, width - 3), (2, width - 1)]:
        changed = {**given, "hidden_states": given["hidden_states"].clone()}
        changed["hidden_states"][:, :, row, column] += 1
        where = (run(network, **changed) - before).abs().amax((0, 1)) > 0
        expected = torch.zeros(height, width, dtype=torch.bool)
        top, left = row // side * side, column // side * side
        expected[top : top + side, left : left + side] = True
        assert torch.equal(where, expected)


def test_output_patches_are_laid_out_as_diffusers_does():
    network, found = tiny(patch_size=2, compression_ratios=(), subregion_pattern=FULL), {}
    network.proj_out.register_forward_hook(lambda module, args, out: found.update(tokens=out))
    sample = run(network, **inputs(4, 8))
    for row, column, channel in itertools.product(range(4), range(8), range(4)):
        token, inside = row // 2 * 4 + column // 2, (row % 2 * 2 + column % 2) * 4 + channel
        assert torch.equal(sample[:, channel, row, column], found["tokens"][:, token, inside])


@pytest.mark.parametrize(("height", "width"), [(4, 8), (8, 4), (96, 4)])
def test_positions_are_the_center_of_the_table_row_by_row(height: int, width: int):
    network = tiny(subregion_pattern=FULL)
    position = network.position(height, width)
    assert position.shape == (1, height * width, 32)
    for row, column in itertools.product(range(height), range(width)):
        expected = network.pos_table[(96 - height) // 2 + row, (96 - width) // 2 + column]
        assert torch.equal(position[0, row * width + column], expected)


@pytest.mark.parametrize("reinforced", [True, False])
def test_the_skip_is_what_was_compressed_and_positions_come_back_after_it(reinforced: bool):
    network, seen = tiny(position_reinforcement=reinforced), {}
    network.blocks[1].register_forward_hook(lambda module, args, out: seen.update(before=out[0]))
    network.compressor.register_forward_hook(lambda module, args, out: seen.update(compressed=args[0]))
    network.reconstructor.register_forward_hook(lambda module, args, out: seen.update(skip=args[1], after=out))
    network.blocks[4].register_forward_pre_hook(lambda module, args: seen.update(third_group=args[0]))
    run(network, **inputs(8, 16))
    assert torch.equal(seen["compressed"], seen["before"]) and torch.equal(seen["skip"], seen["before"])
    assert torch.equal(seen["third_group"], seen["after"] + network.position(8, 16) * reinforced)


def test_the_pattern_goes_on_over_the_groups():
    with torch.device("meta"):
        kinds = [block.attn.subregions.kind for block in EMMDiTTransformer2DModel().blocks]
    assert kinds == ["full", "strided", "chunked"] * 8


# -------------------------------------------------------------------------------- switches

SWITCHES = {
    "released": {},
    "single": {"modulation": "single"},
    "zero_modulation": {"modulation": "zero"},
    "init_zero": {"init": "zero"},
    "no_compression": {"compression_ratios": ()},
    "one_path": {"compression_ratios": (2,)},
    "no_reinforcement": {"position_reinforcement": False},
    "no_subregions": {"subregion_pattern": FULL},
    "only_chunked": {"subregion_pattern": ("chunked",)},
    "patches": {"patch_size": 2, "subregion_pattern": FULL},
    "no_first_group": {"block_groups": (0, 3, 1)},
    "no_middle_group": {"block_groups": (2, 0, 1)},
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_trains_all_of_its_parameters(switch: str):
    """In the third step, for zero gates and outputs hide the rest in the first two."""
    torch.manual_seed(0)
    network = tiny(**SWITCHES[switch])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (network(**inputs(8, 16)).sample - 1).square().mean().backward()
        optimizer.step()
    idle = {name for name, p in network.named_parameters() if not p.grad.any()}
    # the last block's text queries are in the released files, but their output is dropped there, too
    last = f"blocks.{len(network.blocks) - 1}.attn"
    assert idle == {f"{last}.add_q_proj.weight", f"{last}.add_q_proj.bias", f"{last}.norm_added_q.weight"}


@pytest.mark.parametrize("modulation", ["affine", "single", "zero"])
def test_zero_init_gives_zero_and_blocks_that_do_nothing(modulation: str):
    network = tiny(init="zero", modulation=modulation)
    assert not run(network, **inputs()).any()
    time = network.time_embed(torch.tensor([3.0, 700.0]))
    if modulation != "zero":
        time = network.time_modulation(torch.nn.functional.silu(time)).unflatten(1, (6, -1))
    x, c = torch.randn(2, 64, 32), torch.randn(2, 8, 32)
    for block in network.blocks:
        x_after, c_after = block(x, c, time)
        assert torch.equal(x_after, x) and (c_after is None or torch.equal(c_after, c))
        shift, scale, *_ = block.modulation(time)
        assert modulation == "zero" or (shift.any() and scale.any())  # only gates are closed


def test_faithful_init_is_not_zero():
    network = tiny()
    assert run(network, **inputs()).abs().mean() > 0.01
    for part in ("scale", "bias"):
        drawn = torch.cat([getattr(block.modulation, part).flatten() for block in network.blocks])
        assert abs(drawn.std().item() * 32**0.5 - 1) < 0.1  # N(0, 1) / sqrt(D): docs/papers.md, B6


def test_gradient_checkpointing_changes_no_gradient():
    network = tiny().train()

    def gradients() -> list[Tensor]:
        network.zero_grad()
        network(**inputs()).sample.square().mean().backward()
        return [p.grad.clone() for p in network.parameters()]

    plain, calls = gradients(), []
    network.enable_gradient_checkpointing()
    network.blocks[3].ff.register_forward_hook(lambda *_: calls.append(1))
    checkpointed = gradients()
    assert len(calls) == 2  # once forward, once again in the backward pass
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_fused_projections_give_the_same_images_and_leave_no_trace():
    network, keys = tiny(), list(tiny().state_dict())
    before = run(network, **inputs())
    network.fuse_qkv_projections()
    assert all(block.attn.to_qkv is not None for block in network.blocks)
    torch.testing.assert_close(run(network, **inputs()), before, rtol=1e-4, atol=1e-5)
    network.unfuse_qkv_projections()
    assert list(network.state_dict()) == keys and torch.equal(run(network, **inputs()), before)


# -------------------------------------------------------------------------------- text mask


@pytest.mark.parametrize("pattern", [FULL, ("full", "strided", "chunked")], ids=["full", "subregions"])
def test_masked_padding_is_not_heard_and_unmasked_is(pattern: tuple[str, ...]):
    network, given = tiny(subregion_pattern=pattern), inputs(text=8)
    mask = torch.arange(8)[None] < torch.tensor([[3], [6]])
    other = {**given, "encoder_hidden_states": given["encoder_hidden_states"].clone()}
    other["encoder_hidden_states"][~mask] += 5
    masked = run(network, **given, encoder_attention_mask=mask)
    assert torch.equal(masked, run(network, **other, encoder_attention_mask=mask))
    assert torch.equal(masked, run(network, **given, encoder_attention_mask=mask.long()))
    # without the mask the padding takes part, as in the released network
    assert (run(network, **given) - run(network, **other)).abs().max() > 1e-3
    other["encoder_hidden_states"][:, 0] += 5
    assert (masked - run(network, **other, encoder_attention_mask=mask)).abs().max() > 1e-3


def test_a_mask_of_ones_changes_nothing_and_of_zeros_leaves_the_image():
    network, given = tiny(), inputs(text=8)
    ones = torch.ones(2, 8, dtype=torch.bool)
    torch.testing.assert_close(run(network, **given, encoder_attention_mask=ones), run(network, **given))
    assert run(network, **given, encoder_attention_mask=~ones).isfinite().all()


# -------------------------------------------------------------------------------- token grids


def test_the_grids_of_each_group():
    network = tiny()
    before, middle, after = network.groups
    assert [*before, *middle, *after] == list(range(6)) and middle
    for i in range(6):
        expected = ((4, 8), (2, 4)) if i in middle else ((8, 16),)
        assert network.token_grids(i, 8, 16) == expected
    network.check_token_grid("blocks.0")
    with pytest.raises(ValueError, match=f"blocks.{middle[0]}.*blocks.{middle[-1]}"):
        network.check_token_grid(f"blocks.{middle[0]}")
    tiny(compression_ratios=()).check_token_grid(f"blocks.{middle[0]}")
