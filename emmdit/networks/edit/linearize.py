"""`linearize`, from a teacher to its linear attention student and back, and the parts of a student that train."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from emmdit.networks.edit.attention import ConvFusion, LinearAttention, SpatialCompressor
from emmdit.networks.edit.baselines import NEW_PARTS, MixFeedForward
from emmdit.networks.edit.config import LinearAttentionConfig
from emmdit.networks.edit.students import LAYERS, STUDENTS, replace_attention, teacher_class

Part = Literal["new", "attention", "all"]


def linearize(network: nn.Module, **choices: Any) -> nn.Module:
    """Turn a teacher into its student in place, and return it.

    Args:
        network: a `PixArtTransformer2DModel`, `SD3Transformer2DModel` or `EMMDiTTransformer2DModel`. The student keeps
            its projections, norms and feed-forwards; to distill from it, keep a copy or see `teacher_of`.
        choices: fields of `LinearAttentionConfig`; with none, the paper's form.

    New weights are drawn from torch's global generator and have the teacher's device and dtype.

    Raises:
        ValueError: for another network, for a student, or for choices that do not fit; it is then unchanged.
    """
    kind = type(network)
    if kind in STUDENTS.values():
        raise ValueError(f"This {kind.__name__} is a student already: linearize its teacher.")
    if kind not in STUDENTS:
        known = ", ".join(teacher.__name__ for teacher in STUDENTS)
        raise ValueError(f"linearize knows no student of a {kind.__name__}, only of {known}.")
    for module in network.modules():
        if getattr(module, "fused_projections", False) or getattr(module, "to_qkv", None) is not None:
            raise ValueError("This network's projections are fused: call unfuse_qkv_projections() before linearize.")
    replace_attention(network, LinearAttentionConfig.of(choices))
    # The one place where an object changes its class. diffusers makes a network of another class from a config only,
    # as a second object; here pipelines and modules that hold the network shall hold the student. It is what the
    # student's __init__ would have made: a teacher in its constructor, then `replace_attention`.
    network.__class__ = STUDENTS[kind]
    return network


def teacher_of(network: nn.Module) -> nn.Module:
    """A new network of the teacher's class and config, with new weights, on torch's default device (meta, too).

    For a network that is no student it is one of its own class and config.
    """
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    teacher = teacher_class(type(network))
    if teacher is not type(network):
        del config["attention"]
    return teacher(**config)


def attention_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Attention that a student replaces, by name, in student and teacher alike: where features are compared."""
    for teacher, (blocks, names) in LAYERS.items():
        if isinstance(network, teacher):
            return {
                f"{blocks}.{i}.{name}": getattr(block, name)
                for i, block in enumerate(getattr(network, blocks))
                for name in names
                if getattr(block, name) is not None
            }
    raise ValueError(f"There is no list of attention layers for a {type(network).__name__}.")


def parameter_names(student: nn.Module, part: Part) -> list[str]:
    """Names of the student's parameters that a distillation may train.

    - "new": what has no counterpart in the teacher (ConvFusion, compressors, token maps, Mix-FFN);
    - "attention": every replaced attention with all its projections, and Mix-FFN (LinFusion's recipe);
    - "all".
    """
    kinds = {
        "new": (ConvFusion, SpatialCompressor, *NEW_PARTS),
        "attention": (LinearAttention, MixFeedForward),
        "all": (nn.Module,),
    }
    if part not in kinds:
        raise ValueError(f"part must be one of {', '.join(kinds)}, got {part!r}.")
    within = [f"{name}." if name else "" for name, module in student.named_modules() if isinstance(module, kinds[part])]
    names = [name for name, _ in student.named_parameters() if name.startswith(tuple(within))]
    if not names:
        raise ValueError(f'This {type(student).__name__} has no "{part}" parameters: train "attention" or "all".')
    return names


def train_only(student: nn.Module, part: Part) -> list[str]:
    """Freeze all but one part (see `parameter_names`); returns the names of what trains."""
    names = set(parameter_names(student, part))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in names)
    return sorted(names)
