"""Recording of layer outputs: what is kept and when, and under torch.compile."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from emmdit.encoders import DCTCodec
from emmdit.networks import OutputRecorder, linearize
from emmdit.shapes import ShapesText
from lightning_modules import AttentionDistillation
from tests.toy import Metrics, trainer

LAYERS = 10  # more blocks than torch's limit of graphs for one function, which is 8
CAPTIONS = ["a photo of a red circle", "a photo of two squares", "a photo of a star", "a photo of a cross"]


def teacher() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    sizes = dict(sample_size=4, patch_size=1, in_channels=32, out_channels=32, num_layers=LAYERS, attention_head_dim=8)
    sizes |= dict(num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=16, pooled_projection_dim=64)
    sizes |= dict(qk_norm="rms_norm", pos_embed_max_size=8, dual_attention_layers=tuple(range(LAYERS)))
    return SD3Transformer2DModel(**sizes)


def inputs(step: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(step)
    return {
        "hidden_states": torch.randn(2, 32, 4, 4, generator=g),
        "timestep": torch.tensor([100.0, 800.0]),
        "encoder_hidden_states": torch.randn(2, 3, 64, generator=g),
        "pooled_projections": torch.randn(2, 64, generator=g),
    }


class Latents(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        g = torch.Generator().manual_seed(index)
        return {"latents": torch.randn(32, 4, 4, generator=g), "caption": CAPTIONS[index % 4], "sample_id": index}


def curves(folder: Path, compile: bool) -> dict[str, list[float]]:
    """Two training steps of a distillation: what each loss was, and the validation loss after them."""
    metrics = Metrics(folder)
    settings = dict(teacher="teacher", teacher_dtype="float32", ema=False, train="all", compile=compile)
    student = AttentionDistillation(teacher, DCTCodec(), ShapesText(max_length=12, pooled=True), **settings)
    loader = torch.utils.data.DataLoader(Latents(), batch_size=4)
    run = trainer(folder, max_steps=2, logger=metrics, val_check_interval=2, check_val_every_n_epoch=None)
    run.fit(student, loader, loader)
    for recorder in (
        student.components["distillation"].student_layers,
        student.components["distillation"].teacher_layers,
    ):
        assert not any("recorded_output" in layer.__dict__ for layer in recorder.layers.values())
    names = [f"train/{name}" for name in ("loss", "task", "output", "features")] + ["val/loss_raw", "val/loss_teacher"]
    return {name: metrics.values(name) for name in names}


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_distillation_learns_what_an_eager_one_does_and_equal_blocks_share_graphs(
    backend: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher().save_pretrained("teacher")
    expected = curves(tmp_path / "eager", compile=False)
    torch._dynamo.reset()
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def compile_in_place(block: nn.Module) -> None:  # nn.Module.compile, with a backend
        block._compiled_call_impl = torch.compile(block._call_impl, backend=counting if backend == "eager" else backend)

    monkeypatch.setattr(nn.Module, "compile", compile_in_place)
    found = curves(tmp_path / "compiled", compile=True)
    torch._dynamo.reset()
    for name, values in expected.items():
        assert len(values) == (1 if name.startswith("val") else 2)
        assert found[name] == pytest.approx(values, rel=1e-4), name
    if backend == "eager":
        # student and teacher, blocks and the last block (without a prompt), with gradients and without
        assert 0 < len(graphs) <= 8 < LAYERS


def test_when_and_removal() -> None:
    network = linearize(teacher()).eval()
    layers = {"first": network.transformer_blocks[0].attn2}
    always = OutputRecorder(layers, when="always")
    with torch.no_grad():
        network(**inputs(0))
    (output,) = always.take()["first"]
    assert output.shape == (2, 16, 16) and not output.requires_grad
    always.remove()
    network(**inputs(0))
    with pytest.raises(RuntimeError, match="first"):
        always.take()
    with OutputRecorder(layers, when="always"):
        network(**inputs(0))
    copy.deepcopy(network)  # no recorded tensor with a graph is in the way
