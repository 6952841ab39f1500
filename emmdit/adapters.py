"""LoRA adapters (arXiv 2106.09685) in any denoiser, by peft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters beside frozen Linears: y = W x + (alpha / rank) B A x, with B = 0 at the start.

    Args:
        rank: of A and B.
        alpha: scale; None: the rank, so that the factor is 1.
        targets: names of the Linears, by the end of their module names; by default those of attention.
        dropout: of the adapters' input.
    """

    rank: int = 32
    alpha: float | None = None
    targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA needs a rank of at least 1, got {self.rank}.")

    def add_to(self, network: nn.Module) -> None:
        """Put adapters into `network` in place, and freeze all else.

        Raises:
            ValueError: no Linear has one of the names.
        """
        names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
        found = [name for name in names if any(name == end or name.endswith(f".{end}") for end in self.targets)]
        if not found:
            raise ValueError(f"{type(network).__name__} has no Linear named {', '.join(self.targets)} for LoRA.")
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha or self.rank, target_modules=found, lora_dropout=self.dropout
        )
        inject_adapter_in_model(config, network)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_("lora_" in name)


def merge(network: nn.Module) -> nn.Module:
    """Add the adapters to the weights they stand beside and remove them, in place: the network it was, retrained."""
    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            owner = network.get_submodule(parent)
            base = module.get_base_layer()
            if child.isdigit():
                owner[int(child)] = base
            else:
                setattr(owner, child, base)
    return network
