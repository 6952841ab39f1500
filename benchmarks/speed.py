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
the wall clock. A call predicted to exceed `--limit` (or weights that exceed a CPU's memory) is left out, with a note.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import linear_regression
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks.common import clock_of, markdown_table, progress, whole
from benchmarks.networks import NETWORKS, Network, counts
from emmdit.networks.edit.attention import LinearAttention
from emmdit.provenance import machine
from emmdit.timing import Run, peak_memory, seconds_of

WHO = ("original", "student")
PARTS = ("image", "joint", "block", "network")
MODES = {"forward": 1, "backward": 3, "train": 3}  # and its FLOPs: a backward pass computes twice as much
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}
VARIANTS = ("eager", "compiled", "fused")
KIND = ("network", "who", "part", "mode", "batch", "dtype", "variant")
RESOLUTIONS = (512, 1024, 2048, 4096, 8192)
# Time of the original over the student's as third-party notes report it, of a whole forward pass (docs/papers.md, A8d).
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

    @property
    def kind(self) -> tuple:
        """What a prediction may be based on: the same call at another size."""
        return tuple(getattr(self, key) for key in KIND if key != "batch")

    def work(self, flops: int) -> int:
        """FLOPs of a call, from those of a forward pass at batch 1."""
        return flops * MODES[self.mode] * self.batch


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
    first = f"{spec.blocks}.0"
    joint, image = f"{first}.{spec.attention}", spec.image_attention and f"{first}.{spec.image_attention}"
    with torch.device("meta"):
        found = {"network": Part("", (), spec.inputs(network, px))}

    def keep(part: str, path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        found[part] = Part(path, args, kwargs)

    paths = {"image": image, "joint": None if joint == image else joint, "block": first}
    hooks = [
        network.get_submodule(path).register_forward_pre_hook(functools.partial(keep, part, path), with_kwargs=True)
        for part, path in paths.items()
        if path
    ]
    found["network"].flops(network)
    for hook in hooks:
        hook.remove()
    if image is None:
        (x, prompt, *_), kwargs = found["joint"].args, found["joint"].kwargs
        linear = isinstance(network.get_submodule(joint), LinearAttention)
        found["image"] = Part(joint, (x,) if linear else (x, prompt[:, :0]), kwargs, alone=True)
    return found


class Built:
    """Networks on the device at one size, made when they are asked for; variants share the weights of their type."""

    def __init__(self, spec: Network, px: int, device: torch.device, **config: Any) -> None:
        self.spec, self.px, self.device, self.config = spec, px, device, config
        self.made: dict[tuple, Any] = {}

    def get(self, case: Case) -> tuple[nn.Module, torch.optim.Optimizer | None]:
        """The network, and the optimizer of a training step."""
        shared = (case.who, DTYPES[case.dtype])
        if shared not in self.made:
            with self.device:
                network = self.spec.build(case.who, self.px, **self.config)
            self.made[shared] = network if shared[1] == torch.float32 else network.to(shared[1])
        base, key = self.made[shared], (*shared, case.variant)
        if key not in self.made:
            network = self.made[key] = copy.deepcopy(base, {id(t): t for t in (*base.parameters(), *base.buffers())})
            if case.variant == "fused":
                network.fuse_qkv_projections()
            elif case.variant == "compiled" and case.part == "network":
                network.compile_repeated_blocks(dynamic=False)
        if case.mode != "train":
            return self.made[key], None
        return self.made[key], self.made.setdefault((*shared, "AdamW"), torch.optim.AdamW(base.parameters(), lr=1e-6))


# -- measuring ---------------------------------------------------------------------------------------


class Guard:
    """Predicts the cost of a call from earlier ones, of its kind if there was one, to leave out what takes too much."""

    def __init__(self, device: torch.device, limit: float) -> None:
        self.device, self.limit = device, limit
        self.pace: dict[tuple, float] = {}  # kind -> seconds for a FLOP

    def refuses(self, kind: tuple, work: int, weights: int = 0) -> str | None:
        """The reason not to try a call of `work` FLOPs for which `weights` bytes are allocated."""
        seconds = work * self.pace.get(kind, max(self.pace.values(), default=0.0))
        if seconds > self.limit:
            return f"{seconds:.0f} s a call"
        if self.device.type == "cpu" and weights > 0.7 * psutil.virtual_memory().available:
            return f"{weights / 2**30:.0f} GiB"
        return None


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
    fitting = {case: runs[case] for case, result in results.items() if "note" not in result}
    for case, timing in common.interleaved(fitting, device, rounds, min_seconds, clock_of(device)).items():
        results[case] |= {"seconds": timing.median, "seconds_low": timing.low, "seconds_high": timing.high}
    return results


def benchmark(name: str, spec: Network, args: argparse.Namespace, guard: Guard) -> Iterator[dict[str, Any]]:
    """Rows of one network, the smallest images first."""
    blocks = Built(spec, 512, guard.device, **spec.one_block)
    for px in sorted(args.resolutions):
        parts: dict[tuple[str, str], Part] = {}
        flops: dict[tuple[str, str], int] = {}
        weights, networks = 0, Built(spec, px, guard.device)
        for who in args.who:
            with torch.device("meta"):
                small, large = spec.build(who, px, **spec.one_block), spec.build(who, px)
            for part, called in parts_of(spec, small, px).items():
                parts[who, part] = called
                flops[who, part] = called.flops(large if part == "network" else small)
            weights += 4 * sum(p.numel() for p in large.parameters())
        tokens = spec.tokens(small, px)
        for part, mode, batch in itertools.product(args.parts, args.modes, args.batch_sizes):
            if (mode == "train" and part != "network") or (args.who[0], part) not in parts:
                continue
            rows, runs, built = {}, {}, networks if part == "network" else blocks
            for who, dtype, variant in itertools.product(args.who, args.dtypes, args.variants):
                if variant == "fused" and (name, who, mode) != ("E-MMDiT", "original", "forward"):
                    continue
                case = Case(name, who, part, mode, px, batch, dtype, variant)
                rows[case] = {"tokens": tokens, "tflop": flops[who, part] / 1e12}
                needed = weights * (1 if mode == "forward" else 2) if part == "network" else 0
                if why := guard.refuses(case.kind, case.work(flops[who, part]), needed):
                    rows[case]["note"] = f"not run: {why}"
                else:
                    runs[case] = parts[who, part].runner(*built.get(case), case)
            progress(f"{name}, {part}, {mode}, {px} px, batch {batch}: {len(runs)} of {len(rows)} cases")
            for case, result in measure(runs, guard.device, args.rounds, args.min_seconds).items():
                rows[case] |= result
                if "seconds" in result:
                    guard.pace[case.kind] = result["seconds"] / case.work(flops[case.who, part])
            yield from finished(rows)
            torch._dynamo.reset()  # graphs of other sizes count towards the limit on graphs


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
    return linear_regression(*([math.log(value) for value in values] for values in zip(*points, strict=True))).slope


def exponents(rows: list[dict[str, Any]], smallest: int) -> list[dict[str, Any]]:
    """Fits over images of `smallest` pixels a side and more, for whatever was run or counted at several sizes."""
    fits = []
    for kind in dict.fromkeys(tuple(row[key] for key in KIND) for row in rows):
        chosen = [row for row in rows if tuple(row[key] for key in KIND) == kind and row["px"] >= smallest]
        timed = [row for row in chosen if row["seconds"]]
        fit: dict[str, Any] = dict(zip(KIND, kind, strict=True))
        fit["px"] = max((row["px"] for row in timed), default=None)
        fit["time"] = exponent([(row["tokens"], row["seconds"]) for row in timed])
        fit["flops"] = exponent([(row["tokens"], row["tflop"]) for row in chosen])
        fits += [fit] if fit["flops"] is not None else []
    return fits


def tables(rows: list[dict[str, Any]], fits: list[dict[str, Any]], smallest: int) -> list[str]:
    of = {"network": "of", "who": "", "part": "part", "mode": "mode"}
    settings = {"batch": "batch", "dtype": "type", "variant": "variant"}
    columns = of | {"px": "px", "tokens": "tokens"} | settings | {"ms": "ms", "images_per_second": "images/s"}
    columns |= {"ratio_to_original": "x original", "reported_ratio": "reported", "tflop": "TFLOP", "mib": "MiB"}
    units = {"ms": ("seconds", 1e3), "mib": ("memory", 2**-20)}
    shown = [row | {unit: row[key] and row[key] * scale for unit, (key, scale) in units.items()} for row in rows]
    found = [markdown_table(shown, columns | {"note": ""})]
    if fits:
        found.append(f"Exponent of image tokens, fitted over {smallest} px and more (FLOPs over all sizes asked for):")
        found.append(markdown_table(fits, of | settings | {"px": "timed up to px", "time": "time", "flops": "FLOPs"}))
    return found


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.argument_parser(__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"cuda or cpu; here by default {default}")
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
    parser.add_argument("--rounds", type=whole(1), help="turns of each case; default 10, --quick 2")
    parser.add_argument("--limit", type=float, help="longest call in seconds; default 60, --quick 6")
    args = parser.parse_args(argv)
    args.dtypes = args.dtypes or ["bfloat16" if torch.device(args.device).type == "cuda" else "float32"]
    args.rounds, args.min_seconds = args.rounds or (2 if args.quick else 10), 0.0 if args.quick else 0.2
    args.limit = args.limit or (6.0 if args.quick else 60.0)
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if args.quick:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(args.device)
    found, guard = machine(device), Guard(device, args.limit)
    timed = "wall clock" if clock_of(device) is seconds_of else "seconds in which the thread ran"
    settings = {"rounds": args.rounds, "limit_s": args.limit, "time": timed}
    content = {"benchmark": "speed", "machine": found, "settings": settings}
    content["counts"] = counts() if "E-MMDiT" in args.networks else []
    rows: list[dict[str, Any]] = []
    for name in args.networks:
        rows += benchmark(name, NETWORKS[name], args, guard)
        content |= {"rows": rows, "exponents": exponents(rows, args.fit_from)}
        common.write_json(args.json, content)  # after each network, as a whole run may take long
    shown = [f"Median of {args.rounds} rounds in turns, {timed}; x original and reported: docs/papers.md, A8d."]
    shown += tables(rows, content["exponents"], args.fit_from)
    if content["counts"]:
        columns = {"network": "E-MMDiT", "parameters": "parameters", "tflop": "TFLOP, forward, batch 1"}
        shown.append(markdown_table(content["counts"], columns | {"tflop_original_code": "original code"}))
    common.show("Speed of networks", found, *shown)


if __name__ == "__main__":
    main()
