"""The frozen encoders: every real class on a tiny random model, saved to disk and loaded back from there."""

from __future__ import annotations

import json
import subprocess
import sys
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
    MissingModelError,
    SD3TextEncoders,
    TextConditioner,
    TextEncoder,
    VisionFeatures,
    loading,
    standin,
    standins,
)

CAPTIONS = ["a photo of a red circle", "two blue squares left of a star"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "dc_ae": standins.tiny_dc_ae(root / "dc_ae"),
        "sd3_vae": standins.tiny_sd3_vae(root / "sd3" / "vae", sample_size=64).parent,
        "sdxl_vae": standins.tiny_sdxl_vae(root / "sdxl_vae", sample_size=64),
        "llama": standins.tiny_llama_text(root / "llama", caption_channels=32, layers=2),
        "t5": standins.tiny_t5(root / "t5", caption_channels=24),
        "clip": standins.tiny_clip_text(root / "clip", hidden_size=16),
        "sd3_text": standins.tiny_sd3_text(root / "sd3_text", clip_l=16, clip_g=24, caption_channels=64),
        "dinov2": standins.tiny_dinov2(root / "dinov2", feature_dim=32),
    }


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def llama(folders: dict[str, Path], **options) -> TextEncoder:
    return TextEncoder(
        str(folders["llama"]), **{"max_length": 12, "caption_channels": 32, "dtype": "float32"} | options
    )


# ---------------------------------------------------------------------------------------------- image codecs


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
            latents = codec.encode(x)
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
    with pytest.raises(ValueError, match="divisible by 32, not 70x64: resize or crop to 64x64"):
        codec.encode(images(1, 3, 70, 64))
    with pytest.raises(ValueError, match=r"decodes latents \(B,32,h,w\), not \(1, 16, 2, 2\)"):
        codec.decode(torch.zeros(1, 16, 2, 2))
    assert not codec.loaded  # both were seen before anything was loaded
    with pytest.raises(ValueError, match="latent_channels is 16, but the model in .* has 32"):
        DCAE(str(folders["dc_ae"]), latent_channels=16).load()
    with pytest.raises(ValueError, match="downsample is 64, but .* has 32"):
        DCAE(str(folders["dc_ae"]), downsample=64).load()
    with pytest.raises(ValueError, match="scaling_factor is 0.3, but .* has 0.41407"):
        DCAE(str(folders["dc_ae"]), scaling_factor=0.3).load()
    with pytest.raises(ValueError, match="shift_factor is 0.0, but .* has 0.0609"):
        AutoencoderKLCodec(str(folders["sd3_vae"]), 16, scaling_factor=1.5305, subfolder="vae").load()
    with pytest.raises(ValueError, match="not a floating-point type"):
        DCAE(str(folders["dc_ae"]), dtype="bf16")
    with pytest.raises(ValueError, match="overflows in float16"):
        SDXLVAE(str(folders["sdxl_vae"]), dtype="float16").load()
    with pytest.raises(ValueError, match="overflows in float16"):
        SDXLVAE(str(folders["sdxl_vae"])).load().to(dtype="float16")


# ---------------------------------------------------------------------------------------------------- text


