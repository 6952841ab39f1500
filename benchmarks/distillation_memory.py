"""Memory plan of distilling SD3.5-Medium and PixArt-Sigma under FSDP2: what lies on each of so many GPUs.

    python -m benchmarks.distillation_memory --gpus 8

Nothing is allocated: parameters and the tensors kept for the backward pass are counted on the meta device. Bytes are
exact for what they name; the sum is a plan (no fragmentation, workspaces or communication buffers; autoencoder and text
encoders come on top, if latents and text are not computed before). GB are 1e9 bytes.

- teacher: shards in bfloat16. student, average (EMA), gradients, Adam's two moments: shards in float32, the last two of
  what trains.
- gathered: the largest block twice (the next one is fetched early) and all outside the blocks, of student (float32) and
  teacher (bfloat16); of one block the gradients and the copies that autocast makes of its weights.
- positions: tables that are buffers, whole on every GPU; float32 for student and average, bfloat16 for the teacher.
- a sample: the student's activations (bfloat16; sums of linear attention float32), the teacher's attention outputs
  (bfloat16) and their difference from the student's (float32). With gradient checkpointing: the inputs of all blocks,
  all attention outputs and what one block keeps.
- casts: without checkpointing the backward pass also needs autocast's copies of all blocks' weights, whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.common import argument_parser, markdown_table, show, write_json
from benchmarks.teachers import TEACHERS, Teacher, build
from emmdit.networks import attention_outputs, parameter_names
from emmdit.provenance import machine

NETWORKS = ("PixArt-Sigma", "SD3.5-Medium")
TRAINED = ("new", "attention", "all")
WEIGHTS = {
    "network": "of",
    "trained": "trains",
    "m_teacher": "teacher, M",
    "m_student": "student, M",
    "m_trained": "trained, M",
    "teacher": "teacher, GB",
    "student": "student",
    "average": "average",
    "gradients": "gradients",
    "adam": "Adam",
    "gathered": "gathered",
    "positions": "positions",
    "total": "sum",
    "casts": "casts, without checkpointing",
}
ACTIVATIONS = {
    "network": "of",
    "px": "px",
    "inputs": "block inputs, GB",
    "outputs": "attention outputs and differences",
    "block": "one block",
    "checkpointed": "a sample, with checkpointing",
    "plain": "without",
}


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def weights(teacher: Teacher, theirs: nn.Module, ours: nn.Module, gpus: int) -> list[dict[str, Any]]:
    """A row for each choice of what trains: parameters in millions, GB on each GPU."""
    largest, outside = {}, {}
    for who, network in (("teacher", theirs), ("student", ours)):
        blocks = [count(block.parameters()) for block in getattr(network, teacher.blocks)]
        largest[who], outside[who] = max(blocks), count(network.parameters()) - sum(blocks)
    table = sum(buffer.numel() for buffer in theirs.buffers())
    n_theirs, n_ours = count(theirs.parameters()), count(ours.parameters())
    rows = []
    for part in TRAINED:
        names = set(parameter_names(ours, part))
        trained = {key: p for key, p in ours.named_parameters() if key in names}
        in_block = [
            count(p for key, p in trained.items() if key.startswith(f"{teacher.blocks}.{i}."))
            for i in range(len(getattr(ours, teacher.blocks)))
        ]
        held = {
            "teacher": 2 * n_theirs / gpus,
            "student": 4 * n_ours / gpus,
            "average": 4 * n_ours / gpus,
            "gradients": 4 * count(trained.values()) / gpus,
            "adam": 8 * count(trained.values()) / gpus,
            "gathered": 4 * (2 * largest["student"] + outside["student"] + max(in_block))
            + 2 * (2 * largest["teacher"] + outside["teacher"] + largest["student"]),
            "positions": (4 + 4 + 2) * table,
        }
        held |= {"total": sum(held.values()), "casts": 2 * (n_ours - outside["student"] - largest["student"])}
        millions = {"m_teacher": n_theirs, "m_student": n_ours, "m_trained": count(trained.values())}
        rows.append(
            {"trained": part, "gpus": gpus}
            | {key: value / 1e6 for key, value in millions.items()}
            | {key: value / 1e9 for key, value in held.items()}
        )
    return rows


def storages(values: Any) -> dict[int, int]:
    """Bytes by storage of all tensors in a tree: views of one count once."""
    tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
    return {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}


class FusedAttention(torch.autograd.Function):
    """What a GPU's fused kernels keep; on the meta device torch takes the plain formula, which keeps all scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return FusedAttention.apply(q, k, v)


def kept_bytes(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> int:
    """Of what a call keeps for its backward pass, beside its inputs and parameters."""
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    fused = mock.patch.object(F, "scaled_dot_product_attention", fused_attention)
    with fused, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = module(*args, **kwargs)
    given = storages([args, kwargs, list(module.parameters())])
    found = storages(kept)
    del output
    return sum(size for key, size in found.items() if key not in given)


def activations(teacher: Teacher, px: int) -> dict[str, Any]:
    """GB for one sample in the student's training step."""
    calls: list[tuple[nn.Module, tuple, dict[str, Any]]] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append((module, args, kwargs))

    with torch.device("meta"):
        student = build(teacher, "student", px, torch.bfloat16)
        given = {key: value.to(torch.bfloat16) for key, value in teacher.inputs(student, px).items()}
        for block in getattr(student, teacher.blocks):
            block.register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad(), attention_outputs(student) as outputs:
            student(**given)
        inputs = sum(storages([call[1:] for call in calls]).values())
        for _, args, kwargs in calls:
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, Tensor):
                    x.requires_grad_()
        kept = [kept_bytes(*call) for call in list(calls)]
    features = sum(x.numel() for x in tree_leaves(outputs))
    found = {"inputs": inputs, "outputs": (2 + 2 + 4) * features, "block": max(kept)}
    found["checkpointed"] = sum(found.values())
    found["plain"] = inputs + sum(kept) + (2 + 4) * features  # the student's outputs are among what its blocks keep
    return {"px": px} | {key: value / 1e9 for key, value in found.items()}


def main(argv: list[str] | None = None, config: dict[str, dict[str, Any]] | None = None) -> None:
    """`config` changes the sizes of networks, by name (for a test)."""
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--resolutions", type=int, nargs="+", default=[512, 1024, 2048], metavar="PX")
    args = parser.parse_args(argv)
    rows, samples = [], []
    for name in args.networks:
        teacher = TEACHERS[name].changed((config or {}).get(name, {}))
        with torch.device("meta"):
            theirs, ours = (build(teacher, who) for who in ("teacher", "student"))
        rows += [{"network": name} | row for row in weights(teacher, theirs, ours, args.gpus)]
        samples += [{"network": name} | activations(teacher, px) for px in sorted(args.resolutions)]
    tables = [markdown_table(rows, WEIGHTS), markdown_table(samples, ACTIVATIONS)]
    show(f"Memory of attention distillation on {args.gpus} GPUs", machine(), tables)
    if args.json is not None:
        content = {"benchmark": "distillation_memory", "machine": machine(), "settings": {"gpus": args.gpus}}
        write_json(args.json, {**content, "weights": rows, "activations": samples})


if __name__ == "__main__":
    main()
