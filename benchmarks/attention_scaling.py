"""Time, peak memory and FLOPs of teachers and their linear attention students against the size of the picture.

    python -m benchmarks.attention_scaling --json benchmarks/results/attention_scaling_h200.json
    python -m benchmarks.attention_scaling --quick --device cpu     # one thread, about 10 minutes of it

Networks have their true sizes (`benchmarks/teachers.py`) and random weights. A part is "image" (attention of image
tokens among themselves, with its projections), "joint" (attention with the prompt), "block" (a whole one; of
SD3.5-Medium one with two attentions) or "network" (a call of the denoiser). Teacher and student take turns: read the
ratios.

FLOPs are of a forward pass, counted on the meta device and exact on any machine: 2 x multiply-add of matrix products,
convolutions and attention. Memory is the peak above what the process held before the call: activations, temporary
copies and, with a backward pass, gradients. One CPU thread is timed by the seconds in which it ran, so that neighbours
on the machine do not count as work; anything else by the wall clock. A call that is foretold to take longer than
`--limit` (or, on a CPU, more memory than there is) is left out, with a note.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import (
    Run,
    argument_parser,
    interleaved,
    markdown_table,
    peak_memory,
    progress,
    seconds_of,
    show,
    write_json,
)
from benchmarks.teachers import TEACHERS, Teacher, build
from emmdit.networks.edit.attention import LinearAttention
from emmdit.provenance import machine

PARTS = ("image", "joint", "block", "network")
MODES = {"forward": 1, "forward + backward": 3}  # and its work: a backward pass computes twice as much
WHO = ("teacher", "student")
RESOLUTIONS = (512, 1024, 2048, 4096, 8192)
# Teacher's time / student's (papers.md A8d): EDiT over PixArt-Sigma, MM-EDiT over SD3.5-Medium on an RTX 3090.
PUBLISHED = {
    ("PixArt-Sigma", 1024): 1.4,
    ("PixArt-Sigma", 2048): 3.2,
    ("PixArt-Sigma", 4096): 10.3,
    ("PixArt-Sigma", 8192): 43.0,
    ("SD3.5-Medium", 1024): 2.2,
}


# -- what is called ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A module of a network, and the arguments it is called with, on the meta device."""

    path: str
    args: tuple
    kwargs: dict[str, Any]
    alone: bool = False  # a joint attention without a prompt

    def function(self, network: nn.Module) -> Callable:
        module = network.get_submodule(self.path)
        linear = self.alone and isinstance(module, LinearAttention)
        return functools.partial(LinearAttention.forward, module) if linear else module

    def flops(self, network: nn.Module) -> int:
        """Of a network on the meta device."""
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.function(network)(*self.args, **self.kwargs)
        return counter.get_total_flops()

    def runner(self, network: nn.Module, mode: str, device: torch.device, dtype: torch.dtype) -> Run:
        """A call with random tensors of those shapes."""
        backward = mode != "forward"

        def real(x: Tensor) -> Tensor:
            return torch.randn(x.shape, device=device, dtype=dtype).requires_grad_(backward)

        function = self.function(network)
        args, kwargs = tree_map_only(Tensor, real, (self.args, self.kwargs))
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        leaves += network.get_submodule(self.path).parameters()

        def run() -> None:
            try:
                with torch.set_grad_enabled(backward):
                    outputs = [y for y in tree_leaves(function(*args, **kwargs)) if isinstance(y, Tensor)]
                    if backward:
                        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
            finally:  # out of memory, too
                for x in leaves:
                    x.grad = None

        return run


