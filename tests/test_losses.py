"""The auxiliary losses: REPA's formula, its targets on other grids, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emmdit.encoders import VisionFeatures
from emmdit.losses import REPA, TrainingStep
from emmdit.losses.repa import repa_loss
from emmdit.networks import EMMDiTOutput, EMMDiTTransformer2DModel


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


def step_of(repa: Tensor, latents: tuple[int, int], **batch) -> TrainingStep:
    x = torch.zeros(len(repa), 4, *latents)
    t = torch.zeros(len(repa))
    return TrainingStep(batch, x, x, t, x, {}, x, x, EMMDiTOutput(sample=x, repa=repa))


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


def test_features_of_the_batch_as_they_are():
    prediction, features = torch.randn(2, 32, 3, requires_grad=True), torch.randn(2, 32, 3)
    loss = REPA()(step_of(prediction, (4, 8), features=features))
    torch.testing.assert_close(loss, repa_loss(prediction, features))
    loss.backward()
    assert prediction.grad.any()


def test_features_of_the_vision_encoder_where_grids_agree():
    images = torch.zeros(2, 3, 16, 32)
    targets = REPA(Ramp()).targets(step_of(torch.zeros(2, 32, 3), (4, 8), image=images), 4, 8)
    assert torch.equal(targets, Ramp()(images))


@pytest.mark.parametrize(("latents", "tokens"), [((8, 16), (8, 16)), ((16, 32), (8, 16)), ((2, 4), (2, 4))])
def test_features_are_resized_to_the_tokens_grid(latents: tuple[int, int], tokens: tuple[int, int]):
    """From 4 x 8 features to another grid, also with patches: rows stay rows, columns columns."""
    step = step_of(torch.randn(1, tokens[0] * tokens[1], 3), latents, image=torch.zeros(1, 3, 16, 32))
    seen = {}
    repa = REPA(Ramp())
    original = repa.targets
    repa.targets = lambda *args: seen.setdefault("targets", original(*args))
    loss = repa(step)
    targets = seen["targets"]
    assert targets.shape == (1, tokens[0] * tokens[1], 3)
    torch.testing.assert_close(loss, repa_loss(step.output.repa, targets))
    rows, columns, ones = targets[0].T.unflatten(1, tokens)
    torch.testing.assert_close(ones, torch.ones(tokens))
    # a coarse index, sampled at the centres of the fine cells, away from the border
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
    targets = REPA().targets(step_of(torch.zeros(1, 64, 3), (8, 8), features=features), 8, 8)
    assert targets.shape == (1, 64, 3)
    wide = Ramp()(torch.zeros(1, 3, 16, 32))  # 4 x 8
    rows, columns, _ = REPA().targets(step_of(torch.zeros(1, 128, 3), (8, 16), features=wide), 8, 16)[0].T
    assert (rows.view(8, 16)[:, :1] == rows.view(8, 16)).all() and (
        columns.view(8, 16)[:1] == columns.view(8, 16)
    ).all()
    with pytest.raises(ValueError, match=r"\b12\b.*8 x 8"):
        REPA().targets(step_of(torch.zeros(1, 64, 3), (8, 8), features=features[:, :12]), 8, 8)


def test_targets_carry_no_gradient():
    features = torch.randn(1, 4, 3, requires_grad=True)
    assert not REPA().targets(step_of(torch.zeros(1, 16, 3), (4, 4), features=features), 4, 4).requires_grad


def test_nothing_to_align_with_is_refused():
    for repa, batch in ((REPA(), {"image": torch.zeros(1, 3, 16, 16)}), (REPA(Ramp()), {})):
        with pytest.raises(ValueError, match="REPA.*`features`"):
            repa(step_of(torch.zeros(1, 16, 3), (4, 4), **batch))


def test_network_and_vision_must_agree():
    config = dict(num_attention_heads=2, attention_head_dim=16, block_groups=(1, 1, 1), caption_channels=8)
    with pytest.raises(ValueError, match="repa_feature_dim"):
        REPA(Ramp()).check(EMMDiTTransformer2DModel(**config))
    with pytest.raises(ValueError, match=r"repa_feature_dim.*\b5\b.*Ramp.*\b3\b"):
        REPA(Ramp()).check(EMMDiTTransformer2DModel(**config, repa_feature_dim=5))
    REPA(Ramp()).check(EMMDiTTransformer2DModel(**config, repa_feature_dim=3))
    REPA().check(EMMDiTTransformer2DModel(**config, repa_feature_dim=5))


def test_weight_and_frozen_parts():
    assert REPA().weight == 0.5 and REPA().network_kwargs == {"return_repa": True}
    with pytest.raises(ValueError, match=r"REPA.*-0\.1"):
        REPA(weight=-0.1)
    vision = Ramp()
    REPA(vision).to(torch.device("cpu"))
    assert vision.device == torch.device("cpu")
    REPA().to(torch.device("cpu"))
