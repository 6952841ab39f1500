"""Recording of layer outputs by forward hooks, under torch.compile too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from torch import Tensor, nn


class OutputRecorder:
    """Keeps the outputs of named layers of each forward pass, with their graph, until they are taken.

    Install it once, before compilation: a graph traced without hooks does not see later ones. Every layer gets the same
    hook function, which reads nothing of its own layer, so that equal blocks share one compiled graph. Recomputation
    under gradient checkpointing records once more, which the next pass overwrites.

    Args:
        layers: by the name under which the outputs are wanted.
        when: "training": only passes in training mode (validation and sampling leave nothing behind); "always".
    """

    def __init__(self, layers: Mapping[str, nn.Module], when: Literal["training", "always"] = "training") -> None:
        self.layers = dict(layers)
        hook = _record_in_training if when == "training" else _record
        self._handles = [layer.register_forward_hook(hook) for layer in self.layers.values()]

    def take(self) -> dict[str, tuple[Tensor, ...]]:
        """Name -> the outputs (B, tokens, width) of the latest pass; they are kept no longer.

        Outputs that are None are left out, and the prompt's rows of a last block, which diffusers computes for nothing.
        """
        taken = {}
        for name, layer in self.layers.items():
            found = layer.__dict__.pop("recorded_output", None)
            if found is None:
                raise RuntimeError(f"The layer {name} has not run since its output was last taken.")
            found = found if isinstance(found, tuple) else (found,)
            found = found[:1] if getattr(layer, "context_pre_only", False) else found
            taken[name] = tuple(part for part in found if part is not None)
        return taken

    def remove(self) -> None:
        """Uninstall the hooks."""
        for handle in self._handles:
            handle.remove()
        for layer in self.layers.values():
            layer.__dict__.pop("recorded_output", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _record(module: nn.Module, args: Any, output: Any) -> None:
    module.recorded_output = output


def _record_in_training(module: nn.Module, args: Any, output: Any) -> None:
    if module.training:
        module.recorded_output = output
