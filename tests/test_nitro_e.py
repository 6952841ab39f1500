"""The released network: goldens computed by the original code, its file format, and what is refused.

`tests/data/emmdit/*_small.*` are random weights in the released layout (head size 16, two heads) with what
the original code makes of them in float32; `nitro_e_512_state_dict.json` has every key and shape of the real
file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from emmdit.flow import RectifiedFlow, classifier_free_guidance, flow_loss, sample, schedule
from emmdit.losses import REPA, LossInputs
from emmdit.networks import EMMDiTTransformer2DModel, load_nitro_e, save_nitro_e
from emmdit.networks.emmdit.nitro_e import to_released

DATA = Path(__file__).parent / "data" / "emmdit"
TOLERANCE = 1e-4  # relative, float32


class Golden(NamedTuple):
    file: Path
    resolution: int
    tensors: dict[str, Tensor]
    settings: dict

    def network(self) -> EMMDiTTransformer2DModel:
        return load_nitro_e(self.file, self.resolution)


def golden_of(resolution: int) -> Golden:
    stem = DATA / f"emmdit_{resolution}_small"
    return Golden(
        file=Path(f"{stem}.weights.safetensors"),
        resolution=resolution,
        tensors=load_file(f"{stem}.tensors.safetensors"),
        settings=json.loads(Path(f"{stem}.json").read_text()),
    )


@pytest.fixture(scope="module", params=[512, 1024])
def golden(request: pytest.FixtureRequest) -> Golden:
    return golden_of(request.param)


@pytest.fixture(scope="module")
def golden_512() -> Golden:
    return golden_of(512)


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def altered(golden: Golden, folder: Path, **changes: Tensor | None) -> Path:
    """A copy of the golden file with tensors replaced, added, or (None) left out."""
    state = load_file(golden.file)
    for key, tensor in changes.items():
        state.pop(key, None)
        if tensor is not None:
            state[key] = tensor
    save_file(state, folder / "altered.safetensors")
    return folder / "altered.safetensors"


def refusal(file: Path, resolution: int = 512) -> str:
    with pytest.raises(ValueError) as error:
        load_nitro_e(file, resolution)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    return message


# -------------------------------------------------------------------------------- what it computes


def test_settings_are_read_off_the_file(golden: Golden):
    network, settings = golden.network(), golden.settings
    keys = ("num_attention_heads", "attention_head_dim", "caption_channels", "sample_size", "patch_size", "in_channels")
    for key in (*keys, "out_channels", "block_groups"):
        assert network.config[key] == settings[key], key
    pattern = ["full", "strided", "chunked"] if settings["subregion_attention"] else ["full"]
    assert list(network.config.subregion_pattern) == pattern
    count = sum(p.numel() for p in (*network.parameters(), *network.training_tensors.values()))
    assert count == settings["num_parameters"]


@torch.no_grad()
def test_forward(golden: Golden):
    t = golden.tensors
    output = golden.network()(t["hidden_states"], t["timestep"], t["encoder_hidden_states"]).sample
    assert relative_error(output, t["output"]) < TOLERANCE


def inputs_of(network: EMMDiTTransformer2DModel, t: dict[str, Tensor]) -> LossInputs:
    path, timesteps = RectifiedFlow(), t["train_timesteps"]
    x_t = path.interpolate(t["train_latents"], t["train_noise"], timesteps)
    return LossInputs(
        batch={"features": t["train_target_features"]},
        x0=t["train_latents"],
        noise=t["train_noise"],
        t=timesteps,
        x_t=x_t,
        condition={"encoder_hidden_states": t["encoder_hidden_states"]},
        target=path.target(t["train_latents"], t["train_noise"], timesteps),
        prediction=network(x_t, timesteps, t["encoder_hidden_states"]).sample,
    )


def test_losses_and_gradients_of_a_training_step(golden_512: Golden):
    t, network, settings = golden_512.tensors, golden_512.network().train(), golden_512.settings
    block = f"blocks.{settings['block_groups'][0] - 1}"
    widths = dict(feature_dim=settings["repa_feature_dim"], projector_dim=settings["repa_projector_dim"])
    repa = REPA(block, weight=settings["repa_weight"], **widths)
    repa.attach(network)
    inputs, projected = inputs_of(network, t), {}
    repa.projector.register_forward_hook(lambda module, args, output: projected.update(found=output))
    flow, alignment = flow_loss(inputs.prediction, inputs.target).mean(), repa(inputs)
    assert relative_error(projected["found"], t["train_repa_prediction"]) < TOLERANCE
    torch.testing.assert_close(flow, t["train_flow_loss"], rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(alignment, t["train_repa_loss"], rtol=TOLERANCE, atol=0)
    loss = flow + repa.weights["repa"] * alignment
    torch.testing.assert_close(loss, t["train_loss"], rtol=TOLERANCE, atol=0)

    loss.backward()
    gradients = to_released({name: p.grad for name, p in network.named_parameters()}, network.config)
    gradients |= {f"projectors.0.{name}": p.grad for name, p in repa.projector.named_parameters()}
    expected = {key.removeprefix("grad."): value for key, value in t.items() if key.startswith("grad.")}
    assert len(expected) == 8
    for key, gradient in expected.items():
        assert relative_error(gradients[key], gradient) < TOLERANCE, key


@torch.no_grad()
def test_sampling(golden: Golden):
    t, settings, network = golden.tensors, golden.settings, golden.network()
    timesteps = schedule(settings["num_inference_steps"], "flow_match_euler")
    torch.testing.assert_close(timesteps[:-1], t["sample_timesteps"], rtol=1e-6, atol=0)
    torch.testing.assert_close(timesteps / 1000, t["sample_sigmas"], rtol=1e-6, atol=1e-9)
    predict = classifier_free_guidance(
        lambda x, timestep, condition: network(x, timestep, **condition).sample,
        {"encoder_hidden_states": t["encoder_hidden_states"]},
        {"encoder_hidden_states": t["sample_null_text"]},
        scale=settings["guidance_scale"],
    )
    latents = sample(predict, t["sample_initial_noise"], RectifiedFlow(), timesteps)
    assert relative_error(latents, t["sample_latents"]) < TOLERANCE


def test_goldens_can_tell_networks_apart(golden_512: Golden):
    """The tolerance means something: each switch of the architecture moves the output far beyond it."""
    t, network = golden_512.tensors, golden_512.network()
    state = network.state_dict()
    for change in (
        {"subregion_pattern": ["full"]},
        {"subregion_pattern": ["full", "chunked", "strided"]},
        {"position_reinforcement": False},
        {"pos_embed_spacing": 1 / 3},
    ):
        other = EMMDiTTransformer2DModel.from_config(network.config, **change)
        other.load_state_dict(state)
        with torch.no_grad():
            output = other(t["hidden_states"], t["timestep"], t["encoder_hidden_states"]).sample
        assert relative_error(output, t["output"]) > 10 * TOLERANCE, change


# -------------------------------------------------------------------------------- the released size


def test_called_with_no_argument_it_is_the_released_network():
    repa = REPA("blocks.3")
    with torch.device("meta"):
        network = EMMDiTTransformer2DModel()
        repa.attach(network)
    assert sum(p.numel() for p in network.parameters()) == 302_449_952
    assert sum(p.numel() for p in repa.parameters()) == 7_344_896  # 309.79M together, as published
    expected = json.loads((DATA / "nitro_e_512_state_dict.json").read_text())
    found = {k: list(v.shape) for k, v in to_released(network.state_dict(), network.config).items()}
    found["pos_embed.pos_embed"] = [1, network.pos_table[..., 0].numel(), network.pos_table.shape[2]]
    assert found == expected


# -------------------------------------------------------------------------------- the file


def assert_same_file(one: Path, other: Path) -> None:
    one_state, other_state = load_file(one), load_file(other)
    assert one_state.keys() == other_state.keys()
    for key, tensor in one_state.items():
        assert tensor.dtype == other_state[key].dtype and tensor.shape == other_state[key].shape, key
        assert torch.equal(tensor, other_state[key]), key


def test_save_gives_the_file_back_bit_for_bit(golden: Golden, tmp_path: Path):
    """Over the file itself, too: its tensors are mapped, and without a copy that would crash or write garbage."""
    file = altered(golden, tmp_path)
    for saved in (tmp_path / "saved.safetensors", file):
        save_nitro_e(load_nitro_e(file, golden.resolution), saved)
        assert_same_file(golden.file, saved)


def test_save_gives_a_bfloat16_file_back_bit_for_bit(golden_512: Golden, tmp_path: Path):
    narrow = {key: tensor.bfloat16() for key, tensor in load_file(golden_512.file).items()}
    save_file(narrow, tmp_path / "bf16.safetensors")
    network = load_nitro_e(tmp_path / "bf16.safetensors")
    assert network.dtype == torch.bfloat16
    save_nitro_e(network, tmp_path / "saved.safetensors")
    assert_same_file(tmp_path / "bf16.safetensors", tmp_path / "saved.safetensors")
    t = golden_512.tensors
    with torch.no_grad():
        inputs = (t["hidden_states"].bfloat16(), t["timestep"], t["encoder_hidden_states"].bfloat16())
        assert relative_error(network(*inputs).sample.float(), t["output"]) < 0.05


def test_the_files_own_position_table_is_kept(golden_512: Golden, tmp_path: Path):
    """Tables computed elsewhere differ from ours in the last bits: what was read is used and written."""
    table = load_file(golden_512.file)["pos_embed.pos_embed"] + 1e-6
    network = load_nitro_e(altered(golden_512, tmp_path, **{"pos_embed.pos_embed": table}))
    assert torch.equal(network.pos_table.flatten(0, 1), table[0])
    save_nitro_e(network, tmp_path / "saved.safetensors")
    assert_same_file(tmp_path / "altered.safetensors", tmp_path / "saved.safetensors")


def test_a_training_file_brings_its_projector(golden_512: Golden, tmp_path: Path):
    """Into REPA, and from a trained REPA back into a file; an inference file has none."""
    network = golden_512.network()
    repa = REPA(
        "blocks.0",
        feature_dim=golden_512.settings["repa_feature_dim"],
        projector_dim=golden_512.settings["repa_projector_dim"],
    )
    repa.attach(network)
    assert not any("projector" in key for key in network.state_dict())
    save_nitro_e(network, tmp_path / "same.safetensors", repa.projector)
    assert_same_file(golden_512.file, tmp_path / "same.safetensors")
    torch.nn.init.ones_(repa.projector[0].bias)
    save_nitro_e(network, tmp_path / "trained.safetensors", repa.projector)
    assert load_file(tmp_path / "trained.safetensors")["projectors.0.0.bias"].eq(1).all()
    assert golden_of(1024).network().training_tensors == {}


def test_our_own_network_of_the_released_kind_can_be_written(tmp_path: Path):
    network = EMMDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, block_groups=(1, 2, 1), caption_channels=24
    ).eval()
    save_nitro_e(network, tmp_path / "ours.safetensors")
    loaded = load_nitro_e(tmp_path / "ours.safetensors")
    assert list(loaded.config.block_groups) == [1, 2, 1] and loaded.config.ff_ratio == 3
    x, t, text = torch.randn(1, 32, 16, 16), torch.tensor([500.0]), torch.randn(1, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(network(x, t, text).sample, loaded(x, t, text).sample)


# -------------------------------------------------------------------------------- what is refused


MISSING = ["pos_embed.proj.weight", "pos_embed.pos_embed", "context_embedder.weight", "proj_out.bias"]
MISSING += ["block_groups.0.0.attn.norm_q.weight", "block_groups.0.0.ff.net.0.proj.weight"]
MISSING += ["block_groups.1.7.scale_shift_bias_c", "tokencompressor.0.0.body4x.3.bias"]
MISSING += ["projectors.0.0.weight", "projectors.0.4.weight"]
SHAPES = [
    ("block_groups.0.0.attn.extra.weight", (2,)),  # these are no tensors of a Nitro-E file
    ("block_groups.3.0.x", (2,)),
    ("lm_head.weight", (2,)),
    ("block_groups.0.1.ff.net.2.weight", (96, 32)),  # as many numbers as the right shape has
    ("block_groups.1.0.attn.to_q.weight", (32, 33)),
    ("tokencompressor.0.0.body2x.1.weight", (32, 128)),
    ("pos_embed.pos_embed", (1, 96 * 95, 32)),
    ("pos_embed.pos_embed", (1, 96 * 96, 16)),
]


@pytest.mark.parametrize(("key", "shape"), [*((key, None) for key in MISSING), *SHAPES])
def test_a_missing_an_extra_and_a_misshapen_tensor_are_named(golden_512: Golden, tmp_path: Path, key: str, shape):
    assert key in refusal(altered(golden_512, tmp_path, **{key: None if shape is None else torch.zeros(shape)}))


def test_another_position_table_is_refused(golden_512: Golden, tmp_path: Path):
    file = altered(golden_512, tmp_path, **{"pos_embed.pos_embed": torch.zeros(1, 96 * 96, 32)})
    assert "1/6" in refusal(file)


def test_another_resolution_is_refused(golden_512: Golden):
    assert "768" in refusal(golden_512.file, 768)


def test_files_that_are_no_nitro_e_are_refused(golden_512: Golden, tmp_path: Path):
    (tmp_path / "text.safetensors").write_text("not a safetensors file")
    assert "text.safetensors" in refusal(tmp_path / "text.safetensors")
    save_file({"model.embed_tokens.weight": torch.zeros(4, 4)}, tmp_path / "llama.safetensors")
    assert "pos_embed.proj.weight" in refusal(tmp_path / "llama.safetensors")
    assert "pos_embed.proj.weight" in refusal(DATA / "emmdit_512_small.tensors.safetensors")
    for absent in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=absent.name):
            load_nitro_e(absent)


@pytest.mark.parametrize(
    "change", [{"compression_ratios": (2,)}, {"modulation": "single"}, {"modulation": "zero"}, {"patch_size": 2}]
)
def test_other_networks_are_not_written(tmp_path: Path, change: dict):
    network = EMMDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, block_groups=(1, 1, 1), caption_channels=24, **change
    )
    with pytest.raises(ValueError, match="save_pretrained"):
        save_nitro_e(network, tmp_path / "x.safetensors")


def test_a_fused_network_is_not_written(golden_512: Golden, tmp_path: Path):
    network = golden_512.network()
    network.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        save_nitro_e(network, tmp_path / "x.safetensors")
    network.unfuse_qkv_projections()
    save_nitro_e(network, tmp_path / "x.safetensors")
    assert_same_file(golden_512.file, tmp_path / "x.safetensors")
