"""Speed benchmark: time, peak memory and FLOPs of networks and their linear attention students, by image size.

    python -m benchmarks.speed --json benchmarks/results/speed_h200.json
    python -m benchmarks.speed --quick --device cpu                      # one thread, about 10 minutes of it
    python -m benchmarks.speed --networks E-MMDiT --who original --parts network --modes forward train \\
        --resolutions 512 1024 --batch-sizes 1 8 32 128 --dtypes float32 autocast --variants eager compiled fused

Networks have their released sizes (docs/papers.md, A4, A5, B1, B2) and random weights. A part is "image" (attention of
image tokens among themselves, with its projections), "joint" (attention with the prompt), "block" (a whole one; of
SD3.5-Medium one with two attentions) or "network" (a call of the denoiser). "backward" is forward and backward pass,
"train" also AdamW's step. "autocast" is bfloat16 compute over float32 weights; "compiled" is per block.

The cases of one network, part, mode, size and batch take turns: read `ratio_to_original`, their images per second over
those of the original network in the first type, eager. FLOPs are of a forward pass: 2 x multiply-add of matrix
products, convolutions and attention, counted on the meta device. Memory is the peak above what the process held before
the call. One CPU thread is timed by the seconds in which it ran, so that other processes do not count; anything else by
the wall clock. A call predicted to exceed `--limit` (or, on a CPU, the memory) is left out, with a note.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import argument_parser, interleaved, markdown_table, progress, show, whole, write_json
from benchmarks.networks import NETWORKS, Network, counts
from emmdit.networks.edit.attention import LinearAttention
from emmdit.provenance import machine
from emmdit.timing import Run, peak_memory, seconds_of

WHO = ("original", "student")
PARTS = ("image", "joint", "block", "network")
MODES = {"forward": 1, "backward": 3, "train": 3}  # and its FLOPs: a backward pass computes twice as much
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}
VARIANTS = ("eager", "compiled", "fused")
RESOLUTIONS = (512, 1024, 2048, 4096, 8192)
# Time of the original / the student's as third parties report it (docs/papers.md, A8d): whole forward passes, RTX 3090.
REPORTED = {
    ("PixArt-Sigma", 1024): 1.4,
    ("PixArt-Sigma", 2048): 3.2,
    ("PixArt-Sigma", 4096): 10.3,
    ("PixArt-Sigma", 8192): 43.0,
    ("SD3.5-Medium", 1024): 2.2,
}


# -- what is called ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One row."""

    network: str
    who: str
    part: str
    mode: str
    px: int
    batch: int = 1
    dtype: str = "float32"
    variant: str = "eager"

    def __str__(self) -> str:
        words = (self.network, self.who, self.part, self.mode, f"{self.px} px", f"batch {self.batch}")
        return ", ".join((*words, self.dtype, self.variant))


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

    def runner(self, network: nn.Module, optimizer: torch.optim.Optimizer | None, case: Case) -> Run:
        """A call with random tensors of those shapes."""
        backward, own = case.mode != "forward", list(network.get_submodule(self.path).parameters())
        device, dtype = own[0].device, own[0].dtype

        def real(x: Tensor) -> Tensor:
            return torch.randn(case.batch, *x.shape[1:], device=device, dtype=dtype).requires_grad_(backward)

        function = self.function(network)
        if case.variant == "compiled" and case.part != "network":
            function = torch.compile(function, dynamic=False)
        args, kwargs = tree_map_only(Tensor, real, (self.args, self.kwargs))
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)] + own
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == "autocast")

        def run() -> None:
            try:
                with torch.set_grad_enabled(backward):
                    with autocast:
                        outputs = [y for y in tree_leaves(function(*args, **kwargs)) if isinstance(y, Tensor)]
                    if backward:
                        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
                    if optimizer is not None:
                        optimizer.step()
            finally:  # also when out of memory
                for x in leaves:
                    x.grad = None

        return run


def parts_of(spec: Network, network: nn.Module, px: int) -> dict[str, Part]:
    """The parts of a network on the meta device, in its first block, at batch 1."""
    with torch.device("meta"):
        given = spec.inputs(network, px)
    first = f"{spec.blocks}.0"
    paths = {"joint": spec.attention, "image": spec.image_attention}
    paths = {part: f"{first}.{name}" for part, name in paths.items() if name} | {"block": first}
    if spec.attention == spec.image_attention:
        del paths["joint"]
    found, handles = {"network": Part("", (), given)}, []
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


