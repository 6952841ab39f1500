"""Image codecs and vision features: each real class on a tiny random model, saved to disk and loaded back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from emmdit.encoders import DCAE, SD3VAE, SDXLVAE, AutoencoderKLCodec, DINOv2, ImageCodec, VisionFeatures, standin

DC_AE, SD3, SDXL = "standin:dc_ae", "standin:sd3_vae?sample_size=64", "standin:sdxl_vae?sample_size=64"
DINO = "standin:dinov2?feature_dim=32"


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    ("make", "channels", "down", "scale", "shift"),
    [
        (lambda: DCAE(DC_AE), 32, 32, 0.41407, 0.0),
        (lambda: SD3VAE(SD3), 16, 8, 1.5305, 0.0609),
        (lambda: SDXLVAE(SDXL), 4, 8, 0.13025, 0.0),
        (lambda: AutoencoderKLCodec(SD3, 16), 16, 8, 1.5305, 0.0609),  # both numbers from the model
    ],
)
def test_codecs_scale_the_latents_of_the_raw_model(
    make: Callable, channels: int, down: int, scale: float, shift: float
) -> None:
    x, codec = images(2, 3, 64, 96), make()
    assert isinstance(codec, ImageCodec) and not isinstance(codec, torch.nn.Module)
    assert (codec.latent_channels, codec.downsample, codec.loaded) == (channels, down, False)
    with torch.enable_grad():
        latents = codec.encode(x.clone().requires_grad_())
    assert latents.shape == (2, channels, 64 // down, 96 // down) and latents.dtype == torch.float32
    assert torch.equal(latents, codec.encode(x)) and not latents.requires_grad
    assert not codec.model.training and not any(p.requires_grad for p in codec.model.parameters())
    encoded = codec.model.encode(x)
    raw = encoded.latent if isinstance(codec, DCAE) else encoded.latent_dist.mode()
    torch.testing.assert_close(latents, (raw - shift) * scale)
    torch.testing.assert_close(codec.unscale(latents), raw)
    far = raw * 100  # far outside what it was made for, so that clamping shows
    decoded = codec.decode((far - shift) * scale)
    torch.testing.assert_close(decoded, codec.model.decode(far).sample.clamp(-1, 1))
    assert decoded.shape == x.shape and decoded.abs().max() == 1


def test_sampled_latents_follow_the_generator_and_the_posterior() -> None:
    x = images(1, 3, 32, 32)
    codec = SD3VAE(SD3, sample=True)
    one, again, other = (codec.encode(x, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    draws = codec.encode(x.expand(512, 3, 32, 32), torch.Generator().manual_seed(0))
    posterior = codec.model.encode(x).latent_dist
    torch.testing.assert_close(draws.mean(0), codec.scale(posterior.mean)[0], atol=0.35, rtol=0)
    torch.testing.assert_close(draws.std(0), posterior.std[0] * 1.5305, atol=0.35, rtol=0)


def test_slicing_keeps_the_numbers_and_tiling_the_shape() -> None:
    x = images(2, 3, 128, 64)
    for cls, source in ((SD3VAE, SD3), (DCAE, DC_AE)):
        sliced = cls(source, slicing=True)
        torch.testing.assert_close(cls(source).encode(x), sliced.encode(x), atol=1e-5, rtol=1e-4)
        assert sliced.model.use_slicing and not sliced.model.use_tiling
    tiled = SD3VAE(SD3, tiling=True)  # the tile is 64 px here
    latents = tiled.encode(x)
    assert latents.shape == (2, 16, 16, 8) and tiled.decode(latents).shape == x.shape
    assert not torch.allclose(latents, SD3VAE(SD3).encode(x), atol=1e-5)


def test_the_given_type_holds_under_autocast() -> None:
    x, codec = images(1, 3, 64, 64), DCAE(DC_AE)
    plain = codec.encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(x), plain)
    half = DCAE(DC_AE, dtype="bfloat16").encode(x)
    assert half.dtype == torch.float32 and 0 < (half - plain).abs().max() < 0.1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DCAE("none").encode(images(1, 3, 70, 64)), r"\b32\b.*70x64.*64x64"),  # seen before it is loaded
        (lambda: DCAE("none").decode(torch.zeros(1, 16, 2, 2)), r"\b32\b.*\(1, 16, 2, 2\)"),
        (lambda: DCAE(DC_AE, latent_channels=16).load(), r"latent_channels.*\b16\b.*\b32\b"),
        (lambda: DCAE(DC_AE, downsample=64).load(), r"downsample.*\b64\b.*\b32\b"),
        (lambda: DCAE(DC_AE, scaling_factor=0.3).load(), r"scaling_factor.*\b0\.3\b.*\b0\.41407\b"),
        (lambda: AutoencoderKLCodec(SD3, 16, scaling_factor=1.5305).load(), r"shift_factor.*\b0\.0\b.*\b0\.0609\b"),
        (lambda: DCAE(DC_AE, dtype="bf16"), "'bf16'.*bfloat16"),
        (lambda: SDXLVAE(SDXL, dtype="float16").load(), "float16.*madebyollin/sdxl-vae-fp16-fix"),
        (lambda: SDXLVAE(SDXL).load().to(dtype="float16"), "float16.*madebyollin/sdxl-vae-fp16-fix"),
        (lambda: DINOv2(DINO).load(), r"feature_dim.*\b768\b.*\b32\b"),
        (lambda: DINOv2(image_size=256), r"image_size.*\b256\b.*\b14"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_dinov2_equals_transformers() -> None:
    from transformers import Dinov2Model

    encoder = DINOv2(DINO, feature_dim=32)
    assert isinstance(encoder, VisionFeatures) and encoder.grid(512, 512) == (16, 16)
    x = images(2, 3, 64, 64)
    features = encoder(x)
    assert features.shape == (2, 256, 32) and features.dtype == torch.float32 and not features.requires_grad
    small = F.interpolate(x, (224, 224), mode="bicubic", antialias=True) * 0.5 + 0.5
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (small - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        raw = Dinov2Model.from_pretrained(standin(DINO[8:]))(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(features, raw[:, 1:], atol=1e-4, rtol=1e-4)


def test_dinov2_keeps_the_aspect_ratio_and_row_order() -> None:
    encoder = DINOv2(DINO, feature_dim=32, image_size=56)
    assert encoder.grid(512, 768) == (4, 6) and encoder.grid(1024, 512) == (8, 4)
    flat = torch.full((1, 3, 64, 96), -1.0)
    bright = flat.clone()
    bright[:, :, :16, :16] = 1.0  # the first of 4x6 cells
    with torch.no_grad():
        embed = encoder.model.embeddings.patch_embeddings
        change = (embed(encoder.preprocess(bright)) - embed(encoder.preprocess(flat))).abs().sum(-1)
    assert encoder(flat).shape == (1, 24, 32) and change.argmax() == 0 and change[0, 6] > change[0, 12]


def test_dinov2_with_registers(tmp_path: Path) -> None:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=1, image_size=56, patch_size=14)
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes)).eval()
    model.save_pretrained(tmp_path)
    encoder = DINOv2(str(tmp_path), feature_dim=16, image_size=56)
    x = images(1, 3, 56, 56)
    with torch.no_grad():
        raw = model(pixel_values=encoder.preprocess(x)).last_hidden_state
    assert raw.shape[1] == 1 + 4 + 16
    torch.testing.assert_close(encoder(x), raw[:, 5:], atol=1e-4, rtol=1e-4)
