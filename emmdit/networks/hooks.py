"""What the attention layers of a network give out, read from outside while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from emmdit.networks.edit.linearize import attention_layers


@contextmanager
def attention_outputs(network: nn.Module) -> Iterator[dict[str, tuple[Tensor, ...]]]:
    """Keep the outputs of all layers that `linearize` replaces (in teacher and student alike), inside a `with`.

    Gives a dict that each forward pass fills: name of the layer -> its outputs (B, tokens, width), of the image and, in
    joint attention, of the prompt. They are taken as they are: with their graph, where there is one.
    """
    outputs: dict[str, tuple[Tensor, ...]] = {}

    def keeper(name: str):
        def keep(module: nn.Module, args: tuple, output: Tensor | tuple[Tensor | None, ...]) -> None:
            found = output if isinstance(output, tuple) else (output,)
            # diffusers gives the prompt's rows of the last block, too, which nothing uses
            if getattr(module, "context_pre_only", False):
                found = found[:1]
            outputs[name] = tuple(part for part in found if part is not None)

        return keep

    handles = [layer.register_forward_hook(keeper(name)) for name, layer in attention_layers(network).items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
