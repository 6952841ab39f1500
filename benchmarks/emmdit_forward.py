"""E-MMDiT's speed and memory: forward passes and training steps at 512 and 1024 px, by batch size and type.

    python benchmarks/emmdit_forward.py --json benchmarks/results/emmdit_forward_h200.json
    python benchmarks/emmdit_forward.py --quick --device cpu     # about 4 minutes on two cores

The network has its released size (302M parameters), random weights and 128 text tokens. A forward pass is
one call of the denoiser without gradients; a training step is the forward and backward pass of the flow loss
and AdamW's update. "bf16" is autocast over float32 weights. Compiled is per block, as in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.common import (
    Run,
    argument_parser,
    interleaved,
    markdown_table,
    peak_memory,
    progress,
    show,
    tensor_bytes,
    write_json,
)
from emmdit.networks import EMMDiTTransformer2DModel
from emmdit.networks.flops import forward_flops
from emmdit.provenance import machine

TEXT_TOKENS = 128
CONFIGS: dict[int, dict[str, Any]] = {
    512: {},
    1024: {"sample_size": 32, "subregion_pattern": ["full"]},
}
# Name, configuration, and the forward TFLOP at batch 1 that the paper or its code give (papers.md B13).
COUNTS = [
    ("512 px, released", {}, 0.080),
    ("512 px, no subregions", {"subregion_pattern": ["full"]}, 0.083),
    ("512 px, no compression", {"compression_ratios": []}, 0.114),
    ("512 px, neither", {"compression_ratios": [], "subregion_pattern": ["full"]}, 0.119),
    ("1024 px, released", CONFIGS[1024], 0.246),
    ("1024 px, no compression", {**CONFIGS[1024], "compression_ratios": []}, 0.423),
]
DTYPES = ("fp32", "bf16")
VARIANTS = ("eager", "compiled", "fused")


@dataclass(frozen=True)
class Case:
    """One row. `mode`: forward or train; `variant`: eager, compiled, fused (QKV in one, no training)."""

    resolution: int
    mode: str
    batch: int
    dtype: str = "fp32"
    variant: str = "eager"

    def __str__(self) -> str:
        return f"{self.resolution} px {self.mode} batch {self.batch} {self.dtype} {self.variant}"


# Enough to see every ratio once. Compiling alone takes one to two minutes of two cores.
QUICK = [
    Case(512, "forward", 1),
    Case(512, "forward", 1, variant="fused"),
    Case(512, "forward", 1, variant="compiled"),
    Case(512, "forward", 1, dtype="bf16"),
    Case(512, "forward", 2),
    Case(1024, "forward", 1),
    Case(512, "train", 1),
    Case(512, "train", 1, dtype="bf16"),
]


# -- counts ------------------------------------------------------------------------------------------


def count(config: dict[str, Any]) -> tuple[int, int]:
    """(parameters, forward FLOPs at batch 1) of a configuration, on the meta device: nothing is computed."""
    with torch.device("meta"):
        network = EMMDiTTransformer2DModel(**config)
        given = inputs(network, 1)
    condition = {"encoder_hidden_states": given["encoder_hidden_states"]}
    flops = forward_flops(lambda: network, given["hidden_states"].shape, condition)
    return sum(p.numel() for p in network.parameters()), flops


def inputs(network: EMMDiTTransformer2DModel, batch: int, device: torch.device | str | None = None) -> dict[str, Any]:
    config = network.config
    side = config.sample_size
    return dict(
        hidden_states=torch.randn(batch, config.in_channels, side, side, device=device),
        timestep=torch.full((batch,), 500.0, device=device),
        encoder_hidden_states=torch.randn(batch, TEXT_TOKENS, config.caption_channels, device=device),
    )


def counts_table() -> list[dict[str, Any]]:
    rows = []
    for name, config, published in COUNTS:
        parameters, flops = count(config)
        rows.append({"network": name, "parameters": parameters, "tflop": flops / 1e12, "tflop_published": published})
    return rows


# -- runs --------------------------------------------------------------------------------------------


class Networks:
    """One set of weights behind all networks: configurations and variants differ in code only.

    `config` changes the sizes of all of them (for a test).
    """

    def __init__(self, device: torch.device, config: dict[str, Any] | None = None) -> None:
        self.device, self.config = device, config or {}
        self.networks: dict[tuple[int, str], EMMDiTTransformer2DModel] = {}
        with device:
            self.base = self._new(512)
        self.weights = dict(self.base.state_dict(keep_vars=True))
        self.networks[512, "eager"] = self.base
        self._optimizer: torch.optim.AdamW | None = None

    def _new(self, resolution: int) -> EMMDiTTransformer2DModel:
        return EMMDiTTransformer2DModel(**{**CONFIGS[resolution], **self.config})

    def get(self, resolution: int, variant: str) -> EMMDiTTransformer2DModel:
        key = (resolution, variant)
        if key not in self.networks:
            with torch.device("meta"):
                network = self._new(resolution)
            network.load_state_dict(self.weights, assign=True)
            network.pos_table = self.base.pos_table
            if variant == "fused":
                network.fuse_qkv_projections()
            elif variant == "compiled":
                network.compile_repeated_blocks(dynamic=False)  # sizes are fixed in each row
            self.networks[key] = network
        return self.networks[key]

    def optimizer(self) -> torch.optim.AdamW:
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(self.base.parameters(), lr=1e-6)
        return self._optimizer

    def forget(self, variant: str) -> None:
        for key in [key for key in self.networks if key[1] == variant]:
            del self.networks[key]

    def bytes_beside(self, network: nn.Module) -> int:
        """What other networks hold in memory that this one does not use (fused projections are copies)."""
        return tensor_bytes(*self.networks.values()) - tensor_bytes(network)


def runner(case: Case, networks: Networks) -> Run:
    """What is timed."""
    network = networks.get(case.resolution, case.variant)
    given = inputs(network, case.batch, networks.device)
    autocast = torch.autocast(networks.device.type, torch.bfloat16, enabled=case.dtype == "bf16")

    def forward() -> None:
        with torch.no_grad(), autocast:
            network(**given)

    target = torch.randn_like(given["hidden_states"])

    def train() -> None:
        with autocast:
            prediction = network(**given).sample
        (prediction.float() - target).square().mean().backward()
        optimizer = networks.optimizer()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return forward if case.mode == "forward" else train


def benchmark(cases: list[Case], networks: Networks, rounds: int, min_seconds: float = 0.1) -> Iterator[dict[str, Any]]:
    """Rows of `cases`: warm-up and peak memory one by one, then time in turn; cases out of memory say so."""
    device = networks.device
    runs, memory, failed = {}, {}, {}
    for case in cases:
        progress(f"warm-up: {case}")
        try:
            run = runner(case, networks)
            run()
            beside = networks.bytes_beside(networks.get(case.resolution, case.variant))
            peak = peak_memory(run, device)
            memory[case] = None if peak is None else peak - beside
            runs[case] = run
        except torch.OutOfMemoryError:
            failed[case] = "out of memory"
            if device.type == "cuda":
                torch.cuda.empty_cache()
    timings = interleaved({str(case): run for case, run in runs.items()}, device, rounds, min_seconds)
    for case in cases:
        row: dict[str, Any] = {**asdict(case), "images_per_s": None, "note": failed.get(case)}
        if case in runs:
            timing = timings[str(case)]
            _, flops = count({**CONFIGS[case.resolution], **networks.config})
            flops *= 3 if case.mode == "train" else 1  # the backward pass computes twice as much
            row |= {
                "images_per_s": case.batch / timing.median,
                "ms": 1e3 * timing.median,
                "ms_low": 1e3 * timing.low,
                "ms_high": 1e3 * timing.high,
                "rounds": timing.rounds,
                "peak_memory_gib": None if memory[case] is None else memory[case] / 2**30,
                "tflop_per_image": flops / 1e12,
                "tflop_per_s": flops * case.batch / timing.median / 1e12,
            }
        yield row


def with_speedup(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row beside float32, eager, of its own resolution, mode and batch (timed in the same rounds)."""
    base = {
        (row["resolution"], row["mode"], row["batch"]): row["images_per_s"]
        for row in rows
        if row["dtype"] == "fp32" and row["variant"] == "eager"
    }
    for row in rows:
        reference = base.get((row["resolution"], row["mode"], row["batch"]))
        known = reference is not None and row["images_per_s"] is not None
        row["speedup"] = row["images_per_s"] / reference if known else None
    return rows


