"""The auxiliary losses: REPA's formula, its targets on other grids, what is refused; distances of a distillation."""

from __future__ import annotations

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from emmdit.encoders import VisionFeatures
from emmdit.losses import REPA, LossComponent, LossInputs, TeacherDistillation
from emmdit.losses.distillation import feature_distance
from emmdit.losses.repa import repa_loss
from emmdit.networks import EMMDiTTransformer2DModel

SIZES = dict(num_attention_heads=2, attention_head_dim=16, block_groups=(1, 1, 1), caption_channels=8)
SIZES |= dict(sample_size=8, in_channels=4, out_channels=4, compression_ratios=(2,), subregion_pattern=("full",))


class Ramp(VisionFeatures):
    """Patches of 4 x 4 pixels; their features are their row, their column and a one."""

    feature_dim = 3

    def __init__(self) -> None:
        self.device = None

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // 4, width // 4

    def __call__(self, images: Tensor) -> Tensor:
        rows, columns = self.grid(*images.shape[-2:])
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        features = torch.stack([row, column, torch.ones_like(row)], -1).float().flatten(0, 1)
        return features.expand(len(images), -1, -1)

    def to(self, device=None, dtype=None) -> Ramp:
        self.device = device
        return self


def inputs_of(size: int, latents: tuple[int, int], **batch) -> LossInputs:
    x = torch.zeros(size, 4, *latents)
    t = torch.zeros(size)
    return LossInputs(batch, x, x, t, x, {}, x, x)


def aligned(block: str = "blocks.0", vision: VisionFeatures | None = None, **sizes) -> tuple[REPA, nn.Module]:
    torch.manual_seed(0)
    network = EMMDiTTransformer2DModel(**SIZES | sizes).train()
    repa = REPA(block, vision, feature_dim=3, projector_dim=7)
    repa.check(network)
    repa.attach(network)
    return repa, network


def run(network: nn.Module, height: int = 8, width: int = 8) -> Tensor:
    return network(torch.randn(2, 4, height, width), torch.tensor([10.0, 900.0]), torch.randn(2, 4, 8)).sample


def test_loss_is_minus_the_mean_cosine():
    prediction, features = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    total = 0.0
    for row in range(2):
        for token in range(5):
            p, f = prediction[row, token], features[row, token]
            total += (p @ f / (p @ p).sqrt() / (f @ f).sqrt()).item()
    assert repa_loss(prediction, features).item() == pytest.approx(-total / 10, rel=1e-5)
    assert repa_loss(prediction, 3 * prediction).item() == pytest.approx(-1)
    assert repa_loss(prediction.bfloat16(), features.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("block", "height", "width"), [("blocks.0", 8, 8), ("blocks.0", 4, 8), ("blocks.2", 8, 8)])
def test_the_named_blocks_tokens_are_projected_and_both_learn(block: str, height: int, width: int):
    repa, network = aligned(block)
    seen = {}
    network.get_submodule(block).register_forward_hook(lambda module, args, output: seen.update(x=output[0]))
    run(network, height, width)
    features = torch.randn(2, height * width, 3)
    loss = repa(inputs_of(2, (height, width), features=features))
    torch.testing.assert_close(loss, repa_loss(repa.projector(seen["x"]), features))
    loss.backward()
    assert all(p.grad.any() for p in repa.parameters())
    assert network.blocks[0].attn.to_q.weight.grad.any()
    if block == "blocks.0":
        assert network.blocks[1].attn.to_q.weight.grad is None
    with pytest.raises(RuntimeError, match=block):  # an output is taken once
        repa(inputs_of(2, (height, width), features=features))


def test_any_denoiser_is_aligned_by_naming_a_block():
    sizes = dict(sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16)
    network = PixArtTransformer2DModel(**sizes, in_channels=4, out_channels=4, caption_channels=8, patch_size=2).train()
    repa = REPA("transformer_blocks.1", Ramp(), feature_dim=3, projector_dim=7)
    repa.check(network)
    repa.attach(network)
    network(
        torch.randn(2, 4, 8, 8),
        encoder_hidden_states=torch.randn(2, 3, 8),
        timestep=torch.tensor([1, 2]),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )
    repa(inputs_of(2, (8, 8), image=torch.zeros(2, 3, 16, 16))).backward()
    assert network.transformer_blocks[1].attn1.to_q.weight.grad.any()


def test_gradient_checkpointing_changes_no_gradient_of_an_aligned_network():
    """The recorded output is that of the forward pass; the recomputed one is overwritten by the next."""
    found = []
    for checkpointing in (False, True):
        repa, network = aligned()
        if checkpointing:
            network.enable_gradient_checkpointing()
        for _ in range(2):
            torch.manual_seed(1)
            prediction = run(network)
            loss = prediction.square().mean() + repa(inputs_of(2, (8, 8), features=torch.ones(2, 64, 3)))
            network.zero_grad()
            repa.zero_grad()
            loss.backward()
        found.append([p.grad for p in (*network.parameters(), *repa.parameters())])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-8)


def test_validation_and_sampling_leave_nothing_behind():
    repa, network = aligned()
    run(network.eval())
    assert "recorded_output" not in network.blocks[0].__dict__


def test_features_of_the_vision_encoder_where_grids_agree():
    images = torch.zeros(2, 3, 16, 32)
    targets = REPA("b", Ramp(), 3).targets(inputs_of(2, (4, 8), image=images), 4, 8)
    assert torch.equal(targets, Ramp()(images))


