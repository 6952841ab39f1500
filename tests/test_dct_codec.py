"""The block-DCT codec: what it keeps, what it refuses, and its normalization."""

from __future__ import annotations

import pytest
import torch

from emmdit.encoders.base import ImageCodec
from emmdit.encoders.dct import BlockDCT, DCTCodec, block_matrices, coefficient_order, fold_blocks
from emmdit.shapes import ShapesDataset


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    data = ShapesDataset(seed=21, length=400)
    return torch.stack([data[i]["image"] for i in range(400)])


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean()))


def test_the_codec_keeps_40_db_of_the_world(images):
    codec = DCTCodec()
    latents = codec.encode(images)
    assert isinstance(codec, ImageCodec) and (codec.latent_channels, codec.downsample) == (32, 4)
    assert latents.shape == (400, 32, 8, 8) and latents.dtype == torch.float32 and latents.is_contiguous()
    assert psnr(codec.decode(latents), images) >= 40
    assert codec.decode(20 * latents).abs().max() == 1 < codec.model.decode(20 * latents).abs().max()


@pytest.mark.parametrize("size", [(32, 32), (12, 40)])
def test_all_coefficients_lose_nothing(size):
    noise = torch.rand(3, 3, *size) * 2 - 1
    codec = DCTCodec(channels=48)
    latents = codec.encode(noise)
    assert latents.shape == (3, 48, size[0] // 4, size[1] // 4)
    assert torch.allclose(codec.decode(latents), noise, atol=1e-5)


def test_latents_survive_decoding_and_encoding():
    model = BlockDCT()
    latents = torch.randn(2, 32, 8, 8)
    assert torch.allclose(model.encode(model.decode(latents)), latents, atol=1e-3)


def test_blocks_and_coefficients_lie_where_they_should():
    """A bright block shows at its own place; horizontal and vertical frequencies differ."""
    image = -torch.ones(1, 3, 16, 16)
    image[:, :, 4:8, 8:12] = 1
    change = DCTCodec().encode(image) - DCTCodec().encode(-torch.ones_like(image))
    assert change.abs().amax(1)[0].nonzero().tolist() == [[1, 2]]
    n = 4
    analysis, synthesis = block_matrices(n)
    stripes = torch.zeros(1, 3, n, n, dtype=torch.float64) + torch.tensor([1.0, -1.0, -1.0, 1.0])  # along x
    coefficients = (fold_blocks(stripes, n).flatten() @ analysis).view(3, n, n)
    assert coefficients.abs()[0, 0].argmax() == 2 and coefficients[0, 1:].abs().max() < 1e-12
    assert coefficients[1:].abs().max() < 1e-5  # gray has no chroma
    assert torch.allclose(analysis @ synthesis, torch.eye(48, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("whitening", [1.0, 0.5, 0.0])
def test_whitening_sets_the_spectrum_and_keeps_variance_one(images, whitening):
    codec = DCTCodec(whitening=whitening)
    latents = codec.encode(images)
    std = latents.std(dim=(0, 2, 3))
    assert latents.var().item() == pytest.approx(1, abs=0.06)
    natural = torch.tensor(codec.model.config.latents_std)
    expected = natural ** (1 - whitening)
    expected = expected / expected.square().mean().sqrt()
    assert torch.allclose(std, expected, rtol=0.1)
    assert psnr(codec.decode(latents), images) >= 40


def test_other_block_sizes_are_fitted_to_images(images):
    codec = DCTCodec(model=BlockDCT.fitted(images, block_size=8, channels=128))
    latents = codec.encode(images)
    assert latents.shape == (400, 128, 4, 4) and codec.downsample == 8
    assert torch.allclose(latents.std(dim=(0, 2, 3)), torch.ones(128), atol=1e-2)
    assert psnr(codec.decode(latents), images) > 37
    assert sorted(coefficient_order(8)) == list(range(192)) and sorted(coefficient_order(4)) == list(range(48))


def test_save_and_load(tmp_path, images):
    model = BlockDCT.fitted(images[:50] * 0.5, channels=20, whitening=0.3)
    model.save_pretrained(tmp_path)
    loaded = DCTCodec(model=BlockDCT.from_pretrained(tmp_path))
    assert loaded.latent_channels == 20 and loaded.model.config.whitening == 0.3
    assert torch.equal(loaded.encode(images[:4]), model.encode(images[:4]))
    assert not any(p.requires_grad for p in loaded.model.parameters()) and not loaded.model.training
    BlockDCT().save_pretrained(tmp_path)
    assert len(BlockDCT.load_config(tmp_path)["latents_mean"]) == 32  # defaults are written down, too


def test_type_and_autocast():
    images = torch.rand(2, 3, 8, 8)
    codec = DCTCodec()
    plain = codec.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(images), plain)
    half = codec.to(dtype="bfloat16").encode(images)
    assert half.dtype == torch.float32 and codec.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DCTCodec().encode(torch.zeros(1, 3, 30, 32)), r"\b4\b.*\(1, 3, 30, 32\)"),
        (lambda: DCTCodec().encode(torch.zeros(1, 1, 32, 32)), r"\(B, 3, H, W\).*\(1, 1, 32, 32\)"),
        (lambda: DCTCodec().encode(torch.zeros(3, 32, 32)), r"\(B, 3, H, W\).*\(3, 32, 32\)"),
        (lambda: DCTCodec().decode(torch.zeros(1, 31, 8, 8)), r"\b32\b.*\(1, 31, 8, 8\)"),
        (lambda: BlockDCT(channels=49), r"\b48\b.*\b49\b"),
        (lambda: BlockDCT(block_size=8), r"BlockDCT\.fitted"),
        (lambda: BlockDCT(block_size=65536, channels=2), "65536"),
        (lambda: BlockDCT(latents_mean=[0.0] * 32), r"BlockDCT(?!.*\d).*latents_mean.*latents_std"),
        (lambda: BlockDCT(latents_mean=[0.0] * 31, latents_std=[1.0] * 31), r"\b32\b.*latents_mean.*latents_std"),
    ],
)
def test_wrong_shapes_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
