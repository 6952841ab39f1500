"""`emmdit evaluate`: a model, a prompt set and a list of metrics to one JSON, a report and numbers in MLflow.

A column of the report is an image set: the model's, and on demand its teacher's, ground truth and noise. All of them
are generated and measured in the same way.
"""

from __future__ import annotations

import shlex
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from emmdit.config_text import mask_secrets
from emmdit.evaluation import ledger
from emmdit.evaluation.compare import compared
from emmdit.evaluation.image_set import Generate, ImageSet
from emmdit.evaluation.measure import measure, prepare
from emmdit.evaluation.metrics.base import ImageMetric
from emmdit.evaluation.prompts import PromptSet
from emmdit.evaluation.report import text_table, write_report
from emmdit.files import check_folder
from emmdit.provenance import git_commit, hardware
from emmdit.shapes import ShapesWorld
from emmdit.shapes.metrics import noise, renders
from emmdit.weights import is_diffusers_folder, run_folder
from lightning_modules.commands.compare import decisive_parts, measure_pair, open_teacher, pair_metrics, teacher_row
from lightning_modules.commands.distributed import add_trainer_arguments, on_all_ranks
from lightning_modules.commands.load_model import DTYPES, open_model
from lightning_modules.commands.options import (
    RELEASED,
    SAMPLING,
    add_released_arguments,
    add_sampling_arguments,
    add_trust_argument,
    check_options,
    command_parser,
    find_device,
    given,
)
from lightning_modules.commands.progress import counter
from lightning_modules.mlflow_runs import log_evaluation, read_training_record
from lightning_modules.runs import instantiate, read_config

LIBRARIES = ("torch", "torchvision", "torchmetrics", "transformers", "diffusers", "clean-fid", "numpy", "scipy")


def evaluate(argv: list[str]) -> None:
    """Score a model: one image set, any number of metrics, one JSON and a report."""
    parser = evaluation_parser()
    args = parser.parse_args(argv)
    if args.prompts is None or not args.metrics:
        raise ValueError(
            "No prompts or metrics are given: name an evaluation, e.g. -c experiments/evaluation/shapes.yaml."
        )
    check_options(args)
    if (args.ledger is None) != (args.experiment is None):
        raise ValueError("--ledger and --experiment belong together: a row of the ledger bears an experiment's name.")
    if args.ledger is not None:
        ledger.check(args.ledger, args.experiment)
    for option in ("out", "teacher_images"):
        if args[option] is not None:
            check_folder(args[option], f"--{option}")
    if args.teacher is None and (args.teacher_weights or args.teacher_images):
        raise ValueError("--teacher_weights and --teacher_images are of a teacher: name it with --teacher.")
    trainer = dict(args.trainer)
    if args.device is not None:
        device = find_device(args.device)
        trainer |= {"accelerator": device.type} | ({} if device.index is None else {"devices": [device.index]})
    built = instantiate(parser, args)
    on_all_ranks(trainer, lambda *place: run(args, built.prompts, built.metrics, *place))