@pytest.mark.parametrize("tokens", [(8, 16), (2, 4)])
def test_features_are_resized_to_the_tokens_grid(tokens: tuple[int, int]):
    """From 4 x 8 features to another grid: rows stay rows, columns columns."""
    inputs = inputs_of(1, tokens, image=torch.zeros(1, 3, 16, 32))
    targets = REPA("b", Ramp(), 3).targets(inputs, *tokens)
    assert targets.shape == (1, tokens[0] * tokens[1], 3)
    rows, columns, ones = targets[0].T.unflatten(1, tokens)
    torch.testing.assert_close(ones, torch.ones(tokens))
    # a coarse index, sampled at the centers of the fine cells, away from the border
    scale = 4 / tokens[0]
    assert (rows == rows[:, :1]).all() and (columns == columns[:1]).all()
    inner = slice(1, -1) if scale < 1 else slice(None)
    expected = (torch.arange(tokens[0]) + 0.5) * scale - 0.5
    torch.testing.assert_close(rows[inner, 0], expected[inner], rtol=0, atol=0.25 if scale > 1 else 1e-5)
    expected = (torch.arange(tokens[1]) + 0.5) * scale - 0.5
    torch.testing.assert_close(columns[0, inner], expected[inner], rtol=0, atol=0.25 if scale > 1 else 1e-5)


def test_precomputed_features_serve_a_larger_grid():
    """1024 px: 256 features for 1024 tokens."""
    features = torch.randn(1, 16, 3)
    repa = REPA("b", feature_dim=3)
    assert repa.targets(inputs_of(1, (8, 8), features=features), 8, 8).shape == (1, 64, 3)
    wide = Ramp()(torch.zeros(1, 3, 16, 32))  # 4 x 8
    rows, columns, _ = repa.targets(inputs_of(1, (8, 16), features=wide), 8, 16)[0].T
    assert (rows.view(8, 16)[:, :1] == rows.view(8, 16)).all() and (
        columns.view(8, 16)[:1] == columns.view(8, 16)
    ).all()
    with pytest.raises(ValueError, match="12.*8 x 8"):
        repa.targets(inputs_of(1, (8, 8), features=features[:, :12]), 8, 8)


def test_targets_carry_no_gradient():
    features = torch.randn(1, 4, 3, requires_grad=True)
    assert not REPA("b").targets(inputs_of(1, (4, 4), features=features), 4, 4).requires_grad


def test_nothing_to_align_with_is_refused():
    for repa, batch in ((REPA("b"), {"image": torch.zeros(1, 3, 16, 16)}), (REPA("b", Ramp(), 3), {})):
        with pytest.raises(ValueError, match="vision.*features"):
            repa.targets(inputs_of(1, (4, 4), **batch), 4, 4)


def test_network_and_vision_must_agree():
    network = EMMDiTTransformer2DModel(**SIZES)
    with pytest.raises(ValueError, match="blocks.7.*EMMDiTTransformer2DModel"):
        REPA("blocks.7").check(network)
    with pytest.raises(ValueError, match="blocks.1"):  # among the compressed tokens
        REPA("blocks.1").check(network)
    with pytest.raises(ValueError, match="768.*Ramp.*3"):
        REPA("blocks.0", Ramp()).check(network)
    REPA("blocks.0", Ramp(), feature_dim=3).check(network)
    REPA("blocks.0", feature_dim=5).check(network)


def test_weights_and_frozen_parts():
    assert REPA("b").weights == {"repa": 0.5}
    for weight in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="repa.*REPA"):
            REPA("b", weight=weight)
    vision = Ramp()
    REPA("b", vision).move(torch.device("cpu"))
    assert vision.device == torch.device("cpu")
    assert not list(REPA("b", vision).children())  # a frozen encoder is no submodule


def test_one_loss_or_several_by_name():
    class Two(LossComponent):
        name = "two"

        def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
            return {"a": inputs.x0.mean(), "b": inputs.t.mean()}

    assert Two(a=1.0, b=0.0).by_name(inputs_of(1, (2, 2))).keys() == {"a", "b"}
    repa, network = aligned()
    run(network)
    assert repa.by_name(inputs_of(2, (8, 8), features=torch.randn(2, 64, 3))).keys() == {"repa"}


def test_feature_distance_in_closed_form():
    image, prompt = torch.randn(2, 6, 4), torch.randn(2, 3, 4)
    teacher = {"a": (image, prompt), "b": (10 * image,)}
    student = {"a": (1.1 * image, prompt), "b": (10 * 1.2 * image,)}
    # relative: 0.1^2, 0 and 0.2^2, whatever a layer's scale
    assert feature_distance(student, teacher).item() == pytest.approx((0.01 + 0 + 0.04) / 3, rel=1e-4)
    square = image.square().mean().item()
    plain = feature_distance(student, teacher, relative=False).item()
    assert plain == pytest.approx((0.01 * square + 0 + 0.04 * 100 * square) / 3, rel=1e-4)


def test_a_distillation_without_a_weight_is_refused():
    with pytest.raises(ValueError, match="output_weight.*feature_weight"):
        TeacherDistillation("teacher", output_weight=0.0, feature_weight=0.0)
    with pytest.raises(ValueError, match="output"):
        TeacherDistillation("teacher", output_weight=-1.0)