def full_table(args) -> list[Case]:
    return [
        Case(resolution, mode, batch, dtype, variant)
        for mode in args.modes
        for resolution in args.resolutions
        for batch in args.batch_sizes
        for dtype in args.dtypes
        for variant in args.variants
        if not (mode == "train" and variant == "fused")
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--resolutions", type=int, nargs="+", choices=tuple(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--modes", nargs="+", choices=("forward", "train"), default=["forward", "train"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, help="timed calls of each case; default 10, with --quick 3")
    args = parser.parse_args(argv)
    rounds = args.rounds or (3 if args.quick else 10)
    if rounds < 1:
        parser.error("--rounds must be at least 1")

    device = torch.device(args.device)
    found = machine(device)
    progress("counting parameters and FLOPs")
    counts = counts_table()
    cases = QUICK if args.quick else full_table(args)
    torch.manual_seed(0)
    networks = Networks(device)
    rows: list[dict[str, Any]] = []
    for mode in ("forward", "train"):  # apart: a training step leaves an optimizer's state in memory
        chosen = [case for case in cases if case.mode == mode]
        if mode == "train":
            networks.forget("fused")
        for resolution in CONFIGS:
            torch._dynamo.reset()  # graphs of other rows count towards the limit on graphs
            if group := [case for case in chosen if case.resolution == resolution]:
                rows += benchmark(group, networks, rounds)
    rows = with_speedup(rows)

    memory_is = "allocator's peak" if device.type == "cuda" else "process' resident set at its peak"
    columns = {"resolution": "px", "mode": "what", "batch": "batch", "dtype": "type", "variant": "variant"}
    columns |= {"images_per_s": "images/s", "speedup": "x fp32 eager", "ms": "ms", "peak_memory_gib": "GiB"}
    columns |= {"tflop_per_s": "TFLOP/s", "note": ""}
    tables = [
        markdown_table(
            counts,
            {
                "network": "network",
                "parameters": "parameters",
                "tflop": "TFLOP, forward, batch 1",
                "tflop_published": "published",
            },
        ),
        markdown_table(rows, columns),
        f"Median of {rounds} rounds in which the rows of one size take turns; GiB: the {memory_is}.",
    ]
    show("E-MMDiT: forward passes and training steps", found, tables)
    if args.json is not None:
        settings = {"text_tokens": TEXT_TOKENS, "rounds": rounds, "quick": args.quick, "memory": memory_is}
        content = {"benchmark": "emmdit_forward", "machine": found, "settings": settings}
        write_json(args.json, {**content, "counts": counts, "rows": rows})


if __name__ == "__main__":
    main()
