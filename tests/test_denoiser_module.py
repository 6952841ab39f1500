"""The base of all ways of training: components' life, counters with two optimizers, precision under FSDP2."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from emmdit.encoders import DCTCodec
from emmdit.flow import flow_loss
from emmdit.losses import REPA, LossComponent, LossInputs
from emmdit.networks import EMMDiTTransformer2DModel
from emmdit.seeding import generator
from emmdit.shapes import ShapesDataset, ShapesText
from emmdit.weights import component_weights
from lightning_modules import DenoiserModule, TextToImage
from lightning_modules.callbacks import EMA, Checkpoint, ImageGrid, Throughput
from lightning_modules.denoiser_module import VALIDATION_TIMESTEPS
from tests.toy import Metrics, trainer

ROOT = Path(__file__).parents[1]
SIZES = dict(sample_size=8, num_attention_heads=2, attention_head_dim=16, block_groups=(1, 1, 1))
SIZES |= dict(caption_channels=64, compression_ratios=(2,), subregion_pattern=("full",))


def denoiser() -> EMMDiTTransformer2DModel:
    return EMMDiTTransformer2DModel(**SIZES)


def module(kind: type[DenoiserModule] = TextToImage, **settings) -> DenoiserModule:
    return kind(denoiser, DCTCodec(), ShapesText(max_length=12), **{"ema": False} | settings)


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.scenes = ShapesDataset(length=64)

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict:
        g = torch.Generator().manual_seed(index)
        return {**self.scenes[index], "features": torch.randn(64, 6, generator=g)}


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Rows(), batch_size=4)


def test_a_components_modules_are_trained_saved_and_resumed_but_not_exported(tmp_path: Path) -> None:
    """And the next stage, `init_from` a checkpoint of this one, takes them over."""

    def repa() -> REPA:
        return REPA("blocks.0", feature_dim=6, projector_dim=8)

    model, metrics = module(components=[repa()]), Metrics(tmp_path)
    checkpoint = Checkpoint(dirpath=tmp_path, every_n_train_steps=2)
    run = trainer(tmp_path, [checkpoint], max_steps=2, enable_checkpointing=True, logger=metrics)
    run.fit(model, loader())
    (path,) = tmp_path.glob("*.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    assert {key.split(".")[0] for key in state} == {"denoiser", "components"}
    assert not any("projector" in key for key in state if key.startswith("denoiser"))
    fresh = module(components=[repa()])
    fresh.configure_model()
    start = fresh.components["repa"].projector[0].weight
    trained = state["components.repa.projector.0.weight"]
    assert 0 < (trained - start).abs().max() < 0.1
    assert component_weights(path, "repa").keys() == {
        f"projector.{i}.{k}" for i in (0, 2, 4) for k in ("weight", "bias")
    }
    total, task, aligned = (metrics.values(f"train/{name}")[0] for name in ("loss", "task", "repa"))
    assert total == pytest.approx(task + 0.5 * aligned, rel=1e-5)
    again = module(components=[repa()], init_from=str(path))
    again.configure_model()
    assert torch.equal(again.components["repa"].projector[0].weight, trained)
    other = module(components=[REPA("blocks.0", feature_dim=6, projector_dim=9)], init_from=str(path))
    with pytest.raises(ValueError, match=r"repa.*projector\.0\.bias"):
        other.configure_model()
    network, kind = again.load_denoiser(str(path))
    assert kind == "raw" and network.state_dict().keys() == denoiser().state_dict().keys()


def test_a_checkpoint_of_the_time_when_repa_was_in_the_network_resumes(tmp_path: Path) -> None:
    """To the last bit: its projector's weights and optimizer state are found under their present names."""

    def fit(folder: Path, steps: int, ckpt: Path | None = None) -> TextToImage:
        model = module(components=[REPA("blocks.0", feature_dim=6, projector_dim=8)], ema=True)
        checkpoint = Checkpoint(dirpath=folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        run = trainer(folder, [EMA(), checkpoint], max_steps=steps, enable_checkpointing=True)
        run.fit(model, torch.utils.data.DataLoader(Rows(), batch_size=4, sampler=range(8)), ckpt_path=ckpt)
        return model

    whole = fit(tmp_path / "whole", 4)
    old = torch.load(tmp_path / "whole/step=2.ckpt", weights_only=True)
    state = old["state_dict"]
    for key in [key for key in state if key.startswith("components.repa.")]:
        name = key.removeprefix("components.repa.projector.")
        state[f"denoiser.repa_projector.{name}"] = state.pop(key)
        state[f"ema_denoiser.repa_projector.{name}"] = torch.zeros(1)
    del old["training_steps"]
    torch.save(old, tmp_path / "old.ckpt")
    assert component_weights(tmp_path / "old.ckpt", "repa").keys() == whole.components["repa"].state_dict().keys()
    resumed = fit(tmp_path / "resumed", 4, tmp_path / "old.ckpt")
    assert resumed.training_steps == 4
    a, b = whole.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_backbone_that_the_suite_does_not_know_trains_and_samples(tmp_path: Path) -> None:
    """Any diffusers transformer of the same call, REPA included: SANA's."""
    sizes = dict(sample_size=8, patch_size=1, in_channels=32, out_channels=32, num_layers=2, caption_channels=64)
    sizes |= dict(num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32)
    sizes |= dict(num_cross_attention_heads=2, cross_attention_head_dim=16)
    repa = REPA("transformer_blocks.0", feature_dim=6, projector_dim=8)
    text = ShapesText(max_length=12)
    model = TextToImage(lambda: SanaTransformer2DModel(**sizes), DCTCodec(), text, components=[repa])
    trainer(tmp_path, [EMA()], max_steps=1).fit(model, loader())
    assert model.training_steps == 1
    assert model.sample(["a photo of a star"], [0], steps=2).shape == (1, 3, 32, 32)


def test_components_have_names_of_their_own() -> None:
    with pytest.raises(ValueError, match="component"):
        module(components=[REPA("blocks.0"), REPA("blocks.2")])


def test_validation_and_samples_do_not_disturb_what_is_recorded(tmp_path: Path) -> None:
    model = module(components=[REPA("blocks.0", feature_dim=6, projector_dim=8)])
    grid = ImageGrid(["a photo of a circle"], every_n_steps=1, steps=1)
    run = trainer(tmp_path, [grid], max_steps=2, val_check_interval=1, check_val_every_n_epoch=None)
    run.fit(model, loader(), loader())
    assert model.training_steps == 2 and model.samples_seen == 8
    assert "recorded_output" not in model.denoiser.blocks[0].__dict__


def test_caption_gain_is_what_a_wrong_caption_costs(tmp_path: Path) -> None:
    """Of the EMA, over the pairs whose captions differ, by hand."""
    captions = ["a photo of a circle", "a photo of a star", "a photo of two crosses", "a photo of two crosses"]
    rows = [Rows()[i] | {"sample_id": i, "caption": caption} for i, caption in enumerate(captions)]

    def gain(model: TextToImage, samples: list[dict]) -> float:
        run = trainer(tmp_path)
        (found,) = run.validate(model, torch.utils.data.DataLoader(samples, batch_size=4), verbose=False)
        return found["val/caption_gain"]

    model = module(ema=True)
    model.configure_model()
    for network in (model.denoiser, model.ema_denoiser):
        nn.init.normal_(network.proj_out.weight, std=0.1)
        for name, parameter in network.named_parameters():
            if "norm" in name or "scale_shift" in name:
                nn.init.normal_(parameter, std=0.5)
    found = gain(model, rows)
    x0 = model.latents({"image": torch.stack([row["image"] for row in rows])})
    noise = [torch.randn(x0.shape[1:], generator=generator(0, "validation", i)) for i in range(4)]
    expected = []
    for i in (0, 1, 2):  # not 3, whose neighbor has its caption
        for timestep in VALIDATION_TIMESTEPS:
            t, x, e = torch.tensor([timestep]), x0[i : i + 1], noise[i][None]
            errors = []
            for caption in (captions[i], captions[i - 1]):
                with torch.no_grad():
                    condition = model.condition([caption])
                    output = model.ema_denoiser(model.path.interpolate(x, e, t), timestep=t, **condition).sample
                errors.append(flow_loss(output, model.path.target(x, e, t)).item())
            expected.append((errors[1] - errors[0]) / errors[0])
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-3) and abs(found) > 1e-6
    assert math.isnan(gain(model, rows[2:]))  # no pair differs
    off = module(ema=True, caption_gain=False)
    off.configure_model()
    with pytest.raises(KeyError):
        gain(off, rows)