def test_llama_is_padded_on_the_right_with_eos_and_masked_inside(folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer, LlamaModel

    encoder = llama(folders)
    ids, mask = encoder.tokenize([CAPTIONS[0], ""])
    eos = AutoTokenizer.from_pretrained(folders["llama"]).eos_token_id
    n = int(mask[0].sum())
    assert (
        2 < n < 12
        and mask[0].tolist() == [1] * n + [0] * (12 - n)
        and ids[0, n:].tolist() == [eos] * (12 - n)
    )
    assert mask[1].tolist() == [1] + [0] * 11  # BOS alone

    condition = encoder(CAPTIONS)
    assert set(condition) == {"encoder_hidden_states"} and isinstance(encoder, TextConditioner)
    ids, mask = encoder.tokenize(CAPTIONS)
    with torch.no_grad():
        raw = LlamaModel.from_pretrained(folders["llama"])(
            input_ids=ids, attention_mask=mask
        ).last_hidden_state
    torch.testing.assert_close(condition["encoder_hidden_states"], raw)
    assert type(encoder.model) is LlamaModel and not encoder.model.training
    assert not any(p.requires_grad for p in encoder.model.parameters())


def test_padding_side_mask_and_truncation(folders: dict[str, Path]) -> None:
    right, left = (
        llama(folders, padding_side=side, with_mask=True)([CAPTIONS[0]]) for side in ("right", "left")
    )
    mask = right["encoder_attention_mask"]
    assert mask.dtype == torch.bool and torch.equal(mask.flip(1), left["encoder_attention_mask"])
    # Rotary positions are relative and the padding is masked: the real tokens read the same on either side.
    torch.testing.assert_close(
        right["encoder_hidden_states"][mask],
        left["encoder_hidden_states"][left["encoder_attention_mask"]],
        atol=1e-4,
        rtol=1e-4,
    )
    ids, mask = llama(folders, max_length=5).tokenize([CAPTIONS[1]])
    assert torch.equal(ids[0], llama(folders, max_length=30).tokenize([CAPTIONS[1]])[0][0, :5]) and mask.all()
    unmasked = llama(folders, mask_encoder=False)([CAPTIONS[0]])["encoder_hidden_states"]
    assert not torch.allclose(unmasked, llama(folders)([CAPTIONS[0]])["encoder_hidden_states"])


def test_null_is_encoded_once(folders: dict[str, Path]) -> None:
    encoder = llama(folders, with_mask=True).load()
    calls = []
    encoder.model.register_forward_hook(lambda *_: calls.append(1))
    three, five = encoder.null(3), encoder.null(5)
    assert len(calls) == 1 and three["encoder_hidden_states"].shape == (3, 12, 32)
    assert five["encoder_hidden_states"].shape == (5, 12, 32) and five["encoder_attention_mask"].sum() == 5
    torch.testing.assert_close(three["encoder_hidden_states"], encoder([""] * 3)["encoder_hidden_states"])
    assert len(calls) == 2
    encoder.to("cpu", "bfloat16")
    assert encoder.null(1)["encoder_hidden_states"].dtype == torch.bfloat16 and len(calls) == 3


def test_moving_keeps_the_rotary_frequencies(folders: dict[str, Path]) -> None:
    encoder = llama(folders, dtype="bfloat16", max_length=64)
    before = encoder(CAPTIONS)["encoder_hidden_states"]
    encoder.to("cpu").to("cpu", torch.bfloat16)
    assert torch.equal(encoder(CAPTIONS)["encoder_hidden_states"], before)
    cast = llama(folders, max_length=64).load().to(dtype="bfloat16")
    assert torch.equal(cast(CAPTIONS)["encoder_hidden_states"], before)


def test_t5_uses_the_encoder_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, T5Config, T5EncoderModel, T5ForConditionalGeneration

    options = dict(max_length=10, caption_channels=24, dtype="float32", with_mask=True)
    encoder = TextEncoder(str(folders["t5"]), **options)
    condition = encoder([CAPTIONS[0], ""])
    assert type(encoder.model) is T5EncoderModel
    assert condition["encoder_hidden_states"].shape == (2, 10, 24)
    assert condition["encoder_attention_mask"].sum(1).tolist()[1] == 1  # EOS
    ids, mask = encoder.tokenize([CAPTIONS[0], ""])
    raw = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(condition["encoder_hidden_states"], raw)

    whole = T5ForConditionalGeneration(T5Config.from_pretrained(folders["t5"]))  # a checkpoint with a decoder
    whole.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folders["t5"]).save_pretrained(tmp_path)
    encoder = TextEncoder(str(tmp_path), **options).load()
    assert type(encoder.model) is T5EncoderModel
    torch.testing.assert_close(encoder.model.shared.weight, whole.shared.weight.detach())


def test_pixart_layout_with_a_sentencepiece_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    import sentencepiece
    from transformers import T5EncoderModel

    T5EncoderModel.from_pretrained(folders["t5"]).save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 20),
        model_prefix=str(tmp_path / "tokenizer" / "spiece"),
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    encoder = TextEncoder(
        str(tmp_path),
        max_length=40,
        caption_channels=24,
        dtype="float32",
        with_mask=True,
        subfolder="text_encoder",
        tokenizer_subfolder="tokenizer",
    )
    condition = encoder([*CAPTIONS, ""])
    assert condition["encoder_hidden_states"].shape == (3, 40, 24)
    lengths = condition["encoder_attention_mask"].sum(1).tolist()
    assert lengths[2] == 1 and min(lengths[:2]) > 5 and max(lengths) < 40


def test_clip_pooled(folders: dict[str, Path]) -> None:
    encoder = TextEncoder(
        str(folders["clip"]), max_length=77, caption_channels=16, dtype="float32", pooled=True
    )
    condition = encoder(CAPTIONS)
    ids, mask = encoder.tokenize(CAPTIONS)
    end = (ids == encoder.tokenizer.eos_token_id).int().argmax(1)
    last = condition["encoder_hidden_states"][torch.arange(2), end]
    torch.testing.assert_close(condition["pooled_projections"], encoder.model.text_projection(last))
    assert encoder.null(3)["pooled_projections"].shape == (3, 16)