class Built:
    """Networks on the device at one size, made when they are asked for; variants share the weights of their type."""

    def __init__(self, spec: Network, px: int, device: torch.device, **config: Any) -> None:
        self.spec, self.px, self.device, self.config = spec, px, device, config
        self.made: dict[tuple, Any] = {}

    def get(self, case: Case) -> tuple[nn.Module, torch.optim.Optimizer | None]:
        """The network, and the optimizer of a training step."""
        dtype = DTYPES[case.dtype]
        base_key, key = (case.who, dtype), (case.who, dtype, case.variant)
        if base_key not in self.made:
            with self.device:
                network = self.spec.build(case.who, self.px, **self.config)
                self.made[base_key] = network if dtype == torch.float32 else network.to(dtype)
        base = self.made[base_key]
        if key not in self.made:
            network = copy.deepcopy(base, {id(t): t for t in (*base.parameters(), *base.buffers())})
            if case.variant == "fused":
                network.fuse_qkv_projections()
            elif case.variant == "compiled" and case.part == "network":
                network.compile_repeated_blocks(dynamic=False)
            self.made[key] = network
        if case.mode != "train":
            return self.made[key], None
        optimizer = self.made.setdefault((*base_key, "AdamW"), torch.optim.AdamW(base.parameters(), lr=1e-6))
        return self.made[key], optimizer


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
    """Predicts the cost of a call from the last smaller one of its kind, to skip what would take too much."""

    def __init__(self, device: torch.device, limit: float) -> None:
        self.device, self.limit = device, limit
        self.last: dict[tuple, tuple[float, float, int, int]] = {}  # kind -> seconds, work, bytes, tokens
        self.speed = math.inf  # the slowest so far, of all kinds, in FLOP/s

    def refuses(self, kind: tuple, work: float, tokens: int, weights: int = 0) -> str | None:
        """The reason not to try it. `weights`: bytes that are allocated for it."""
        seconds, needed = work / self.speed, float(weights)
        if kind in self.last:
            seconds, before, memory, fewer = self.last[kind]
            seconds, needed = seconds * work / before, weights + memory * tokens / fewer
        if seconds > self.limit:
            return f"{seconds:.0f} s a call"
        if self.device.type == "cpu" and needed > 0.7 * psutil.virtual_memory().available:
            return f"{needed / 2**30:.0f} GiB"
        return None

    def record(self, kind: tuple, work: float, tokens: int, seconds: float, memory: int | None) -> None:
        self.last[kind] = (seconds, work, memory or 0, tokens)
        self.speed = min(work / seconds, self.speed)


def measure(runs: dict[Case, Run], device: torch.device, rounds: int, min_seconds: float) -> dict[Case, dict[str, Any]]:
    """For each: `memory` and `seconds` of a call, or the `note` that it did not fit."""
    results: dict[Case, dict[str, Any]] = {}
    for case, run in runs.items():
        try:
            if case.variant == "compiled" or case.mode == "train":
                run()  # compiles, makes the optimizer's state
            before, peak = peak_memory(lambda: None, device), peak_memory(run, device)
            results[case] = {"memory": None if peak is None or before is None else peak - before}
        except torch.OutOfMemoryError:
            results[case] = {"note": "out of memory"}
            torch.cuda.empty_cache()
    fitting = {str(case): runs[case] for case, result in results.items() if "note" not in result}
    timings = interleaved(fitting, device, rounds, min_seconds, clock_of(device))
    for case, result in results.items():
        if timing := timings.get(str(case)):
            result |= {"seconds": timing.median, "seconds_low": timing.low, "seconds_high": timing.high}
    return results