class TwoOptimizers(DenoiserModule):
    """Alternates as an adversarial training does: two steps of a critic for each of the denoiser."""

    automatic_optimization = False

    def configure_optimizers(self):
        self.critic = nn.Linear(32, 1)
        return torch.optim.SGD(self.denoiser.parameters(), 1e-3), torch.optim.SGD(self.critic.parameters(), 1e-3)

    def training_step(self, batch: dict, batch_idx: int) -> None:
        generator, critic = self.optimizers()
        x0 = self.latents(batch)
        t = torch.full((len(x0),), 500.0)
        for _ in range(2):
            critic.zero_grad()
            self.manual_backward(self.critic(x0.mean(dim=(2, 3))).mean())
            critic.step()
        generator.zero_grad()
        prediction = self.denoiser(x0, timestep=t, **self.condition(batch["caption"])).sample
        self.manual_backward(flow_loss(prediction, x0).mean())
        generator.step()
        self.samples_seen += len(x0)
        self.count_step()


def test_intervals_count_training_steps_not_the_calls_of_several_optimizers(tmp_path: Path) -> None:
    model, metrics = module(TwoOptimizers, ema=True), Metrics(tmp_path)
    ema, checkpoint = EMA(every_n_steps=2), Checkpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1)
    grid, throughput = ImageGrid(["a photo of a star"], every_n_steps=3, steps=1), Throughput(window=8)
    run = trainer(
        tmp_path, [ema, checkpoint, grid, throughput], max_steps=15, enable_checkpointing=True, logger=metrics
    )
    run.fit(model, loader())
    assert run.global_step == 15 and model.training_steps == 5
    assert ema.updates == 2  # steps 2 and 4
    assert {path.stem.partition("-")[2] for path in tmp_path.glob("*.ckpt")} == {"step=2", "step=4", "step=5"}
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"step_0000003.png", "step_0000005.png"}
    assert throughput.latest["seconds_per_step"] > 0 and len(throughput._steps) <= 4
    saved = torch.load(tmp_path / "epoch=0-step=4.ckpt", weights_only=True)
    assert saved["training_steps"] == 4 and saved["samples_seen"] == 16