def test_other_architectures_and_an_encoder_decoder_go_through_automodel(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, BartConfig, BartModel, GPT2Config, GPT2Model

    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    sizes = dict(vocab_size=len(tokenizer), max_position_embeddings=32)
    bart = BartConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        **sizes,
    )
    gpt2 = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2)
    for name, model in (("bart", BartModel(bart)), ("gpt2", GPT2Model(gpt2))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        encoder = TextEncoder(str(tmp_path / name), max_length=8, caption_channels=16, dtype="float32")
        assert encoder(CAPTIONS)["encoder_hidden_states"].shape == (2, 8, 16)
        assert not hasattr(encoder.model, "decoder")
        with pytest.raises(ValueError, match="reads at most 32 tokens"):
            TextEncoder(str(tmp_path / name), max_length=64, caption_channels=16).load()


def test_an_empty_caption_without_bos_is_finite(folders: dict[str, Path], tmp_path: Path) -> None:
    from tokenizers import processors
    from transformers import AutoTokenizer, LlamaModel

    LlamaModel.from_pretrained(folders["llama"]).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    tokenizer.save_pretrained(tmp_path)
    for side in ("left", "right"):
        encoder = llama({"llama": tmp_path}, padding_side=side, with_mask=True)
        null = encoder.null(2)
        assert null["encoder_hidden_states"].isfinite().all()
        assert (
            null["encoder_attention_mask"][0].tolist()
            == ([True] + [False] * 11)[:: 1 if side == "right" else -1]
        )


def test_text_errors_and_cleaning(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="caption_channels is 2048, but the model in .* has 32"):
        llama(folders, caption_channels=2048).load()
    with pytest.raises(ValueError, match="pooled needs a CLIP text model, and .* holds a LlamaModel"):
        llama(folders, pooled=True).load()
    with pytest.raises(ValueError, match="padding_side is 'left' or 'right'"):
        llama(folders, padding_side="middle")
    with pytest.raises(ValueError, match="list of strings"):
        llama(folders)("a photo")
    clean, raw = llama(folders, clean_captions=True), llama(folders)
    assert torch.equal(clean.tokenize([" A  Red\ncircle "])[0], raw.tokenize(["a red circle"])[0])
    assert not torch.equal(raw.tokenize([" A  Red\ncircle "])[0], raw.tokenize(["a red circle"])[0])


def test_sd3_conditioning_equals_the_diffusers_pipeline(folders: dict[str, Path]) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    options = dict(caption_channels=64, clip_channels=(16, 24), dtype="float32")
    encoders = SD3TextEncoders(str(folders["sd3_text"]), t5_length=20, **options)
    assert (encoders.max_length, encoders.caption_channels, encoders.pooled_channels) == (97, 64, 40)
    condition = encoders(CAPTIONS)
    network = SD3Transformer2DModel(
        sample_size=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=16,
        pooled_projection_dim=40,
        pos_embed_max_size=8,
    ).eval()
    pipeline = StableDiffusion3Pipeline(
        transformer=network, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, **encoders.components()
    )
    with torch.no_grad():
        theirs, null, pooled, null_pooled = pipeline.encode_prompt(
            CAPTIONS, None, None, negative_prompt=["", ""], max_sequence_length=20
        )
        out = network(
            hidden_states=images(2, 16, 8, 8),
            timestep=torch.tensor([1.0, 999.0]),
            return_dict=False,
            **condition,
        )[0]
    torch.testing.assert_close(condition["encoder_hidden_states"], theirs)
    torch.testing.assert_close(condition["pooled_projections"], pooled)
    torch.testing.assert_close(encoders.null(2)["encoder_hidden_states"], null)
    torch.testing.assert_close(encoders.null(2)["pooled_projections"], null_pooled)
    assert out.shape == (2, 16, 8, 8)

    without = SD3TextEncoders(str(folders["sd3_text"]), t5_length=20, use_t5=False, **options)(CAPTIONS)
    assert torch.equal(without["encoder_hidden_states"][:, :77], condition["encoder_hidden_states"][:, :77])
    assert without["encoder_hidden_states"].shape[1] == 97
    assert without["encoder_hidden_states"][:, 77:].abs().max() == 0


# -------------------------------------------------------------------------------------------------- vision


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
    with pytest.raises(ValueError, match="feature_dim is 768, but .* has 32"):
        DINOv2(str(folders["dinov2"])).load()
    with pytest.raises(ValueError, match="not a multiple of the 14px patch"):
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


# ------------------------------------------------------------------------------------- what can go wrong


def message(encoder) -> str:
    """The one sentence of the error that loading ends with."""
    with pytest.raises(MissingModelError) as caught:
        encoder.load()
    text = str(caught.value)
    assert isinstance(caught.value, OSError) and "\n" not in text and text.endswith(".")
    return text


def test_nothing_is_loaded_before_it_is_needed() -> None:
    for encoder in (DCAE(), SD3VAE(), SDXLVAE(), TextEncoder(), DINOv2()):
        assert not encoder.to("cpu", "float32").loaded
    assert SD3TextEncoders().caption_channels == 4096 and SD3TextEncoders().max_length == 333


def test_missing_folder_and_offline_hub(tmp_path: Path, folders: dict[str, Path]) -> None:
    assert "does not exist" in message(DCAE(str(tmp_path / "nope")))
    assert "does not exist" in message(DCAE("./nope"))
    assert "has no folder 'vae'" in message(SD3VAE(str(tmp_path)))
    assert "There is no" in message(DCAE(str(tmp_path)))
    assert "is a file" in message(DINOv2(str(folders["dinov2"] / "config.json")))
    for encoder in (DCAE(), SD3VAE(), TextEncoder(), DINOv2(), SD3TextEncoders()):
        text = message(encoder)
        assert encoder.source in text and "HF_HUB_OFFLINE" in text and "hf download" in text
    assert "check the spelling" in message(TextEncoder("no such name"))


def test_gated_and_unknown_repositories(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(kind: type[Exception], status: int):
        request = type("Request", (), {"url": "https://huggingface.co", "method": "GET"})()
        response = type("Response", (), {"status_code": status, "headers": {}, "request": request})()

        def download(*args, **kwargs):
            raise kind(f"{status} Client Error.\nMany lines.\nMore lines.", response=response)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)

    for kind, status in (
        (errors.GatedRepoError, 401),
        (errors.GatedRepoError, 403),
        (errors.HfHubHTTPError, 403),
    ):
        refuse(kind, status)
        text = message(DINOv2("someone/something"))
        assert "is gated: accept its licence at https://huggingface.co/someone/something" in text
        assert "hf auth login" in text and "local folder or an ungated mirror" in text
    refuse(errors.RepositoryNotFoundError, 401)
    assert "neither a local folder nor a repository" in message(DINOv2("someone/something"))
    refuse(errors.RevisionNotFoundError, 404)
    assert "no such revision" in message(DINOv2(revision="v9"))
    refuse(errors.RemoteEntryNotFoundError, 404)
    assert "could not be loaded" in message(DINOv2("someone/something"))  # some other answer of the hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no route"))
    )
    assert "the hub cannot be reached" in message(DCAE())


