"""Loading of frozen models: failures, stand-ins, and encoders in configs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emmdit.encoders import (
    DCAE,
    SD3VAE,
    SDXLVAE,
    DINOv2,
    MissingModelError,
    SD3TextEncoders,
    TextEncoder,
    loading,
    standin,
)

CAPTIONS = ["a photo of a red circle", "two blue squares left of a star"]
# Class, arguments, stand-in and weights file of a model of each library.
MODELS = (
    (DINOv2, {"feature_dim": 32}, "dinov2?feature_dim=32", "model.safetensors"),
    (DCAE, {}, "dc_ae", "diffusion_pytorch_model.safetensors"),
)


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


def test_missing_folder_and_offline_hub(tmp_path: Path) -> None:
    for absent in (str(tmp_path / "nope"), "./nope"):
        text = message(DCAE(absent))
        assert absent in text and "hf download" not in text  # seen to be no hub id
    assert "'vae'" in message(SD3VAE(str(tmp_path)))
    assert str(tmp_path / "config.json") in message(DCAE(str(tmp_path)))
    file = str(standin("dc_ae") / "config.json")
    assert file in message(DINOv2(file))
    for encoder in (DCAE(), SD3VAE(), TextEncoder(), DINOv2(), SD3TextEncoders()):
        text = message(encoder)
        assert encoder.source in text and "HF_HUB_OFFLINE" in text and "hf download" in text
    assert "'no such name'" in message(TextEncoder("no such name"))


def test_gated_and_unknown_repositories(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def refused(error: Exception) -> str:
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: (_ for _ in ()).throw(error))
        return message(DINOv2("someone/something", revision="v9"))

    def http(kind: type[Exception], status: int) -> str:
        request = type("Request", (), {"url": "https://huggingface.co", "method": "GET"})()
        response = type("Response", (), {"status_code": status, "headers": {}, "request": request})()
        return refused(kind(f"{status} Client Error.\nMany lines.", response=response))

    for kind, status in ((errors.GatedRepoError, 401), (errors.GatedRepoError, 403), (errors.HfHubHTTPError, 403)):
        text = http(kind, status)
        assert "https://huggingface.co/someone/something" in text and "hf auth login" in text
    text = http(errors.RepositoryNotFoundError, 401)  # not the address of what is gated
    assert "'someone/something'" in text and "hf auth login" in text and "https://" not in text
    assert "https://huggingface.co/someone/something/commits" in http(errors.RevisionNotFoundError, 404)
    assert "404 Client Error" in http(errors.RemoteEntryNotFoundError, 404)  # some other answer of the hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    text = refused(ConnectionError("no route"))
    assert "'someone/something'" in text and "HF_HUB_OFFLINE" not in text and "hf " not in text


def test_the_gate_is_recognized_behind_a_librarys_own_error() -> None:
    from huggingface_hub import errors

    response = type("Response", (), {"status_code": 403, "headers": {}, "request": None})()
    words = "huggingface.co/some/model.*hf auth login"
    with pytest.raises(MissingModelError, match=words), loading.one_sentence("some/model"):
        try:
            raise errors.GatedRepoError("403", response=response)
        except OSError:
            raise OSError("Can't load the model")  # noqa: B904 - as diffusers does
    with pytest.raises(KeyError), loading.one_sentence("some/model"):
        raise KeyError("a programming error stays what it is")


@pytest.mark.parametrize(("cls", "arguments", "name", "weights"), MODELS)
def test_pickled_incomplete_and_damaged_weights_are_refused(
    cls: type, arguments: dict, name: str, weights: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    def refused() -> str:
        return message(cls(str(tmp_path), **arguments)).replace(str(tmp_path), "")  # the test's name is in the path

    whole = standin(name)
    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    assert "safetensors" in refused() and "pickle" not in refused()
    tensors = load_file(whole / weights)
    torch.save(tensors, tmp_path / weights.replace("model.safetensors", "pytorch_model.bin"))
    assert "safetensors" in refused() and "pickle" in refused()
    lost = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / weights, {"format": "pt"})
    assert " 1 " in refused() and lost in refused()
    (tmp_path / weights).write_bytes((whole / weights).read_bytes()[:1000])
    assert "weights" in refused() and lost not in refused()
    (tmp_path / "config.json").write_text('{"model_type": ')
    assert "JSON" in refused()


def test_models_of_another_kind_are_named() -> None:
    text = message(DCAE("standin:sdxl_vae"))
    assert "'AutoencoderKL'" in text and "AutoencoderDC" in text
    text = message(DINOv2("standin:llama?caption_channels=32"))
    assert "'llama'" in text and "dinov2" in text
    assert "tokenizer_subfolder" in message(TextEncoder("standin:dc_ae"))
    with pytest.raises(MissingModelError, match="dc_ae.*transformers"):
        _ = TextEncoder("standin:dc_ae").model
    assert "diffusers" in message(DCAE("standin:dinov2?feature_dim=32"))


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    config = {"model_type": "home_made", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    for encoder in (TextEncoder(str(tmp_path)), DINOv2(str(tmp_path))):
        with pytest.raises(MissingModelError) as error:
            _ = encoder.model
        assert isinstance(encoder, DINOv2) or "code" in str(error.value).replace(str(tmp_path), "")


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
    assert encoders[7](torch.zeros(1, 3, 32, 32)).shape == (1, 256, 768)
    assert not [p for p in (tmp_path / "standins").iterdir() if p.name.startswith(".")]
    with pytest.raises(ValueError, match="'nope'.*dc_ae"):
        standin("nope")
    with pytest.raises(ValueError, match="'llama'.*caption_channels=wide"):
        standin("llama?caption_channels=wide")


def test_standins_are_reproducible_and_reused(tmp_path: Path) -> None:
    first = standin("dc_ae", tmp_path / "a")
    torch.manual_seed(123)
    weights = "diffusion_pytorch_model.safetensors"
    assert (first / weights).read_bytes() == (standin("dc_ae", tmp_path / "b") / weights).read_bytes()
    stamp = (first / weights).stat().st_mtime_ns
    assert standin("dc_ae", tmp_path / "a") == first and (first / weights).stat().st_mtime_ns == stamp
    assert standin("dc_ae?seed=1", tmp_path / "a") != first
    ids = [
        TextEncoder(str(standin("llama?caption_channels=8", tmp_path / c)), caption_channels=8).tokenize(CAPTIONS)[0]
        for c in "ab"
    ]
    assert torch.equal(*ids)


def test_importing_encoders_and_judge_is_light() -> None:
    code = "import sys, emmdit.encoders, emmdit.evaluation.geneval; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"diffusers", "transformers", "lightning", "scipy"} & set(out.stdout.split())
