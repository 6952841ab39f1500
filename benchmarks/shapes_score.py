"""GenEval scores of a model of the shapes world: its pictures read by the detector that needs no weights.

    python benchmarks/shapes_score.py --ckpt runs/shapes --json benchmarks/results/shapes_score.json
    python benchmarks/shapes_score.py --ckpt runs/shapes --quick    # fewer prompts and pictures
    python benchmarks/shapes_score.py --real                        # the most any model can reach

The world's own prompts in GenEval's six tasks, judged by GenEval's rules: a score is the share of pictures that show
what their prompt asks for, overall is the mean of the tasks. Tasks differ in how many prompts they have; single_object
has four. `--real` judges ground-truth renders instead, as many of each task as there would be pictures of a model.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import argument_parser, markdown_table, progress, show, write_json
from emmdit import EMMDiTPipeline
from emmdit.data.shapes import TASKS, ShapesWorld, read_scene, render_scene
from emmdit.evaluation.geneval import Detection, Verdict, judge
from emmdit.images import to_uint8
from emmdit.machine import machine
from lightning_modules.runs import load_pipeline

COLUMNS = {"task": "task", "score": "score", "correct": "correct", "pictures": "pictures", "prompts": "prompts"}
DEFAULTS, QUICK = (32, 4), (12, 2)  # prompts of each task at most, pictures of each prompt
Judged = tuple[dict[str, Any], np.ndarray]  # metadata and a uint8 picture (H, W, 3)


def verdict(metadata: dict[str, Any], picture: np.ndarray) -> Verdict:
    found = read_scene(picture)
    detections = [Detection(f.shape, f.score, f.box, f.mask) for f in found]
    color = {id(d): f.color for d, f in zip(detections, found, strict=True)}
    return judge(metadata, detections, lambda objects, _: [color[id(d)] for d in objects])


def sampled(pipeline: EMMDiTPipeline, asked: list[dict[str, Any]], seed: int, batch_size: int) -> Iterator[Judged]:
    """A picture for each of `asked`. No two have the same noise, nor do two runs with different seeds."""
    first = seed * len(asked)
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        seeds = list(range(first + start, first + start + len(batch)))
        images = pipeline([line["prompt"] for line in batch], seed=seeds, output_type="pt").images
        yield from zip(batch, to_uint8(images * 2 - 1), strict=True)
        progress(f"{start + len(batch)}/{len(asked)} pictures")


def rendered(asked: list[dict[str, Any]], seed: int) -> Iterator[Judged]:
    """Ground truth: as many scenes of each task as are asked for, each with its own prompt."""
    tags = [line["tag"] for line in asked]
    for number, task in enumerate(TASKS):
        world = ShapesWorld(task_weights=tuple(float(i == number) for i in range(len(TASKS))))
        for scene in (world.sample(seed, i) for i in range(tags.count(task))):
            yield scene.metadata, render_scene(scene)
        progress(f"{task} rendered")


def score(pictures: Iterator[Judged]) -> list[dict[str, Any]]:
    """A row for each task, and the overall one."""
    correct: dict[str, list[bool]] = {task: [] for task in TASKS}
    prompts: dict[str, set[str]] = {task: set() for task in TASKS}
    for metadata, picture in pictures:
        correct[metadata["tag"]].append(verdict(metadata, picture).correct)
        prompts[metadata["tag"]].add(metadata["prompt"])
    rows = [
        {"task": t, "score": statistics.mean(c), "correct": sum(c), "pictures": len(c), "prompts": len(prompts[t])}
        for t, c in correct.items()
    ]
    total = {key: sum(row[key] for row in rows) for key in ("correct", "pictures", "prompts")}
    return [*rows, {"task": "overall", "score": statistics.mean(row["score"] for row in rows), **total}]


def natural(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", type=Path, metavar="RUN", help="a run folder, a checkpoint or an export")
    what.add_argument("--real", action="store_true", help="judge ground-truth renders")
    parser.add_argument("--prompts-per-task", type=natural, metavar="N", help="at most; default 32, --quick 12")
    parser.add_argument("--images", type=natural, metavar="N", help="of each prompt; default 4, --quick 2")
    parser.add_argument("--seed", type=int, default=0, help="picks the prompts and the noise")
    parser.add_argument("--steps", type=natural, help="sampling steps; default: the model's own")
    parser.add_argument("--guidance", type=float, help="guidance scale; default: the model's own")
    parser.add_argument("--batch-size", type=natural, default=128)
    parser.add_argument("--weights", choices=("ema", "raw"), help="of a checkpoint; default: ema if there is one")
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, got {args.seed}")
    defaults = QUICK if args.quick else DEFAULTS
    n, images = args.prompts_per_task or defaults[0], args.images or defaults[1]

    settings: dict[str, Any] = {"prompts_per_task": n, "images": images, "seed": args.seed}
    asked = [line for line in ShapesWorld().prompts(n, args.seed) for _ in range(images)]
    if args.real:
        title, pictures = "Shapes world: ground truth", rendered(asked, args.seed)
    else:
        try:
            pipeline, source = load_pipeline(args.ckpt, args.weights)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        pipeline.to(args.device)
        given = {"steps": args.steps, "guidance": args.guidance}
        pipeline.sampling = pipeline.sampling.replace(**{k: v for k, v in given.items() if v is not None})
        # Given by an absolute path, a model is named without it: what is written may be published.
        source["source"] = args.ckpt.name if args.ckpt.is_absolute() else str(args.ckpt)
        settings |= {**source, "sampling": asdict(pipeline.sampling), "batch_size": args.batch_size}
        title = f"Shapes world: {args.ckpt.name}"
        pictures = sampled(pipeline, asked, args.seed, args.batch_size)

    found = machine(args.device if args.ckpt else "cpu")
    rows = score(pictures)
    notes = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in settings.items() if not isinstance(v, dict))
    notes += "".join(f", {k.replace('_', ' ')} {v}" for k, v in settings.get("sampling", {}).items() if v is not None)
    show(title, found, [markdown_table(rows, COLUMNS), f"Settings: {notes}."])
    if args.json is not None:
        write_json(args.json, {"benchmark": "shapes_score", "machine": found, "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
