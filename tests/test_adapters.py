"""LoRA: where it goes, what trains, merging, and a whole life from base weights to an export."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from emmdit.adapters import LoRA, merge
from emmdit.networks import EMMDiTTransformer2DModel
from emmdit.weights import checkpoint_state, find_checkpoint, load_weights
from lightning_modules.commands.main import main
from tests.command_line import ON_CPU, change, files
from tests.command_line import elsewhere as elsewhere


def emmdit() -> nn.Module:
    sizes = dict(num_attention_heads=2, attention_head_dim=16, block_groups=(1, 1, 1), caption_channels=8)
    return EMMDiTTransformer2DModel(**sizes, sample_size=8, in_channels=4, out_channels=4, subregion_pattern=("full",))


def sd3() -> nn.Module:
    sizes = dict(sample_size=4, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, pos_embed_max_size=8)
    sizes |= dict(num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=6)
    return SD3Transformer2DModel(**sizes)


def predict(network: nn.Module) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    size = network.config.sample_size
    given = {"hidden_states": torch.randn(2, 4, size, size, generator=g), "timestep": torch.tensor([10.0, 900.0])}
    given["encoder_hidden_states"] = torch.randn(2, 4, 8, generator=g)
    if isinstance(network, SD3Transformer2DModel):
        given["pooled_projections"] = torch.randn(2, 6, generator=g)
    return network(**given).sample


@pytest.mark.parametrize("make", [emmdit, sd3])
def test_adapters_begin_as_nothing_train_alone_and_merge(make) -> None:
    torch.manual_seed(0)
    network, lora = make(), LoRA(rank=4, alpha=8)
    before, keys = predict(network), list(network.state_dict())
    lora.add_to(network)
    assert torch.equal(predict(network), before)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    adapted = predict(network)
    assert (adapted - before).abs().max() > 1e-3
    merge(network)
    assert list(network.state_dict()) == keys
    torch.testing.assert_close(predict(network), adapted, rtol=1e-4, atol=1e-5)


def test_base_weights_load_beneath_adapters(tmp_path) -> None:
    torch.manual_seed(0)
    base, network = emmdit(), emmdit()
    base.save_pretrained(tmp_path)
    LoRA(rank=2).add_to(network)
    load_weights(network, tmp_path)
    torch.testing.assert_close(predict(network), predict(base))


def test_a_network_without_the_names_is_refused() -> None:
    with pytest.raises(ValueError, match="EMMDiTTransformer2DModel.*to_nowhere"):
        LoRA(targets=["to_nowhere"]).add_to(emmdit())
    with pytest.raises(ValueError, match="0"):
        LoRA(rank=0)


TINY = """
model:
  init_args:
    denoiser: {init_args: {num_attention_heads: 2, attention_head_dim: 16}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01, weight_decay: 0.0}}
    scheduler: null
    ADAPTER
data: {init_args: {batch_size: 4, validation_samples: 4, num_workers: 0}}
trainer: {max_steps: 2, val_check_interval: 2, log_every_n_steps: 1}
checkpoint: {every_n_train_steps: 1}
samples: {prompts: null}
"""


def test_from_base_weights_over_a_resume_to_an_export() -> None:
    def arguments(name: str, adapter: str, *extra: str) -> list[str]:
        sizes = change(TINY.replace("ADAPTER", adapter), f"{name}.yaml")
        return ["fit", *files("quickstart.yaml"), *sizes, *ON_CPU, f"--trainer.default_root_dir=runs/{name}", *extra]

    main(arguments("base", "ema: true"))
    lora = "adapter: {class_path: emmdit.adapters.LoRA, init_args: {rank: 2}}\n    init_from: runs/base"
    main(arguments("tuned", lora, "--trainer.max_steps=1"))
    main(arguments("tuned", lora, "--ckpt_path=last"))
    base, tuned = (checkpoint_state(find_checkpoint(f"runs/{name}")) for name in ("base", "tuned"))
    frozen = {key: value for key, value in tuned.items() if key.startswith("denoiser.") and "lora_" not in key}
    assert all(torch.equal(value, base[f"ema_{key.replace('.base_layer', '')}"]) for key, value in frozen.items())
    assert any("lora_B" in key and value.any() for key, value in tuned.items())
    main(["export", "--ckpt", "runs/tuned", "--weights", "raw", "--out", "exported"])
    network = EMMDiTTransformer2DModel.from_pretrained("exported/transformer")
    assert not any("lora_" in key for key in network.state_dict())
    moved = network.blocks[0].attn.to_q.weight - base["ema_denoiser.blocks.0.attn.to_q.weight"]
    assert 1e-4 < moved.abs().max() < 0.1 and torch.linalg.matrix_rank(moved, rtol=1e-3) <= 2