def test_the_gate_is_recognised_behind_a_librarys_own_error() -> None:
    from huggingface_hub import errors

    response = type("Response", (), {"status_code": 403, "headers": {}, "request": None})()
    with pytest.raises(MissingModelError, match="is gated"), loading.one_sentence("some/model"):
        try:
            raise errors.GatedRepoError("403", response=response)
        except OSError:
            raise OSError("Can't load the model")  # noqa: B904 - as diffusers does
    with pytest.raises(KeyError), loading.one_sentence("some/model"):
        raise KeyError("a programming error stays what it is")


def test_pickled_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    cases = (
        (DINOv2, "dinov2", "model.safetensors", "pytorch_model.bin"),
        (DCAE, "dc_ae", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    )
    for cls, name, weights, pickled in cases:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes((folders[name] / "config.json").read_bytes())
        encoder = cls(str(folder), **({"feature_dim": 32} if cls is DINOv2 else {}))
        assert "has no safetensors weights: save" in message(encoder)
        torch.save(load_file(folders[name] / weights), folder / pickled)
        assert "only pickled ones, which are refused" in message(encoder)


def test_wrong_incomplete_and_damaged_models(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    assert "of kind 'AutoencoderKL', not AutoencoderDC" in message(DCAE(str(folders["sdxl_vae"])))
    assert "of kind 'llama', not dinov2" in message(DINOv2(str(folders["llama"])))
    assert "no tokenizer that can be read" in message(TextEncoder(str(folders["dc_ae"])))
    with pytest.raises(MissingModelError, match="does not hold a model of transformers"):
        _ = TextEncoder(str(folders["dc_ae"])).model
    assert "does not hold a model of diffusers" in message(DCAE(str(folders["dinov2"])))
    for cls, name, weights in (
        (DINOv2, "dinov2", "model.safetensors"),
        (DCAE, "dc_ae", "diffusion_pytorch_model.safetensors"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes((folders[name] / "config.json").read_bytes())
        tensors = load_file(folders[name] / weights)
        lost = sorted(tensors)[0]
        save_file({k: v for k, v in tensors.items() if k != lost}, folder / weights, {"format": "pt"})
        text = message(cls(str(folder)))
        assert "lacks 1 weights" in text and lost in text
        (folder / weights).write_bytes((folders[name] / weights).read_bytes()[:1000])
        assert "damaged" in message(cls(str(folder)))
        (folder / "config.json").write_text('{"model_type": ')
        assert "JSON file" in message(cls(str(folder)))


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    config = {"model_type": "home_made", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    for encoder in (TextEncoder(str(tmp_path)), DINOv2(str(tmp_path))):
        with pytest.raises(MissingModelError):
            _ = encoder.model
    text = pytest.raises(MissingModelError, lambda: TextEncoder(str(tmp_path)).model).value.args[0]
    assert "never executed" in text


# ------------------------------------------------------------------------------------------------ stand-ins


def test_standins_have_the_real_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMMDIT_CACHE", str(tmp_path))
    before = torch.get_rng_state()
    encoders = [
        DCAE("standin:dc_ae"),
        SD3VAE("standin:sd3_vae"),
        SDXLVAE("standin:sdxl_vae"),
        TextEncoder("standin:llama"),
        TextEncoder("standin:llama?caption_channels=48", caption_channels=48),
        TextEncoder("standin:t5", caption_channels=4096, max_length=300, with_mask=True),
        SD3TextEncoders("standin:sd3_text"),
        DINOv2("standin:dinov2"),
    ]
    for encoder in encoders:
        encoder.load()  # compares every size with the class's default
    assert torch.equal(torch.get_rng_state(), before)  # making and loading them drew nothing
    assert encoders[3](CAPTIONS)["encoder_hidden_states"].shape == (2, 128, 2048)
    condition = encoders[6](CAPTIONS)
    assert condition["encoder_hidden_states"].shape == (2, 333, 4096)
    assert condition["pooled_projections"].shape == (2, 2048)
    assert encoders[7](images(1, 3, 32, 32)).shape == (1, 256, 768)
    assert not [p for p in (tmp_path / "standins").iterdir() if p.name.startswith(".")]
    with pytest.raises(ValueError, match="no stand-in 'nope': choose one of dc_ae"):
        standin("nope")
    with pytest.raises(ValueError, match="written"):
        standin("llama?caption_channels=wide")


def test_standins_are_reproducible_and_reused(tmp_path: Path) -> None:
    first = standin("dc_ae", tmp_path / "a")
    weights = "diffusion_pytorch_model.safetensors"
    assert (first / weights).read_bytes() == (standin("dc_ae", tmp_path / "b") / weights).read_bytes()
    stamp = (first / weights).stat().st_mtime_ns
    assert standin("dc_ae", tmp_path / "a") == first and (first / weights).stat().st_mtime_ns == stamp
    assert standin("dc_ae?seed=1", tmp_path / "a") != first
    ids = [
        TextEncoder(str(standin("llama?caption_channels=8", tmp_path / c)), caption_channels=8).tokenize(
            CAPTIONS
        )[0]
        for c in "ab"
    ]
    assert torch.equal(*ids)


def test_configs_name_encoders_by_class_path(folders: dict[str, Path]) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--codec", type=ImageCodec)
    parser.add_argument("--text", type=TextConditioner)
    parser.add_argument("--vision", type=VisionFeatures | None)
    text = {"class_path": "emmdit.encoders.TextEncoder", "init_args": {"max_length": 64, "dtype": "bfloat16"}}
    config = {
        "codec": {"class_path": "emmdit.encoders.DCAE", "init_args": {"source": str(folders["dc_ae"])}},
        "text": text,
        "vision": {"class_path": "emmdit.encoders.DINOv2"},
    }
    made = parser.instantiate(parser.parse_object(config))
    assert isinstance(made.codec, DCAE) and isinstance(made.vision, DINOv2) and made.text.max_length == 64
    with pytest.raises(Exception, match="(?i)max_lenght"):
        parser.parse_object(config | {"text": {**text, "init_args": {"max_lenght": 64}}})


def test_importing_the_package_is_light() -> None:
    code = "import sys, emmdit.encoders; print(sorted({'diffusers', 'transformers'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