def parts_of(teacher: Teacher, network: nn.Module, given: dict[str, Any]) -> dict[str, Part]:
    """The parts of a network on the meta device, in its first block."""
    first = f"{teacher.blocks}.0"
    paths = {"joint": teacher.attention, "image": teacher.image_attention}
    paths = {part: f"{first}.{name}" for part, name in paths.items() if name} | {"block": first}
    if teacher.attention == teacher.image_attention:
        del paths["joint"]
    found = {"network": Part("", (), given)}
    handles = []
    for part, path in paths.items():

        def keep(module: nn.Module, args: tuple, kwargs: dict, part: str = part, path: str = path) -> None:
            found[part] = Part(path, args, kwargs)

        handles.append(network.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        network(**given)
    for handle in handles:
        handle.remove()
    if "image" not in found:
        (x, prompt, *_), kwargs = found["joint"].args, found["joint"].kwargs
        linear = isinstance(network.get_submodule(paths["joint"]), LinearAttention)
        found["image"] = Part(paths["joint"], (x,) if linear else (x, prompt[:, :0]), kwargs, alone=True)
    return found


# -- measuring ---------------------------------------------------------------------------------------


def clock_of(device: torch.device) -> Callable[[Run, torch.device, int], float]:
    if device.type != "cpu" or torch.get_num_threads() > 1:
        return seconds_of

    def running_seconds(run: Run, device: torch.device, calls: int = 1) -> float:
        start = time.process_time()
        for _ in range(calls):
            run()
        return (time.process_time() - start) / calls

    return running_seconds


class Guard:
    """Foretells a call from the last smaller one of its kind: none is to take all time or, on a CPU, all memory."""

    def __init__(self, device: torch.device, limit: float) -> None:
        self.device, self.limit = device, limit
        self.last: dict[tuple, tuple[float, float, int, int]] = {}  # kind -> seconds, work, bytes, tokens
        self.speed = math.inf  # the slowest so far, of all kinds, in FLOP/s

    def refuses(self, kind: tuple, work: float, tokens: int, weights: int = 0) -> str | None:
        """Why not to try it. `weights`: bytes that are allocated for it."""
        seconds, needed = work / self.speed, float(weights)
        if kind in self.last:
            seconds, before, memory, fewer = self.last[kind]
            seconds, needed = seconds * work / before, weights + memory * tokens / fewer
        if seconds > self.limit:
            return f"{seconds:.0f} s a call"
        if self.device.type == "cpu" and needed > 0.7 * psutil.virtual_memory().available:
            return f"{needed / 2**30:.0f} GiB"
        return None

    def saw(self, kind: tuple, work: float, tokens: int, seconds: float, memory: int | None) -> None:
        self.last[kind] = (seconds, work, memory or 0, tokens)
        self.speed = min(work / seconds, self.speed)


def measure(runs: dict[str, Run], device: torch.device, rounds: int, min_seconds: float) -> dict[str, dict[str, Any]]:
    """For each: `memory` of a first call and `seconds` of later ones, or the `note` that it did not fit."""
    results: dict[str, dict[str, Any]] = {}
    for who, run in runs.items():
        try:
            before, peak = peak_memory(lambda: None, device), peak_memory(run, device)
            results[who] = {"memory": None if peak is None or before is None else peak - before}
        except torch.OutOfMemoryError:
            results[who] = {"note": "out of memory"}
            torch.cuda.empty_cache()
    fitting = {who: runs[who] for who, result in results.items() if "note" not in result}
    for who, timing in interleaved(fitting, device, rounds, min_seconds, clock_of(device)).items():
        results[who]["seconds"] = timing.median
    return results


def benchmark(name: str, teacher: Teacher, args: Any, guard: Guard) -> Iterator[dict[str, Any]]:
    """Rows of one teacher and its student: parts and modes at each resolution, the smallest first."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    with device:
        blocks = {who: build(teacher, who, 512, dtype, **teacher.one_block) for who in WHO}
    for px in sorted(args.resolutions):
        parts: dict[str, dict[str, Part]] = {}
        flops: dict[str, dict[str, int]] = {}
        weights = 0
        with torch.device("meta"):
            for who in WHO:
                small, whole = build(teacher, who, px, **teacher.one_block), build(teacher, who, px)
                parts[who] = parts_of(teacher, small, teacher.inputs(small, px, args.batch))
                flops[who] = {key: part.flops(small) for key, part in parts[who].items() if key != "network"}
                flops[who]["network"] = parts[who]["network"].flops(whole)
                weights += sum(p.numel() for p in whole.parameters()) * dtype.itemsize
        tokens = teacher.tokens(small, px)
        for part in (part for part in PARTS if part in args.parts and part in flops["teacher"]):
            networks = blocks if part != "network" else {}
            for mode in args.modes:
                row = {"network": name, "part": part, "mode": mode, "px": px, "tokens": tokens}
                row |= {f"tflop_{who}": flops[who][part] / 1e12 for who in WHO} | {"notes": []}
                work = {who: flops[who][part] * MODES[mode] for who in WHO}
                runs = {}
                for who in WHO:
                    extra = 0 if part != "network" else weights * (2 if mode != "forward" else 1)
                    why = guard.refuses((name, part, mode, who), work[who], tokens, extra)
                    if why:
                        row["notes"].append(f"{who} not run: {why}")
                        continue
                    if who not in networks:
                        with device:
                            networks[who] = build(teacher, who, px, dtype)
                    runs[who] = parts[who][part].runner(networks[who], mode, device, dtype)
                progress(f"{name} {part} {px} px {mode}: {', '.join(runs) or 'not run'}")
                for who, result in measure(runs, device, args.rounds, args.min_seconds).items():
                    if "note" in result:
                        row["notes"].append(f"{who} {result['note']}")
                        continue
                    row |= {f"{key}_{who}": value for key, value in result.items()}
                    guard.saw((name, part, mode, who), work[who], tokens, result["seconds"], result["memory"])
                yield finished(row)


def finished(row: dict[str, Any]) -> dict[str, Any]:
    """With the ratios, teacher / student, where both are known, and the published one."""
    for key in ("seconds", "memory", "tflop"):
        teacher, student = (row.setdefault(f"{key}_{who}", None) for who in WHO)
        row[f"{key}_ratio"] = teacher / student if teacher and student else None
    whole = row["part"] == "network" and row["mode"] == "forward"
    row["published"] = PUBLISHED.get((row["network"], row["px"])) if whole else None
    row["note"] = "; ".join(row.pop("notes")) or None
    return row


# -- what it comes to --------------------------------------------------------------------------------


def exponent(points: list[tuple[int, float]]) -> float | None:
    """Slope of log value over log tokens by least squares; None for fewer than two sizes."""
    if len({tokens for tokens, _ in points}) < 2:
        return None
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in zip(*points, strict=True))
    x = x - x.mean()
    return ((x * y).sum() / x.square().sum()).item()


def exponents(rows: list[dict[str, Any]], smallest: int) -> list[dict[str, Any]]:
    """One row for each network, part and mode: fits over pictures of `smallest` pixels a side and more."""
    fits = []
    for kind in dict.fromkeys((row["network"], row["part"], row["mode"]) for row in rows):
        chosen = [r for r in rows if (r["network"], r["part"], r["mode"]) == kind and r["px"] >= smallest]
        fit: dict[str, Any] = dict(zip(("network", "part", "mode"), kind, strict=True))
        for who in WHO:
            for key in ("seconds", "tflop"):
                fit[f"{key}_{who}"] = exponent([(r["tokens"], r[f"{key}_{who}"]) for r in chosen if r[f"{key}_{who}"]])
            fit[f"px_{who}"] = max((r["px"] for r in chosen if r[f"seconds_{who}"]), default=None)
        fits.append(fit)
    return fits


def tables(rows: list[dict[str, Any]], fits: list[dict[str, Any]], smallest: int) -> list[str]:
    shown = [row | {f"ms_{who}": row[f"seconds_{who}"] and 1e3 * row[f"seconds_{who}"] for who in WHO} for row in rows]
    for row in shown:
        row |= {f"mib_{who}": row[f"memory_{who}"] and row[f"memory_{who}"] / 2**20 for who in WHO}
    columns = {"network": "of", "part": "part", "mode": "what", "px": "px", "tokens": "tokens"}
    columns |= {
        "ms_teacher": "ms, teacher",
        "ms_student": "student",
        "seconds_ratio": "ratio",
        "published": "published",
    }
    columns |= {"tflop_teacher": "TFLOP, teacher", "tflop_student": "student", "tflop_ratio": "ratio"}
    columns |= {"mib_teacher": "MiB, teacher", "mib_student": "student", "memory_ratio": "ratio", "note": ""}
    of_fits = {
        "network": "of",
        "part": "part",
        "mode": "what",
        "px_teacher": "teacher up to px",
        "px_student": "student",
    }
    of_fits |= {"seconds_teacher": "time, teacher", "seconds_student": "time, student"}
    of_fits |= {"tflop_teacher": "FLOPs, teacher", "tflop_student": "FLOPs, student"}
    return [
        markdown_table(shown, columns),
        f"Exponent of image tokens, fitted over {smallest} px and more (FLOPs over all sizes asked for):",
        markdown_table(fits, of_fits),
    ]


def main(argv: list[str] | None = None, config: dict[str, dict[str, Any]] | None = None) -> None:
    """`config` changes the sizes of networks, by name (for a test)."""
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=tuple(TEACHERS), default=list(TEACHERS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=list(MODES))
    parser.add_argument("--resolutions", type=int, nargs="+", default=list(RESOLUTIONS), metavar="PX")
    parser.add_argument("--fit-from", type=int, default=1024, metavar="PX", help="smallest picture in the exponents")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--threads", type=int, help="of the CPU; --quick: 1")
    parser.add_argument("--rounds", type=int, help="turns of each call; default 10, --quick 2")
    parser.add_argument("--limit", type=float, help="longest call, in seconds; default 60, --quick 6")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    args.rounds, args.min_seconds = args.rounds or (2 if args.quick else 10), 0.0 if args.quick else 0.2
    limit = args.limit or (6.0 if args.quick else 60.0)
    if threads := args.threads or (1 if args.quick else None):
        torch.set_num_threads(threads)

    torch.manual_seed(0)
    teachers = {name: TEACHERS[name].changed((config or {}).get(name, {})) for name in args.networks}
    found, guard = machine(device), Guard(device, limit)
    timed = "seconds in which the thread ran" if clock_of(device) is not seconds_of else "wall clock"
    settings = {"dtype": args.dtype, "batch": args.batch, "rounds": args.rounds, "limit_s": limit, "time": timed}
    content = {"benchmark": "attention_scaling", "machine": found, "settings": settings}
    rows: list[dict[str, Any]] = []
    for name, teacher in teachers.items():
        rows += benchmark(name, teacher, args, guard)
        content |= {"rows": rows, "exponents": exponents(rows, args.fit_from)}
        if args.json is not None:  # after each network, as a whole run may take long
            write_json(args.json, content)
    line = (
        f"{args.dtype}, batch {args.batch}; median of {args.rounds} rounds in turns, {timed}; published: papers.md A8d."
    )
    shown = [line, *tables(rows, content["exponents"], args.fit_from)]
    show("Attention against the size of the picture", found, shown)


if __name__ == "__main__":
    main()
