"""`emmdit evaluate`: a model, a prompt set and a list of metrics to one JSON, a report and numbers in MLflow."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from mlflow.exceptions import MlflowException

from emmdit.evaluation import ledger
from emmdit.evaluation.compare import compared
from emmdit.evaluation.geneval import summary, write_results
from emmdit.evaluation.image_set import Draw, ImageSet
from emmdit.evaluation.measure import comparable, gather_rows, labelled, measure, prepare
from emmdit.evaluation.metrics.base import ImageMetric
from emmdit.evaluation.prompts import PromptSet
from emmdit.evaluation.report import text_table, write_report
from emmdit.provenance import machine
from emmdit.shapes import ShapesWorld
from emmdit.shapes.metrics import noise, renders
from emmdit.weights import is_diffusers_folder, run_folder
from lightning_modules.commands.compare import decisive_parts, measure_pair, open_teacher, pair_metrics, teacher_row
from lightning_modules.commands.counter import counter
from lightning_modules.commands.load_model import DTYPES, Model, open_model
from lightning_modules.config_text import mask_secrets
from lightning_modules.mlflow_evaluation import history, log_evaluation
from lightning_modules.runs import instantiate, read_config

LIBRARIES = ("torch", "torchvision", "torchmetrics", "transformers", "diffusers", "clean-fid", "numpy", "scipy")


def evaluate(argv: list[str]) -> None:
    """Score a model: one set of pictures, any number of metrics, one JSON and a report."""
    parser = evaluation_parser()
    args = parser.parse_args(argv)
    if args.prompts is None or not args.metrics:
        raise ValueError("Nothing to measure: give an evaluation, e.g. -c experiments/evaluation/shapes.yaml.")
    if args.batch_size < 1 or args.seed < 0:
        raise ValueError("--batch-size must be at least 1 and --seed at least 0.")
    if (args.ledger is None) != (args.experiment is None):
        raise ValueError("--ledger and --experiment belong together: a row of the ledger bears an experiment's name.")
    if args.teacher is None and (args.teacher_weights or args.teacher_images):
        raise ValueError("--teacher-weights and --teacher-images are of a teacher: name it with --teacher.")
    with processes(args.device) as (device, rank, world):
        run(args, instantiate(parser, args), device, rank, world)


def evaluation_parser() -> ArgumentParser:
    parser = ArgumentParser("emmdit evaluate", description=evaluate.__doc__, exit_on_error=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="an evaluation's YAML (experiments/evaluation)")
    parser.add_argument(
        "--ckpt",
        required=True,
        help="run folder, checkpoint, export, diffusers pipeline, or released Nitro-E .safetensors file",
    )
    parser.add_argument(
        "--resolution", type=int, choices=[512, 1024], help="of a released Nitro-E file; 512 by default"
    )
    parser.add_argument("--text-encoder", help="of a released file: folder or hub id in place of the published one")
    parser.add_argument("--autoencoder", help="likewise")
    parser.add_argument("--teacher", help="of this student: the same for it, side by side; whatever --ckpt may be")
    parser.add_argument("--teacher-weights", choices=["ema", "raw"], help="of a teacher's checkpoint")
    parser.add_argument(
        "--teacher-images", help="folder of its pictures; name one for several students, and they are drawn once"
    )
    parser.add_argument("--prompts", type=PromptSet, help="what to draw")
    parser.add_argument("--metrics", type=list[ImageMetric], help="what to measure")
    parser.add_argument("--out", help="folder of pictures and results; by default below the run or evaluations/")
    parser.add_argument("--seed", type=int, default=0, help="of the noise: another one makes other pictures")
    parser.add_argument("--weights", choices=["ema", "raw"], help="of a checkpoint; the average by default")
    parser.add_argument("--steps", type=int, help="sampling steps; the model's own by default, as are the next four")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--sampler", choices=["euler", "heun", "dpm_solver"])
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the network")
    parser.add_argument("--bounds", action="store_true", help="shapes world: the same for real renders and for noise")
    parser.add_argument("--mlflow", type=bool, default=True, help="log the numbers to the run of the checkpoint")
    parser.add_argument("--ledger", help="JSON file that gets a row")
    parser.add_argument("--experiment", help="name of that row, e.g. shapes/emmdit")
    return parser


@contextmanager
def processes(device: str) -> Iterator[tuple[torch.device, int, int]]:
    """Device, rank and number of processes: one, or those that torchrun started."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch sees no GPU here; use --device cpu.")
    if world == 1:
        yield where, 0, 1
        return
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield where, dist.get_rank(), world
    finally:
        dist.destroy_process_group()


