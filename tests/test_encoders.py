"""Image codecs and vision features: each real class on a tiny random model, saved to disk and loaded back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from emmdit.encoders import (
    DCAE,
    SD3VAE,
    SDXLVAE,
    AutoencoderKLCodec,
    DINOv2,
    ImageCodec,
    VisionFeatures,
    standins,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "dc_ae": standins.tiny_dc_ae(root / "dc_ae"),
        "sd3_vae": standins.tiny_sd3_vae(root / "sd3" / "vae", sample_size=64).parent,
        "sdxl_vae": standins.tiny_sdxl_vae(root / "sdxl_vae", sample_size=64),
        "dinov2": standins.tiny_dinov2(root / "dinov2", feature_dim=32),
    }


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def codecs(folders: dict[str, Path]) -> list[tuple[AutoencoderKLCodec | DCAE, int, int]]:
    return [
        (DCAE(str(folders["dc_ae"])), 32, 32),
        (SD3VAE(str(folders["sd3_vae"])), 16, 8),
        (SDXLVAE(str(folders["sdxl_vae"])), 4, 8),
        (AutoencoderKLCodec(str(folders["sd3_vae"]), latent_channels=16, subfolder="vae"), 16, 8),
    ]


def test_codecs_shapes_determinism_and_frozen(folders: dict[str, Path]) -> None:
    x = images(2, 3, 64, 96)
    for codec, channels, down in codecs(folders):
        assert isinstance(codec, ImageCodec) and not isinstance(codec, torch.nn.Module)
        assert (codec.latent_channels, codec.downsample, codec.loaded) == (channels, down, False)
        with torch.enable_grad():
            latents = codec.encode(x.clone().requires_grad_())
            decoded = codec.decode(latents * 100)  # far outside what it was made for, so that clamping shows
        assert latents.shape == (2, channels, 64 // down, 96 // down) and latents.dtype == torch.float32
        assert decoded.shape == x.shape and decoded.abs().max() <= 1
        assert torch.equal(latents, codec.encode(x)) and not latents.requires_grad
        assert not codec.model.training and not any(p.requires_grad for p in codec.model.parameters())


def test_scaling_is_that_of_the_raw_model(folders: dict[str, Path]) -> None:
    from diffusers import AutoencoderDC, AutoencoderKL

    x = images(1, 3, 64, 64)
    with torch.no_grad():
        raw = AutoencoderDC.from_pretrained(folders["dc_ae"])
        z = raw.encode(x).latent
        codec = DCAE(str(folders["dc_ae"]))
        torch.testing.assert_close(codec.encode(x), z * 0.41407)
        torch.testing.assert_close(codec.decode(z * 0.41407), raw.decode(z).sample.clamp(-1, 1))

        raw = AutoencoderKL.from_pretrained(folders["sd3_vae"], subfolder="vae")
        z = raw.encode(x).latent_dist.mode()
        for codec in (
            SD3VAE(str(folders["sd3_vae"])),
            AutoencoderKLCodec(str(folders["sd3_vae"] / "vae"), 16),
        ):
            torch.testing.assert_close(codec.encode(x), (z - 0.0609) * 1.5305)
            torch.testing.assert_close(codec.decode((z - 0.0609) * 1.5305), raw.decode(z).sample.clamp(-1, 1))
        torch.testing.assert_close(codec.unscale(codec.scale(z)), z)

        raw = AutoencoderKL.from_pretrained(folders["sdxl_vae"])
        codec = SDXLVAE(str(folders["sdxl_vae"]))
        torch.testing.assert_close(codec.encode(x), raw.encode(x).latent_dist.mean * 0.13025)


def test_sampled_latents_follow_the_generator_and_the_posterior(folders: dict[str, Path]) -> None:
    x = images(1, 3, 32, 32)
    codec = SD3VAE(str(folders["sd3_vae"]), sample=True)
    one, again, other = (codec.encode(x, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    draws = codec.encode(x.expand(512, 3, 32, 32), torch.Generator().manual_seed(0))
    posterior = codec.model.encode(x).latent_dist
    torch.testing.assert_close(draws.mean(0), codec.scale(posterior.mean)[0], atol=0.35, rtol=0)
    torch.testing.assert_close(draws.std(0), posterior.std[0] * 1.5305, atol=0.35, rtol=0)


def test_slicing_keeps_the_numbers_and_tiling_the_shape(folders: dict[str, Path]) -> None:
    x = images(2, 3, 128, 64)
    for cls, source in ((SD3VAE, folders["sd3_vae"]), (DCAE, folders["dc_ae"])):
        plain, sliced = cls(str(source)), cls(str(source), slicing=True)
        torch.testing.assert_close(plain.encode(x), sliced.encode(x), atol=1e-5, rtol=1e-4)
        assert sliced.model.use_slicing and not sliced.model.use_tiling
    tiled = SD3VAE(str(folders["sd3_vae"]), tiling=True)  # the tile is 64 px here
    latents = tiled.encode(x)
    assert latents.shape == (2, 16, 16, 8) and tiled.decode(latents).shape == x.shape
    assert not torch.allclose(latents, SD3VAE(str(folders["sd3_vae"])).encode(x), atol=1e-5)


def test_the_given_type_holds_under_autocast(folders: dict[str, Path]) -> None:
    x = images(1, 3, 64, 64)
    codec = DCAE(str(folders["dc_ae"]))
    plain = codec.encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(x), plain)
    half = DCAE(str(folders["dc_ae"]), dtype="bfloat16").encode(x)
    assert half.dtype == torch.float32 and 0 < (half - plain).abs().max() < 0.1


def test_codec_errors(folders: dict[str, Path]) -> None:
    codec = DCAE(str(folders["dc_ae"]))
    with pytest.raises(ValueError, match=r"\b32\b.*70x64.*64x64"):
        codec.encode(images(1, 3, 70, 64))
    with pytest.raises(ValueError, match=r"\b32\b.*\(1, 16, 2, 2\)"):
        codec.decode(torch.zeros(1, 16, 2, 2))
    assert not codec.loaded  # both were seen before anything was loaded
    with pytest.raises(ValueError, match=r"latent_channels.*\b16\b.*\b32\b"):
        DCAE(str(folders["dc_ae"]), latent_channels=16).load()
    with pytest.raises(ValueError, match=r"downsample.*\b64\b.*\b32\b"):
        DCAE(str(folders["dc_ae"]), downsample=64).load()
    with pytest.raises(ValueError, match=r"scaling_factor.*\b0\.3\b.*\b0\.41407\b"):
        DCAE(str(folders["dc_ae"]), scaling_factor=0.3).load()
    with pytest.raises(ValueError, match=r"shift_factor.*\b0\.0\b.*\b0\.0609\b"):
        AutoencoderKLCodec(str(folders["sd3_vae"]), 16, scaling_factor=1.5305, subfolder="vae").load()
    with pytest.raises(ValueError, match="'bf16'.*bfloat16"):
        DCAE(str(folders["dc_ae"]), dtype="bf16")
    with pytest.raises(ValueError, match="float16.*madebyollin/sdxl-vae-fp16-fix"):
        SDXLVAE(str(folders["sdxl_vae"]), dtype="float16").load()
    with pytest.raises(ValueError, match="float16.*madebyollin/sdxl-vae-fp16-fix"):
        SDXLVAE(str(folders["sdxl_vae"])).load().to(dtype="float16")


def test_dinov2_equals_transformers(folders: dict[str, Path]) -> None:
    from transformers import Dinov2Model

    encoder = DINOv2(str(folders["dinov2"]), feature_dim=32)
    assert isinstance(encoder, VisionFeatures) and encoder.grid(512, 512) == (16, 16)
    x = images(2, 3, 64, 64)
    features = encoder(x)
    assert features.shape == (2, 256, 32) and features.dtype == torch.float32 and not features.requires_grad
    small = F.interpolate(x, (224, 224), mode="bicubic", antialias=True) * 0.5 + 0.5
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (small - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        raw = Dinov2Model.from_pretrained(folders["dinov2"])(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(features, raw[:, 1:], atol=1e-4, rtol=1e-4)
    # "after the final LayerNorm": its weight is still 1 and its bias 0 in a fresh model
    torch.testing.assert_close(features.mean(-1), torch.zeros(2, 256), atol=1e-4, rtol=0)


def test_dinov2_keeps_the_aspect_ratio_and_row_order(folders: dict[str, Path]) -> None:
    encoder = DINOv2(str(folders["dinov2"]), feature_dim=32, image_size=56)
    assert encoder.grid(512, 768) == (4, 6) and encoder.grid(1024, 512) == (8, 4)
    flat = torch.full((1, 3, 64, 96), -1.0)
    bright = flat.clone()
    bright[:, :, :16, :16] = 1.0  # the first of 4x6 cells
    with torch.no_grad():
        embed = encoder.model.embeddings.patch_embeddings
        change = (embed(encoder.preprocess(bright)) - embed(encoder.preprocess(flat))).abs().sum(-1)
    assert encoder(flat).shape == (1, 24, 32) and change.argmax() == 0 and change[0, 6] > change[0, 12]
    with pytest.raises(ValueError, match=r"feature_dim.*\b768\b.*\b32\b"):
        DINOv2(str(folders["dinov2"])).load()
    with pytest.raises(ValueError, match=r"image_size.*\b256\b.*\b14"):
        DINOv2(image_size=256)


def test_dinov2_with_registers(tmp_path: Path) -> None:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=1, image_size=56, patch_size=14
    )
    model = Dinov2WithRegistersModel(config).eval()
    model.save_pretrained(tmp_path)
    encoder = DINOv2(str(tmp_path), feature_dim=16, image_size=56)
    x = images(1, 3, 56, 56)
    with torch.no_grad():
        raw = model(pixel_values=encoder.preprocess(x)).last_hidden_state
    assert raw.shape[1] == 1 + 4 + 16
    torch.testing.assert_close(encoder(x), raw[:, 5:], atol=1e-4, rtol=1e-4)