def benchmark(name: str, spec: Network, args: argparse.Namespace, guard: Guard) -> Iterator[dict[str, Any]]:
    """Rows of one network, the smallest images first."""
    blocks = Built(spec, 512, guard.device, **spec.one_block)
    for px in sorted(args.resolutions):
        parts: dict[str, dict[str, Part]] = {}
        flops: dict[str, dict[str, int]] = {}
        weights = 0
        for who in args.who:
            with torch.device("meta"):
                small, large = spec.build(who, px, **spec.one_block), spec.build(who, px)
                parts[who] = parts_of(spec, small, px)
                flops[who] = {key: part.flops(small) for key, part in parts[who].items() if key != "network"}
                flops[who]["network"] = parts[who]["network"].flops(large)
            weights += 4 * sum(p.numel() for p in large.parameters())
        tokens, networks = spec.tokens(small, px), Built(spec, px, guard.device)
        groups = itertools.product((p for p in args.parts if p in flops[args.who[0]]), args.modes, args.batch_sizes)
        for part, mode, batch in groups:
            if mode == "train" and part != "network":
                continue
            built, rows, runs = networks if part == "network" else blocks, {}, {}
            for who, dtype, variant in itertools.product(args.who, args.dtypes, args.variants):
                case = Case(name, who, part, mode, px, batch, dtype, variant)
                if variant == "fused" and (mode != "forward" or who != "original" or name != "E-MMDiT"):
                    continue
                rows[case] = {"tokens": tokens, "tflop": flops[who][part] / 1e12}
                extra = weights * (2 if mode != "forward" else 1) if part == "network" else 0
                why = guard.refuses(kind(case), flops[who][part] * MODES[mode] * batch, tokens * batch, extra)
                if why:
                    rows[case]["note"] = f"not run: {why}"
                else:
                    runs[case] = parts[who][part].runner(*built.get(case), case)
            progress(f"{name}, {part}, {mode}, {px} px, batch {batch}: {len(runs)} of {len(rows)} cases")
            for case, result in measure(runs, guard.device, args.rounds, args.min_seconds).items():
                rows[case] |= result
                if "seconds" in result:
                    work = flops[case.who][part] * MODES[mode] * batch
                    guard.record(kind(case), work, tokens * batch, result["seconds"], result["memory"])
            yield from finished(rows)
            torch._dynamo.reset()  # graphs of other sizes count towards the limit on graphs


def kind(case: Case) -> tuple:
    """What a prediction may be based on: the same call at another size."""
    return tuple(value for key, value in asdict(case).items() if key not in ("px", "batch"))