def run(args: Namespace, built: Namespace, device: torch.device, rank: int, world: int) -> None:
    prompts, metrics = built.prompts, built.metrics
    sampling, released = (
        {key: value for key in keys if (value := getattr(args, key)) is not None}
        for keys in (("steps", "guidance", "sampler", "height", "width"), ("resolution", "text_encoder", "autoencoder"))
    )
    model = open_model(args.ckpt, args.weights, sampling, **released)
    teacher = None
    if args.teacher is not None:
        teacher = open_teacher(model, args.teacher, args.teacher_weights, **released)
    out = Path(args.out) if args.out is not None else default_folder(args, model.source.get("step"))
    made_with = {"source": model.source, "sampling": model.sampling, "dtype": args.dtype}
    images = ImageSet(out / "images", prompts, args.seed, made_with, rank, world)
    prepare(metrics, images, device)
    open_first(images)
    if teacher is not None:
        made_with |= {"source": teacher.source, "parts": decisive_parts(model)}
        folder = args.teacher_images or out / "images_teacher"
        teacher_images = ImageSet(folder, prompts, args.seed, made_with, rank, world)
        open_first(teacher_images)
    values, rows, seconds = draw_and_measure(args, model, images, metrics, device)
    if teacher is not None:
        teacher_values, _, _ = draw_and_measure(args, teacher, teacher_images, metrics, device, "teacher's ")
    # Metrics add up over all processes, so that every one takes part.
    columns = bounds(prompts, metrics, args.seed, args.batch_size, out, rank, world) if args.bounds else None
    if rank:
        return
    n = len(images.all)
    result = {
        "source": model.source,
        "prompts": prompts.describe(),
        "images": n,
        "sampling": model.sampling,
        "seed": args.seed,
        "dtype": args.dtype,
        "metrics": labelled(metrics, values, n),
        "ledger_metrics": comparable(metrics, values),
        "settings": {metric.name: metric.settings() for metric in metrics},
        **circumstances(device),
    }
    if seconds is not None:
        result["seconds_per_image"] = seconds / n
    if teacher is not None:
        own, its = result["metrics"], labelled(metrics, teacher_values, n)
        pair = {"metrics": its, "ledger_metrics": comparable(metrics, teacher_values), **compared(own, its)}
        result["pair"] = {**pair, **measure_pair(model, teacher, images, teacher_images, out, device)}
    if columns is not None:
        result["columns"] = columns
    (out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    if rows:
        write_results(out / "geneval_results.jsonl", rows)
        (out / "geneval_summary.txt").write_text(f"{summary(rows)}\n")
    write_report(out, result, rows, images.folder)
    print(text_table(result))
    if args.mlflow:
        source = result["source"]
        numbers = result["metrics"] | pair_metrics(result.get("pair"))
        log_evaluation(training_run(args.ckpt), numbers, source.get("step", 0), out / "report.html", source)
    if args.ledger is not None:
        ledger.append(args.ledger, ledger_row(args, result))
    print(f"{out}/report.html", file=sys.stderr)


def open_first(images: ImageSet) -> None:
    """Rank zero opens the folder, which must be empty or this very set's, before any other writes pictures into it."""
    if images.rank == 0:
        images.open()
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
    if images.rank:
        images.open()


def draw_and_measure(
    args: Namespace,
    model: Model,
    images: ImageSet,
    metrics: Sequence[ImageMetric],
    device: torch.device,
    whose: str = "",
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]], float | None]:
    """Values of the metrics, GenEval's verdicts, and the seconds of drawing where all was drawn now."""
    model.to(device, args.dtype)
    started = time.perf_counter()
    drawn = images.make(model.draw, args.batch_size, None if images.rank else counter(f"{whose}pictures drawn"))
    seconds = time.perf_counter() - started
    for metric in metrics:
        metric.begin(images.all)
    progress = None if images.rank else counter(f"{whose}pictures measured")
    values = measure(metrics, images, device, args.batch_size, progress)
    # An earlier call may have drawn a part, at an unknown speed.
    return values, gather_rows(metrics), seconds if drawn == len(images.samples) else None


