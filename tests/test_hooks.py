"""Recording of layer outputs: what is kept and when, and under torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from emmdit.networks import OutputRecorder, attention_layers, linearize
from lightning_modules.parallel import parallelize

LAYERS = 10  # more blocks than torch's limit of graphs for one function, which is 8


def student() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(
        sample_size=4, patch_size=1, in_channels=4, num_layers=LAYERS, attention_head_dim=8, qk_norm="rms_norm"
    )
    sizes |= dict(num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=6)
    return linearize(SD3Transformer2DModel(**sizes, pos_embed_max_size=8, dual_attention_layers=tuple(range(LAYERS))))


def inputs(step: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(step)
    return {
        "hidden_states": torch.randn(2, 4, 4, 4, generator=g),
        "timestep": torch.tensor([100.0, 800.0]),
        "encoder_hidden_states": torch.randn(2, 3, 12, generator=g),
        "pooled_projections": torch.randn(2, 6, generator=g),
    }


def train(network: nn.Module, recorder: OutputRecorder, steps: int = 2) -> list[Tensor]:
    """Losses that read the recorded outputs, after steps of SGD, and the outputs of the last step."""
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        sample = network(**inputs(step)).sample
        features = [part for parts in recorder.take().values() for part in parts]
        loss = sample.square().mean() + torch.stack([part.square().mean() for part in features]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(part.detach() for part in features)]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_record_what_eager_ones_do_and_share_their_graphs(backend: str, monkeypatch) -> None:
    plain, compiled = student().train(), student().train()
    expected = train(plain, OutputRecorder(attention_layers(plain)))
    torch._dynamo.reset()
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def compile_in_place(block: nn.Module) -> None:  # nn.Module.compile, with a backend
        block._compiled_call_impl = torch.compile(block._call_impl, backend=counting if backend == "eager" else backend)

    monkeypatch.setattr(nn.Module, "compile", compile_in_place)
    recorder = OutputRecorder(attention_layers(compiled))
    parallelize(compiled, compile=True, mesh=None)
    found = train(compiled, recorder)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if backend == "eager":
        assert 0 < len(graphs) <= 4  # the blocks, the last one (without a prompt), each perhaps once more
    compiled.eval()
    with torch.no_grad():
        compiled(**inputs(0))
    with pytest.raises(RuntimeError, match="transformer_blocks.0.attn"):  # nothing is recorded in evaluation
        recorder.take()
    torch._dynamo.reset()


def test_when_and_removal() -> None:
    network = student().eval()
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