class Drift(LossComponent):
    """Pulls the prediction up, and keeps count of what it was attached to."""

    name = "drift"
    attached = 0

    def attach(self, network: nn.Module) -> None:
        self.attached += 1

    def forward(self, inputs: LossInputs) -> Tensor:
        return -inputs.prediction.mean()


def test_a_component_is_attached_once_and_its_weight_counts(tmp_path: Path) -> None:
    drift = Drift(drift=100.0)
    model = module(components=[drift], task_weight=0.0)
    model.configure_model()
    before = model.denoiser.proj_out.bias.detach().clone()
    trainer(tmp_path, max_steps=1).fit(model, loader())
    assert drift.attached == 1
    assert (model.denoiser.proj_out.bias > before).all()
    with pytest.raises(ValueError, match="task_weight"):
        module(task_weight=0.0)


SCRIPT = """
import json, sys
import torch
from torch.distributed.tensor import DTensor
from emmdit.losses import REPA
from lightning_modules.parallel import FSDP2Strategy
from tests.test_denoiser_module import Rows, loader, module
from tests.toy import trainer

precision, folder = sys.argv[1:3]
dtypes, gradients = {}, {}

def build():
    model = module(components=[REPA("blocks.0", feature_dim=6, projector_dim=8)], ema=True)
    model.configure_optimizers = lambda: torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1
    )
    return model

model = build()
def watch(*_):
    for name in ("denoiser.blocks.1.attn.to_q", "denoiser.time_embed.linear_1", "components.repa.projector.0"):
        def note(layer, args, output, name=name):
            dtypes[name] = str(layer.weight.dtype)
        model.get_submodule(name).register_forward_hook(note)
model.on_train_start = watch
def look(optimizer):
    for p in model.parameters():
        if p.grad is not None:
            gradients[str(p.grad.dtype) + ("" if isinstance(p.grad, DTensor) else " plain")] = 1
model.on_before_optimizer_step = look
run = trainer(folder, devices=2, strategy=FSDP2Strategy(), max_steps=2, precision=precision)
run.fit(model, torch.utils.data.DataLoader(Rows(), batch_size=2, sampler=range(run.global_rank, 64, 2)))
masters = {str(p.dtype) for p in model.parameters()}
whole = lambda p: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
weights = {name: whole(p).tolist() for name, p in model.named_parameters()}
if run.is_global_zero:
    print("RESULT", json.dumps([dtypes, sorted(gradients), sorted(masters), weights]), flush=True)
"""


@pytest.mark.slow
def test_fsdp2_gathers_bfloat16_and_keeps_float32_masters(tmp_path: Path) -> None:
    """Under bf16-mixed; losses' own modules are sharded too, and weights are those of float32 up to its rounding."""
    (tmp_path / "script.py").write_text(SCRIPT)
    found = {}
    for precision in ("32-true", "bf16-mixed"):
        done = subprocess.run(
            [sys.executable, str(tmp_path / "script.py"), precision, str(tmp_path / precision)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        found[precision] = json.loads(line.removeprefix("RESULT"))
    for precision, gathered in (("32-true", "torch.float32"), ("bf16-mixed", "torch.bfloat16")):
        dtypes, gradients, masters, weights = found[precision]
        assert len(dtypes) == 3 and set(dtypes.values()) == {gathered}, precision
        assert gradients == ["torch.float32"] and masters == ["torch.float32"]  # sharded, all of them
    assert any(name.startswith("components.repa") for name in weights)
    for name, value in found["32-true"][3].items():
        one, other = torch.tensor(value), torch.tensor(found["bf16-mixed"][3][name])
        assert (one - other).norm() <= 0.02 * one.norm() + 1e-3, name