def training_run(ckpt: str) -> Path | None:
    """The run folder of a training that `ckpt` is or lies in; None for exports and released files."""
    if is_diffusers_folder(ckpt) or Path(ckpt).suffix == ".safetensors":
        return None
    return run_folder(ckpt)


def default_folder(args: Namespace, step: int | None) -> Path:
    """RUN/evaluation/shapes_seed0_step1100 for a run; evaluations/NAME/shapes_seed0 for anything else."""
    name = f"{Path(str(args.config[-1])).stem if args.config else 'evaluation'}_seed{args.seed}"
    name += "" if step is None else f"_step{step}"
    name += f"_{args.weights}" if args.weights else ""
    run = training_run(args.ckpt)
    return Path("evaluations", Path(args.ckpt).stem, name) if run is None else run / "evaluation" / name


def bounds(
    prompts: PromptSet,
    metrics: Sequence[ImageMetric],
    seed: int,
    batch_size: int,
    out: Path,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, dict[str, float]]:
    """The same metrics for ground-truth renders of the prompts (upper bound) and for noise (lower bound)."""
    world = ShapesWorld()
    columns = {}
    sources: dict[str, Draw] = {"real renders": renders(world), "noise": noise(world.image_size)}
    for name, draw in sources.items():
        made_with = {"source": {"source": name}}
        images = ImageSet(out / f"images_{name.replace(' ', '_')}", prompts, seed, made_with, rank, world_size)
        open_first(images)
        images.make(draw, batch_size)
        for metric in metrics:
            metric.begin(images.all)
        columns[name] = labelled(metrics, measure(metrics, images, metrics[0].device, batch_size), len(images.all))
    return columns


def circumstances(device: torch.device) -> dict[str, Any]:
    """What the numbers came about with: libraries, commit, command, hardware."""
    found = machine(device)
    return {
        "libraries": {name: version(name) for name in LIBRARIES},
        "commit": found["commit"],
        "command": mask_secrets(shlex.join(["emmdit", *sys.argv[1:]])),
        "hardware": found["gpu"] or f"{found['cpu']}, {found['torch_threads']} threads",
        "date": found["date"],
    }


def ledger_row(args: Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """What the ledger keeps of an evaluation, and of the training behind it."""
    row = {
        "experiment": args.experiment,
        "seed": 0,
        "eval_seed": args.seed,
        "metrics": result["ledger_metrics"],
        "train_seconds": None,
        "settings": {
            "prompts": result["prompts"],
            "sampling": result["sampling"],
            "weights": result["source"].get("weights"),
            "sha256": result["source"]["sha256"],
        },
        **{key: result[key] for key in ("command", "commit", "hardware")},
    }
    if "pair" in result:
        row["teacher"] = teacher_row(result["pair"])
    run = training_run(args.ckpt)
    if run is None:
        return row
    row["seed"] = int(read_config(run).get("seed_everything") or 0)
    row["train"] = {"steps": result["source"]["step"], **trained(run)}
    row["train_seconds"] = row["train"].pop("seconds", None)
    return row


def trained(run: Path) -> dict[str, Any]:
    """Time and losses of a training: its `train.json` (`benchmarks/shapes_ablation.py`), else from MLflow."""
    if (run / "train.json").is_file():
        return json.loads((run / "train.json").read_text())
    try:
        return history(run)
    except (OSError, MlflowException) as error:
        print(f"The tracker does not tell how the run was trained: {error}", file=sys.stderr)
        return {}
