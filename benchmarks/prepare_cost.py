"""On paper: disk, hours and money of preparing a data set for training, from named inputs.

    python -m benchmarks.prepare_cost                            # docs/data.md shows this
    python -m benchmarks.prepare_cost --nodes 1 8 --encode 400 --jpeg_kb 250

The rates of reading and decoding are those of `benchmarks/results/loader_cpu.json`, measured; FLOPs of the encoder are
counted here. Everything else is an assumption with a flag of its own: put in what your cluster does.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import ROOT, markdown_table

RESULTS = ROOT / "benchmarks/results/loader_cpu.json"
LATENT_BYTES = 16_384 + 300  # 512 px with DC-AE in float16; caption, sizes, key (181 B in benchmarks/loader.py)
COLUMNS = {"what": "", "value": "value", "unit": "unit", "basis": "basis"}
NODE_COLUMNS = {
    "nodes": "nodes",
    "download": "download, h",
    "decode": "decode and crop, h",
    "encode": "encode, h",
    "write": "write latents, h",
    "hours": "all at once, h",
    "slowest": "slowest",
    "cost": "cost, $",
}


def encoder_flops(resolution: int = 512) -> int:
    """Of DC-AE f32c32's encoder on one image, counted without computing it (2 x multiply-add)."""
    from diffusers import AutoencoderDC

    with torch.device("meta"):
        model = AutoencoderDC()  # its defaults are the published f32c32
        image = torch.empty(1, 3, resolution, resolution)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode(image)
    return counter.get_total_flops()


def decode_rate(results: Path) -> float:
    """Measured pictures a second and core, of the smaller JPEG."""
    return float(json.loads(results.read_text())["jpeg"][0]["cpu_rate"])


def plan(args: argparse.Namespace, flops: int, decode: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Inputs with where each comes from, and a row for each number of nodes."""
    encode = args.encode or args.peak * 1e12 * args.utilisation / flops
    kept = args.pairs * (1 - args.lost)
    source, latents = args.pairs * args.jpeg_kb * 1e3, kept * LATENT_BYTES
    assumed = "assumed"
    inputs = [
        {"what": "pairs", "value": args.pairs, "unit": "", "basis": "given"},
        {"what": "left out (gone links, too small, corrupt)", "value": args.lost, "unit": "of all", "basis": assumed},
        {"what": "picture", "value": args.jpeg_kb, "unit": "kB", "basis": assumed},
        {"what": "JPEG 1024 x 768 to 512 px", "value": decode, "unit": "pictures/s and core", "basis": "measured"},
        {"what": "DC-AE encoder at 512 px", "value": flops / 1e12, "unit": "TFLOP a picture", "basis": "counted"},
        {"what": "GPU, dense bf16", "value": args.peak, "unit": "TFLOP/s", "basis": "assumed (H100 class)"},
        {"what": "of which the encoder reaches", "value": args.utilisation, "unit": "", "basis": assumed},
        {
            "what": "encode",
            "value": encode,
            "unit": "pictures/s and GPU",
            "basis": "given" if args.encode else "from the three above",
        },
        {"what": "cores for decoding", "value": args.cores, "unit": "a node of 8 GPUs", "basis": assumed},
        {"what": "network", "value": args.network, "unit": "Gbit/s and node", "basis": assumed},
        {"what": "disk, writing", "value": args.disk, "unit": "GB/s, shared by all nodes", "basis": assumed},
        {"what": "price", "value": args.price, "unit": "$ a node hour", "basis": assumed},
        {"what": "source on disk", "value": source / 1e12, "unit": "TB", "basis": "pairs x picture"},
        {
            "what": "latents on disk",
            "value": latents / 1e12,
            "unit": "TB",
            "basis": "16 KiB, and 300 B of caption and sizes",
        },
        {
            "what": "copies of the pictures at 512 px, for REPA (--keep_images 95)",
            "value": kept * args.kept_kb * 1e3 / 1e12,
            "unit": "TB",
            "basis": f"{args.kept_kb:g} kB each, assumed",
        },
    ]
    rows = []
    for nodes in args.nodes:
        hours = {
            "download": source * 8 / (args.network * 1e9 * nodes) / 3600,
            "decode": args.pairs / (decode * args.cores * nodes) / 3600,
            "encode": kept / (encode * 8 * nodes) / 3600,
            "write": latents / (args.disk * 1e9) / 3600,
        }
        slowest = max(hours, key=hours.__getitem__)
        row = {"nodes": nodes, **hours, "hours": hours[slowest], "slowest": slowest}
        rows.append(row | {"cost": math.ceil(nodes * hours[slowest] * args.price)})
    return inputs, rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=float, default=25e6)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 8], help="of 8 GPUs")
    parser.add_argument("--lost", type=float, default=0.1, help="part of the pairs that is left out")
    parser.add_argument("--jpeg_kb", type=float, default=200.0, help="of a picture in the source")
    parser.add_argument("--kept_kb", type=float, default=90.0, help="of a kept 512 px copy")
    parser.add_argument("--decode", type=float, help="pictures/s and core; default: as measured")
    parser.add_argument("--encode", type=float, help="pictures/s and GPU; default: from --peak and --utilisation")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of a GPU, dense bf16")
    parser.add_argument("--utilisation", type=float, default=0.15, help="part of it that the encoder reaches")
    parser.add_argument("--cores", type=float, default=96, help="of a node that decode")
    parser.add_argument("--network", type=float, default=10.0, help="Gbit/s into a node")
    parser.add_argument("--disk", type=float, default=1.0, help="GB/s that the latents are written with, all nodes")
    parser.add_argument("--price", type=float, default=20.0, help="$ a node hour")
    parser.add_argument("--results", type=Path, default=RESULTS, help="of benchmarks/loader.py")
    args = parser.parse_args(argv)
    if args.decode is None and not args.results.is_file():
        raise SystemExit(f"There is no {args.results}: run python -m benchmarks.loader --json, or give --decode.")
    inputs, rows = plan(args, encoder_flops(), args.decode or decode_rate(args.results))
    print(markdown_table(inputs, COLUMNS) + "\n\n" + markdown_table(rows, NODE_COLUMNS))


if __name__ == "__main__":
    main()
