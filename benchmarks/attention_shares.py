"""Where a student's attention spends its time and FLOPs, part by part: forward passes of one layer at its true size.

    python -m benchmarks.attention_shares --device cpu --px 1024

Each part runs by itself on random tokens, in turn with the others and with the whole layer; "norms, mixture, copies" is
what the parts leave of the whole. One CPU thread is timed by the seconds in which it ran.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.attention_scaling import clock_of
from benchmarks.common import Run, argument_parser, interleaved, markdown_table, show, write_json
from benchmarks.teachers import TEACHERS, Teacher, build
from emmdit.networks.edit.attention import LinearAttention, linear_attention, merge_heads
from emmdit.networks.edit.hybrid import HybridAttention, join, softmax_attention
from emmdit.provenance import machine

REST = "norms, mixture, copies"


def steps(layer: LinearAttention, x: Tensor, prompt: Tensor, side: int) -> dict[str, Run]:
    """The parts of the paper's form, and "whole": the layer on tokens x (B, N, D) and prompt (B, T, D)."""
    grids = ((side, side),)
    q, k, v = layer.queries(x, grids), layer.keys(x, grids), layer.values(x, grids)
    long_k, long_v = layer.to_k(x), layer.to_v(x)
    found: dict[str, Run] = {
        "ConvFusion": lambda: layer.fuse_q(x, grids),
        "projections of the image": lambda: (
            [linear(x) for linear in (layer.to_q, layer.to_k, layer.to_v)],
            layer.to_out(merge_heads(q)),
        ),
        "Spatial Compressor": lambda: (layer.compress_k(long_k, grids), layer.compress_v(long_v, grids)),
        "linear product": lambda: linear_attention(F.relu(q), F.relu(k), v),
    }
    if not isinstance(layer, HybridAttention):
        return found | {"whole": lambda: layer(x, grids=grids)}
    prompt_k, prompt_v, prompt_q = layer.prompt_keys(prompt), layer.prompt_values(prompt), layer.prompt_queries(prompt)
    keys, values = join(k, prompt_k), join(v, prompt_v)
    return found | {
        "projections of the prompt": lambda: (
            [linear(prompt) for linear in (layer.add_q_proj, layer.add_k_proj, layer.add_v_proj)],
            layer.to_add_out(merge_heads(prompt_q)),
        ),
        "image-to-prompt softmax": lambda: softmax_attention(q, prompt_k, prompt_v),
        "prompt rows": lambda: softmax_attention(prompt_q, keys, values),
        "whole": lambda: layer(x, prompt, grids=grids),
    }


def of_layer(teacher: Teacher, px: int, device: torch.device, dtype: torch.dtype) -> dict[str, Run]:
    with device:
        network = build(teacher, "student", 512, dtype, **teacher.one_block)
        layer = getattr(getattr(network, teacher.blocks)[0], teacher.attention)
        n, width = teacher.tokens(network, px), layer.to_k.in_features
        x, prompt = (torch.randn(1, tokens, width, dtype=dtype) for tokens in (n, teacher.text_tokens))
    return steps(layer, x, prompt, round(n**0.5))


@torch.no_grad()
def shares(teacher: Teacher, px: int, device: torch.device, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    flops = {}
    for part, run in of_layer(teacher, px, torch.device("meta"), dtype).items():
        with FlopCounterMode(display=False) as counter:
            run()
        flops[part] = counter.get_total_flops()
    timings = interleaved(of_layer(teacher, px, device, dtype), device, rounds, 0.01, clock_of(device))
    seconds = {part: timing.median for part, timing in timings.items()}
    whole = seconds.pop("whole"), flops.pop("whole")
    seconds[REST], flops[REST] = whole[0] - sum(seconds.values()), whole[1] - sum(flops.values())
    return [
        {
            "part": part,
            "ms": 1e3 * seconds[part],
            "time_percent": 100 * seconds[part] / whole[0],
            "gflop": flops[part] / 1e9,
            "flop_percent": 100 * flops[part] / whole[1],
        }
        for part in seconds
    ]


def main(argv: list[str] | None = None, config: dict[str, dict[str, Any]] | None = None) -> None:
    """`config` changes the sizes of networks, by name (for a test)."""
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=tuple(TEACHERS), default=list(TEACHERS))
    parser.add_argument("--px", type=int, nargs="+", default=[1024])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--rounds", type=int, help="turns of each part; default 10, --quick 1")
    args = parser.parse_args(argv)
    device, rounds = torch.device(args.device), args.rounds or (1 if args.quick else 10)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    found, rows = machine(device), []
    for name in args.networks:
        teacher = TEACHERS[name].changed((config or {}).get(name, {}))
        for px in args.px:
            rows += [{"network": name, "px": px} | row for row in shares(teacher, px, device, dtype, rounds)]
    columns = {"network": "of", "px": "px", "part": "part", "ms": "ms", "time_percent": "% of the layer's time"}
    columns |= {"gflop": "GFLOP", "flop_percent": "% of its FLOPs"}
    show("Parts of a student's attention", found, [markdown_table(rows, columns)])
    if args.json is not None:
        settings = {"dtype": str(dtype), "rounds": rounds}
        write_json(args.json, {"benchmark": "attention_shares", "machine": found, "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