def evaluation_parser() -> ArgumentParser:
    parser = command_parser(evaluate)
    config_help = "a file of experiments/evaluation, and one of experiments/trainer"
    parser.add_argument("-c", "--config", action=ActionConfigFile, help=config_help)
    ckpt_help = "run folder, checkpoint, export, diffusers pipeline (folder or hub id), Nitro-E file"
    parser.add_argument("--ckpt", required=True, help=ckpt_help)
    add_released_arguments(parser)
    parser.add_argument("--teacher", help="model to compare this student with, side by side; anything --ckpt may be")
    parser.add_argument("--teacher_weights", choices=["ema", "raw"], help="weights of a teacher's checkpoint")
    parser.add_argument("--teacher_images", help="folder of the teacher's images, which several students may share")
    parser.add_argument("--prompts", type=PromptSet, help="prompt set to generate")
    parser.add_argument("--metrics", type=list[ImageMetric], help="metrics of the image set")
    parser.add_argument("--out", help="folder of images and results; by default below the run, or in evaluations/")
    parser.add_argument("--seed", type=int, default=0, help="seed of the image set; no two share an image's noise")
    parser.add_argument("--weights", choices=["ema", "raw"], help="weights of a checkpoint; EMA if available")
    add_sampling_arguments(parser)
    parser.add_argument("--batch_size", type=int, default=64, help="images per forward pass")
    parser.add_argument("--device", help="cpu, cuda or cuda:1: short for --trainer.accelerator (and devices)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="type of the network's weights")
    parser.add_argument("--bounds", action="store_true", help="shapes world: also score ground-truth renders and noise")
    parser.add_argument("--mlflow", type=bool, default=True, help="log the numbers to the run of the checkpoint")
    parser.add_argument("--ledger", help="JSON file to which a row is added")
    parser.add_argument("--experiment", help="name of that row, e.g. shapes/emmdit")
    add_trust_argument(parser)
    add_trainer_arguments(parser)
    return parser


def run(
    args: Namespace, prompts: PromptSet, metrics: list[ImageMetric], device: torch.device, rank: int, world_size: int
) -> None:
    """The evaluation on one process; the first one writes."""
    how_opened = {"trust_code": args.trust_code, **given(args, RELEASED)}
    model = open_model(args.ckpt, args.weights, given(args, SAMPLING), **how_opened)
    teacher = open_teacher(model, args.teacher, args.teacher_weights, **how_opened) if args.teacher else None
    out = Path(args.out) if args.out is not None else default_folder(args, model.source.get("step"))

    def images(folder: str | Path, **made_with: Any) -> ImageSet:
        return ImageSet(folder, prompts, args.seed, made_with, rank, world_size)

    how = {"sampling": model.sampling, "dtype": args.dtype}
    columns: dict[str, tuple[ImageSet, Generate]] = {}
    columns["model"] = images(out / "images", source=model.source, **how), model.generate
    if teacher is not None:
        folder = args.teacher_images or out / "images_teacher"
        shared = images(folder, source=teacher.source, parts=decisive_parts(model), **how)
        columns["teacher"] = shared, teacher.generate
    if args.bounds:
        shapes = ShapesWorld()
        for name, generate in (("real renders", renders(shapes)), ("noise", noise(shapes.image_size))):
            folder = out / f"images_{name.replace(' ', '_')}"
            columns[name] = images(folder, source={"source": name}), generate
    own_images = columns["model"][0]
    prepare(metrics, own_images, device)
    for image_set, _ in columns.values():  # a folder that is not empty is refused before anything is generated
        image_set.open()
    for opened in (model, teacher):
        if opened is not None:
            opened.to(device, args.dtype)
    scores, seconds = {}, {}
    for name, (image_set, generate) in columns.items():
        generated, measured = (
            None if rank else counter(f"images {done}, {name}") for done in ("generated", "measured")
        )
        started = time.perf_counter()
        if image_set.make(generate, args.batch_size, generated) == len(image_set.samples):
            seconds[name] = time.perf_counter() - started  # unless an earlier call made a part, at an unknown speed
        scores[name] = measure(metrics, image_set, device, args.batch_size, measured)
    if rank:
        return

    own, n = scores["model"], len(own_images.all)
    result = {
        "source": model.source,
        "prompts": prompts.describe(),
        "images": n,
        "sampling": model.sampling,
        "seed": args.seed,
        "dtype": args.dtype,
        "metrics": own.metrics,
        "ledger_metrics": own.families,
        "settings": {metric.name: metric.settings() for metric in metrics},
        "libraries": {name: version(name) for name in LIBRARIES},
        "commit": git_commit(),
        "command": mask_secrets(shlex.join(["emmdit", *sys.argv[1:]])),
        "hardware": hardware(device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if "model" in seconds:
        result["seconds_per_image"] = seconds["model"] / n
    if teacher is not None:
        result["pair"] = {
            "metrics": scores["teacher"].metrics,
            "ledger_metrics": scores["teacher"].families,
            **compared(own.metrics, scores["teacher"].metrics),
            **measure_pair(model, teacher, own_images, columns["teacher"][0], out, device),
        }
    if args.bounds:
        result["columns"] = {name: scores[name].metrics for name in columns if name not in ("model", "teacher")}
    own.write(out, result)
    report = write_report(out, result, own.rows, out / "images")
    print(text_table(result))
    if args.ledger is not None:
        ledger.append(args.ledger, ledger_row(args, result))
    if args.mlflow:
        numbers = own.metrics | pair_metrics(result.get("pair"))
        log_evaluation(training_run(args.ckpt), numbers, model.source.get("step", 0), report, model.source)
    print(report, file=sys.stderr)


def training_run(ckpt: str) -> Path | None:
    """The run folder of a training that `ckpt` is or lies in; None for exports, released files and hub ids."""
    if is_diffusers_folder(ckpt) or Path(ckpt).suffix == ".safetensors" or not Path(ckpt).exists():
        return None
    return run_folder(ckpt)


def default_folder(args: Namespace, step: int | None) -> Path:
    """RUN/evaluation/shapes_seed0_step1100 for a run; evaluations/NAME/shapes_seed0 for anything else."""
    files = [Path(str(file)) for file in args.config or ()]
    files = [file for file in files if file.parent.name != "trainer"] or [Path("evaluation")]
    name = f"{files[-1].stem}_seed{args.seed}"
    name += "" if step is None else f"_step{step}"
    name += f"_{args.weights}" if args.weights else ""
    run = training_run(args.ckpt)
    return Path("evaluations", Path(args.ckpt).stem, name) if run is None else run / "evaluation" / name


def ledger_row(args: Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """What the ledger keeps of an evaluation, and of the training behind it."""
    source = result["source"]
    settings = {key: result[key] for key in ("prompts", "sampling")}
    row = {
        "experiment": args.experiment,
        "seed": 0,
        "eval_seed": args.seed,
        "metrics": result["ledger_metrics"],
        "train_seconds": None,
        "settings": settings | {key: source.get(key) for key in ("weights", "sha256")},
        **{key: result[key] for key in ("command", "commit", "hardware")},
    }
    if "pair" in result:
        row["teacher"] = teacher_row(result["pair"])
    run = training_run(args.ckpt)
    if run is None:
        return row
    row["seed"] = int(read_config(run).get("seed_everything") or 0)
    row["train"] = {"steps": source["step"]}
    try:
        row["train"] |= read_training_record(run, source["step"])
        row["train_seconds"] = row["train"].pop("seconds", None)
    except OSError as error:
        print(f"The run does not tell how it was trained: {error}", file=sys.stderr)
    return row