def finished(rows: dict[Case, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of one group as they are written, beside the original's in the first type, eager."""
    first = next(iter(rows))
    baseline = rows[first].get("seconds") if (first.who, first.variant) == ("original", "eager") else None
    for case, row in rows.items():
        seconds = row.get("seconds")
        whole_pass = case.who == "student" and case.part == "network" and case.mode == "forward"
        yield {
            "case": str(case),
            **asdict(case),
            "images_per_second": case.batch / seconds if seconds else None,
            "ratio_to_original": baseline / seconds if baseline and seconds else None,
            "reported_ratio": REPORTED.get((case.network, case.px)) if whole_pass else None,
            **dict.fromkeys(("seconds", "seconds_low", "seconds_high", "memory", "note")),
            **row,
        }


# -- tables ------------------------------------------------------------------------------------------


def exponent(points: list[tuple[int, float]]) -> float | None:
    """Slope of log value over log tokens by least squares; None for fewer than two sizes."""
    if len({tokens for tokens, _ in points}) < 2:
        return None
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in zip(*points, strict=True))
    x = x - x.mean()
    return ((x * y).sum() / x.square().sum()).item()


def exponents(rows: list[dict[str, Any]], smallest: int) -> list[dict[str, Any]]:
    """Fits over images of `smallest` pixels a side and more, for whatever was run or counted at several sizes."""
    keys = ("network", "who", "part", "mode", "batch", "dtype", "variant")
    fits = []
    for which in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        chosen = [row for row in rows if tuple(row[key] for key in keys) == which and row["px"] >= smallest]
        timed = [row for row in chosen if row["seconds"]]
        fit: dict[str, Any] = dict(zip(keys, which, strict=True)) | {
            "px": max((row["px"] for row in timed), default=None)
        }
        fit["time"] = exponent([(row["tokens"], row["seconds"]) for row in timed])
        fit["flops"] = exponent([(row["tokens"], row["tflop"]) for row in chosen])
        fits += [fit] if fit["flops"] is not None else []
    return fits


def tables(rows: list[dict[str, Any]], fits: list[dict[str, Any]], smallest: int) -> list[str]:
    shown = [
        row | {"ms": row["seconds"] and 1e3 * row["seconds"], "mib": row["memory"] and row["memory"] / 2**20}
        for row in rows
    ]
    of = {"network": "of", "who": "", "part": "part", "mode": "mode"}
    settings = {"batch": "batch", "dtype": "type", "variant": "variant"}
    columns = of | {"px": "px", "tokens": "tokens"} | settings | {"ms": "ms", "images_per_second": "images/s"}
    columns |= {"ratio_to_original": "x original", "reported_ratio": "reported", "tflop": "TFLOP", "mib": "MiB"}
    parts = [markdown_table(shown, columns | {"note": ""})]
    if fits:
        parts.append(f"Exponent of image tokens, fitted over {smallest} px and more (FLOPs over all sizes asked for):")
        parts.append(markdown_table(fits, of | settings | {"px": "timed up to px", "time": "time", "flops": "FLOPs"}))
    return parts


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__.splitlines()[0])
    for option, choices, default in (
        ("networks", NETWORKS, NETWORKS),
        ("who", WHO, WHO),
        ("parts", PARTS, PARTS),
        ("modes", MODES, ("forward", "backward")),
        ("dtypes", DTYPES, None),
        ("variants", VARIANTS, ("eager",)),
    ):
        words = "bfloat16 on a GPU, else float32" if default is None else " ".join(default)
        options = {"nargs": "+", "choices": tuple(choices), "default": default and list(default)}
        parser.add_argument(f"--{option}", help=f"default: {words}", **options)
    parser.add_argument("--resolutions", type=whole(1), nargs="+", default=list(RESOLUTIONS), help="side in pixels")
    parser.add_argument("--fit-from", type=whole(1), default=1024, help="smallest side in the exponents, in pixels")
    parser.add_argument("--batch-sizes", type=whole(1), nargs="+", default=[1], help="images in a call; default 1")
    parser.add_argument("--threads", type=whole(1), help="CPU threads; --quick: 1")
    parser.add_argument("--rounds", type=whole(1), help="turns of each case; default 10, --quick 2")
    parser.add_argument("--limit", type=float, help="longest call in seconds; default 60, --quick 6")
    args = parser.parse_args(argv)
    args.dtypes = args.dtypes or ["bfloat16" if torch.device(args.device).type == "cuda" else "float32"]
    args.rounds, args.min_seconds = args.rounds or (2 if args.quick else 10), 0.0 if args.quick else 0.2
    args.limit = args.limit or (6.0 if args.quick else 60.0)
    args.threads = args.threads or (1 if args.quick else None)
    return args


def main(argv: list[str] | None = None, config: dict[str, dict[str, Any]] | None = None) -> None:
    """`config` changes the sizes of networks, by name (for a test)."""
    args = arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    found, guard = machine(device), Guard(device, args.limit)
    timed = "seconds in which the thread ran" if clock_of(device) is not seconds_of else "wall clock"
    settings = {"rounds": args.rounds, "limit_s": args.limit, "time": timed}
    content = {"benchmark": "speed", "machine": found, "settings": settings}
    content["counts"] = counts() if "E-MMDiT" in args.networks else []
    rows: list[dict[str, Any]] = []
    for name in args.networks:
        rows += benchmark(name, NETWORKS[name].changed((config or {}).get(name, {})), args, guard)
        content |= {"rows": rows, "exponents": exponents(rows, args.fit_from)}
        if args.json is not None:  # after each network, as a whole run may take long
            write_json(args.json, content)
    shown = [f"Median of {args.rounds} rounds in turns, {timed}; x original and reported: docs/papers.md, A8d."]
    shown += tables(rows, content["exponents"], args.fit_from)
    if content["counts"]:
        columns = {"network": "E-MMDiT", "parameters": "parameters", "tflop": "TFLOP, forward, batch 1"}
        shown.append(markdown_table(content["counts"], columns | {"tflop_original": "of the original code"}))
    show("Speed of networks", found, shown)


if __name__ == "__main__":
    main()
