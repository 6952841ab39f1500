"""`load_weights`: checkpoints (file or sharded), diffusers folders, Nitro-E files, and misfits."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn

from emmdit.networks import EMMDiTTransformer2DModel, save_nitro_e
from emmdit.weights import (
    component_weights,
    find_checkpoint,
    is_diffusers_folder,
    load_component_weights,
    load_weights,
    open_checkpoint,
    run_folder,
)

Weights = dict[str, Tensor]


def network(seed: int = 0, **config) -> EMMDiTTransformer2DModel:
    torch.manual_seed(seed)
    defaults = dict(num_attention_heads=2, attention_head_dim=16, block_groups=(1, 1, 1), caption_channels=12)
    return EMMDiTTransformer2DModel(**defaults | config)


def checkpoint_of(raw: nn.Module, ema: nn.Module | None = None) -> dict:
    """What Lightning writes, as far as it matters here."""
    state = {f"denoiser.{key}": value for key, value in raw.state_dict().items()}
    if ema is not None:
        state |= {f"ema_denoiser.{key}": value for key, value in ema.state_dict().items()}
    return {"state_dict": state, "global_step": 3, "samples_seen": 12, "callbacks": {}}


def assert_holds(found: nn.Module, expected: nn.Module) -> None:
    state = expected.state_dict()
    for key, value in found.state_dict().items():
        assert torch.equal(value, state[key].to(value.dtype)), key


def refusal(target: nn.Module, source: Path, kind: type[Exception] = ValueError, **options) -> str:
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(kind) as error:
        load_weights(target, source, **options)
    message = str(error.value)
    assert "\n" not in message and message.endswith((".", "?")) and str(source) in message
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())  # nothing half done
    return message


# -------------------------------------------------------------------------------- sources


@pytest.fixture(params=["file", "sharded"])
def save(request: pytest.FixtureRequest):
    """Writes a checkpoint as Lightning does: one file, or a folder of shards."""

    def write(checkpoint: dict, path: Path) -> Path:
        if request.param == "file":
            torch.save(checkpoint, path)
        else:
            with warnings.catch_warnings(action="ignore"):  # no process group
                dcp.save({"state_dict": checkpoint["state_dict"]}, checkpoint_id=path, no_dist=True)
            torch.save({"global_step": 3}, path / "meta.pt")
        return path

    return write


def test_a_checkpoint_gives_its_ema_unless_told_otherwise(save, tmp_path: Path):
    raw, ema, target = network(1), network(2), network()
    path = save(checkpoint_of(raw, ema), tmp_path / "last.ckpt")
    for asked, kind, expected in ((None, "ema", ema), ("raw", "raw", raw), ("ema", "ema", ema)):
        assert load_weights(target, path, asked) == kind
        assert_holds(target, expected)


def test_a_checkpoint_without_an_ema_gives_what_it_has(save, tmp_path: Path):
    raw, target = network(1), network()
    path = save(checkpoint_of(raw), tmp_path / "last.ckpt")
    assert load_weights(target, path) == "raw"
    assert_holds(target, raw)
    assert " ema " in refusal(target, path, weights="ema")


def test_a_run_folder_gives_its_last_checkpoint(tmp_path: Path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for step in (1, 2):
        path = run / "checkpoints" / f"step={step}.ckpt"
        torch.save(checkpoint_of(network(step)), path)
        os.utime(path, (step, step))
    target = network()
    load_weights(target, run)
    assert_holds(target, network(2))
    (run / "checkpoints" / "last.ckpt").symlink_to(run / "checkpoints" / "step=1.ckpt")
    load_weights(target, run)
    assert_holds(target, network(1))
    assert find_checkpoint(run) == run / "checkpoints" / "step=1.ckpt"


def test_the_folder_of_a_run_is_found_from_its_checkpoint(tmp_path: Path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("model: {}\n")
    assert run_folder(tmp_path / "run" / "checkpoints" / "last.ckpt") == tmp_path / "run"
    assert run_folder(tmp_path / "run") == tmp_path / "run"
    with pytest.raises(FileNotFoundError, match=r"config\.yaml"):
        run_folder(tmp_path / "elsewhere" / "last.ckpt")


@pytest.mark.parametrize("place", ["", "transformer", "network.safetensors"])
def test_a_diffusers_folder_and_a_plain_file(place: str, tmp_path: Path):
    saved, target = network(1), network()
    if place.endswith(".safetensors"):
        save_file(saved.state_dict(), tmp_path / place)
        source = tmp_path / place
    else:
        saved.save_pretrained(tmp_path / place)
        source = tmp_path
    assert is_diffusers_folder(source) == source.is_dir() and not is_diffusers_folder(tmp_path / "absent")
    assert load_weights(target, source) == "raw"
    assert_holds(target, saved)


def test_the_folder_of_a_diffusers_network(tmp_path: Path):
    from diffusers import SD3Transformer2DModel

    def tiny(seed: int) -> SD3Transformer2DModel:
        torch.manual_seed(seed)
        sizes = dict(num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12)
        sizes |= dict(caption_projection_dim=16, pooled_projection_dim=10, sample_size=4, pos_embed_max_size=8)
        return SD3Transformer2DModel(**sizes)

    saved, target = tiny(1), tiny(0)
    saved.save_pretrained(tmp_path)
    load_weights(target, tmp_path)
    assert_holds(target, saved)
    assert "SD3Transformer2DModel" in refusal(network(), tmp_path, OSError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nitro_e_file(dtype: torch.dtype, tmp_path: Path):
    saved, target = network(1).to(dtype), network()
    projector = torch.nn.Sequential(*(torch.nn.Linear(3, 3) if i % 2 == 0 else torch.nn.SiLU() for i in range(5)))
    save_nitro_e(saved, tmp_path / "nitro-e.safetensors", projector)
    assert load_weights(target, tmp_path / "nitro-e.safetensors") == "raw"
    assert_holds(target, saved)
    assert target.dtype == torch.float32
    found = component_weights(tmp_path / "nitro-e.safetensors", "repa")
    assert found.keys() == {f"projector.{key}" for key in projector.state_dict()}
    assert torch.equal(found["projector.4.bias"], projector[4].bias)
    assert component_weights(tmp_path / "nitro-e.safetensors", "distillation") == {}


# -------------------------------------------------------------------------------- misfits


def test_weights_of_another_network_are_counted_and_named(tmp_path: Path):
    path = tmp_path / "a.ckpt"
    torch.save(checkpoint_of(network(1, block_groups=(1, 2, 1))), path)
    message = refusal(network(), path)  # whose third block is the last, without text output
    assert "missing" not in message and "blocks.2.attn.to_add_out.bias" in message
    message = refusal(network(block_groups=(2, 2, 1)), path)
    assert "missing" in message and "blocks.3.attn.to_add_out.bias" in message
    message = refusal(network(caption_channels=20, block_groups=(1, 2, 1)), path)
    assert "missing" not in message and "1 " in message and "context_embedder.weight" in message


def test_folders_and_nitro_e_files_of_another_size(tmp_path: Path):
    other = network(1, caption_channels=20)
    other.save_pretrained(tmp_path / "folder")
    save_nitro_e(other, tmp_path / "file.safetensors")
    for source in (tmp_path / "folder", tmp_path / "file.safetensors"):
        assert "context_embedder.weight" in refusal(network(), source)


def test_what_is_no_checkpoint(tmp_path: Path):
    (tmp_path / "text.ckpt").write_text("hello")
    message = refusal(network(), tmp_path / "text.ckpt")
    assert "checkpoint" in message and "state_dict" not in message
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.ckpt")
    assert "state_dict" in refusal(network(), tmp_path / "other.ckpt")
    torch.save({"state_dict": {"classifier.weight": torch.zeros(1)}}, tmp_path / "classifier.ckpt")
    assert " raw " in refusal(network(), tmp_path / "classifier.ckpt")
    torch.save(checkpoint_of(network(1)), tmp_path / "good.ckpt")
    with pytest.raises(ValueError, match=r"\bema\b.*\braw\b.*'best'"):
        load_weights(network(), tmp_path / "good.ckpt", "best")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(save, tmp_path: Path, value: float):
    broken = network(1)
    broken.blocks[1].attn.to_q.weight.data[3, 4] = value
    path = save(checkpoint_of(network(2), broken), tmp_path / "last.ckpt")
    assert "blocks.1.attn.to_q.weight" in refusal(network(), path)
    assert load_weights(network(), path, "raw") == "raw"
    broken.save_pretrained(tmp_path / "folder")
    save_nitro_e(broken, tmp_path / "file.safetensors")
    for source in (tmp_path / "folder", tmp_path / "file.safetensors"):
        assert "blocks.1.attn.to_q.weight" in refusal(network(), source)


def test_a_component_whose_weights_are_not_finite_is_refused(tmp_path: Path):
    component = nn.Linear(2, 2)
    component.name = "repa"
    state = {"components.repa.weight": torch.full((2, 2), float("nan")), "components.repa.bias": torch.zeros(2)}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt are not finite \(weight"):
        load_component_weights(component, tmp_path / "a.ckpt")


def test_a_safetensors_file_that_was_cut_is_refused(tmp_path: Path):
    path = tmp_path / "network.safetensors"
    save_file(network().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "safetensors" in refusal(network(), path)
    with pytest.raises(ValueError, match="safetensors"):
        component_weights(path, "repa")


def test_a_link_into_another_run_keeps_the_config_of_the_run_that_was_named(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("model: {}\n")
    torch.save(checkpoint_of(network(1)), tmp_path / "b/checkpoints/step=1.ckpt")
    (tmp_path / "a/checkpoints/last.ckpt").symlink_to("../../b/checkpoints/step=1.ckpt")
    assert open_checkpoint(tmp_path / "a").path == tmp_path / "b/checkpoints/step=1.ckpt"
    for source in ("a", "a/checkpoints", "a/checkpoints/last.ckpt"):
        assert run_folder(tmp_path / source) == tmp_path / "a"
    (tmp_path / "alias.ckpt").symlink_to("a/checkpoints/last.ckpt")
    assert run_folder(tmp_path / "alias.ckpt") == tmp_path / "b"  # nothing beside the link says more


def test_a_dangling_link_names_what_is_whole(tmp_path: Path):
    torch.save(checkpoint_of(network(1)), tmp_path / "step=1.ckpt")
    (tmp_path / "last.ckpt").symlink_to("gone.ckpt")
    message = refusal(network(), tmp_path / "last.ckpt")
    assert "gone.ckpt" in message and "step=1.ckpt is whole" in message


def test_a_pickle_is_never_executed(tmp_path: Path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    torch.save({"state_dict": {}, "bomb": Bomb()}, tmp_path / "bomb.ckpt")
    assert "checkpoint" in refusal(network(), tmp_path / "bomb.ckpt")
    assert not (tmp_path / "exploded").exists()


def test_what_is_not_there(tmp_path: Path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "diffusers" not in refusal(network(), tmp_path / "run", FileNotFoundError)
    assert "diffusers" in refusal(network(), tmp_path / "absent.ckpt", FileNotFoundError)
    assert "weights" in refusal(network(), tmp_path / "absent.safetensors", FileNotFoundError)
