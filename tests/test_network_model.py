"""E-MMDiT as a diffusers model: saving, precision, LoRA, independent rows, compilation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from emmdit.networks import EMMDiTTransformer2DModel
from tests.test_networks import SWITCHES, inputs, run, tiny


@pytest.mark.parametrize("switch", ["released", "zero_modulation", "no_compression"])
def test_saved_and_loaded_it_is_the_same(switch: str, tmp_path: Path):
    network = tiny(**SWITCHES[switch]).eval()
    network.save_pretrained(tmp_path)
    loaded = EMMDiTTransformer2DModel.from_pretrained(tmp_path)
    saved, config = ({k: v for k, v in net.config.items() if k[0] != "_"} for net in (network, loaded))
    assert json.loads(json.dumps(saved)) == config
    assert loaded.state_dict().keys() == network.state_dict().keys()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[key])
    assert torch.equal(loaded.pos_table, network.pos_table)
    torch.testing.assert_close(run(loaded, **inputs(8, 16)), run(network, **inputs(8, 16)))


def test_bfloat16_and_autocast_are_close_to_float32(tmp_path: Path):
    network, given = tiny().eval(), inputs()
    expected = run(network, **given)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(network, **given)
    network.save_pretrained(tmp_path)
    loaded = EMMDiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    narrow = run(loaded, **{k: v if k == "timestep" else v.bfloat16() for k, v in given.items()})
    assert loaded.dtype == narrow.dtype == torch.bfloat16
    for found in (mixed, narrow):
        assert (found.float() - expected).norm() / expected.norm() < 0.03


def test_lora_by_diffusers_trains_nothing_but_itself(tmp_path: Path):
    from peft import LoraConfig

    network, given = tiny().eval(), inputs()
    before, base = run(network, **given), network.state_dict()
    network.requires_grad_(False)
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out", "proj_in"]))
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert torch.equal(run(network, **given), before)  # B starts at zero
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.1)
    after = run(network, **given)
    assert (after - before).abs().max() > 1e-4
    network.disable_adapters()
    assert torch.equal(run(network, **given), before)

    network.save_lora_adapter(tmp_path)
    other = tiny().eval()
    other.load_state_dict(base)
    other.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(run(other, **given), after)


def test_rows_of_a_batch_are_independent():
    network, given = tiny().eval(), inputs(batch=3)
    together = run(network, **given)
    for row in range(3):
        alone = run(network, **{key: value[row : row + 1] for key, value in given.items()})
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)


def test_a_scalar_timestep_serves_the_batch_and_time_matters():
    network, given = tiny().eval(), inputs()
    many = run(network, **given | {"timestep": torch.tensor([400.0, 400.0])})
    for timestep in (torch.tensor(400.0), torch.tensor([400.0]), torch.tensor(400)):
        assert torch.equal(run(network, **given | {"timestep": timestep}), many)
    assert (run(network, **given | {"timestep": torch.tensor(401.0)}) - many).abs().max() > 1e-5
    assert torch.equal(network(**given, return_dict=False)[0], network(**given).sample)


def test_blocks_compile_as_one_graph_each():
    network, given = tiny().eval(), inputs()
    expected = run(network, **given)
    for block in network.blocks[-2:]:  # strided; chunked without text output
        block.compile(fullgraph=True, backend="eager")  # fullgraph: a graph break is an error
    torch.testing.assert_close(run(network, **given), expected)


@pytest.mark.slow
def test_all_blocks_stay_compiled_in_training_and_sampling():
    network, given = tiny().eval(), inputs()
    expected = run(network, **given)
    # With fullgraph torch raises at the limit of graphs (8 by default), where it would else go on uncompiled.
    network.compile_repeated_blocks(fullgraph=True, backend="eager")
    network(**given).sample.mean().backward()
    torch.testing.assert_close(run(network, **given), expected)
    run(network, **inputs(16, 16, batch=4))
