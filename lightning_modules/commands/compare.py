"""Comparison of a student with its teacher (`emmdit evaluate --teacher`).

Both run in the student's pipeline and differ in the network alone: prompts, noise, text, guidance, sampler and image
codec are the student's.
"""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from emmdit.evaluation.compare import Call, check_pair, feature_errors, latency, spread_over, trajectory_calls
from emmdit.evaluation.image_set import ImageSet
from emmdit.files import grid, save_png
from emmdit.pipeline import TextToImagePipeline
from lightning_modules.commands.load_model import DTYPES, Model, open_model

PARTS = {"text": "text conditioning", "codec": "image codec", "path": "path"}
SHOWN = 8  # images in the report; the errors are measured on their trajectories
TIMESTEPS = 5
MAY_DIFFER = ("dtype", "cache_size", "subfolder", "tokenizer_subfolder", "revision", "slicing", "tiling")
GRID_SIDE = 256  # pixels of an image in pair.png; larger ones are shrunk, smaller ones enlarged


def open_teacher(student: Model, ckpt: str | Path, weights: str | None = None, **released: Any) -> Model:
    """The teacher of `student`, generating in the student's pipeline; arguments as for `open_model`.

    Raises:
        ValueError: they do not belong together.
    """
    found = open_model(ckpt, weights, encoders=False, **released)
    check_pair(student.network, found.network)
    check_parts(student.pipeline, found.pipeline)

    def generate(prompts: list[str], seeds: list[int]) -> Tensor:
        own = student.network
        student.pipeline.transformer = found.network
        try:
            return student.generate(prompts, seeds)
        finally:
            student.pipeline.transformer = own

    def to(device: torch.device, dtype: str) -> None:
        found.network.to(device, DTYPES[dtype])

    return Model(found.source, student.sampling, generate, to, found.pipeline)


def check_parts(student: Any, teacher: Any) -> None:
    """Raise a ValueError with one sentence where the pipelines differ in more than their network.

    Of a stock diffusers pipeline only the prediction type is compared: it does not say how it encodes.
    """
    compared = [("prediction", {"prediction": _prediction(student)}, {"prediction": _prediction(teacher)})]
    if isinstance(student, TextToImagePipeline) and isinstance(teacher, TextToImagePipeline):
        compared = [(words, _part(student, name), _part(teacher, name)) for name, words in PARTS.items()] + compared
    for what, own, other in compared:
        differ = [key for key in own | other if own.get(key) != other.get(key)]
        if differ:
            values = "; ".join(f"{key} {own.get(key)} and {other.get(key)}" for key in differ)
            raise ValueError(
                f"Student and teacher differ in their {what} ({values}): they may differ in the network alone."
            )


def _part(pipeline: TextToImagePipeline, name: str) -> dict[str, Any]:
    """Class and arguments, defaults included, of a part that determines the network's inputs."""
    kind = type(getattr(pipeline, name))
    parameters = inspect.signature(kind).parameters.items()
    arguments = {key: p.default for key, p in parameters if p.default is not p.empty}
    arguments |= pipeline.config[name].get("init_args") or {}
    arguments = {key: value for key, value in arguments.items() if key not in MAY_DIFFER}
    if arguments.get("source") is not None:  # a hub id and its copy in some folder
        arguments["source"] = Path(str(arguments["source"])).name
    plain = json.loads(json.dumps(arguments, default=str))  # tuples of defaults as the lists of a YAML
    return {"class": kind.__name__, **plain}


def _prediction(pipeline: Any) -> str:
    if isinstance(pipeline, TextToImagePipeline):
        return pipeline.path.diffusers_config()["prediction_type"]
    return pipeline.scheduler.config.get("prediction_type", "flow_prediction")  # flow schedulers have none


def decisive_parts(student: Model) -> dict[str, Any]:
    """What, beside network and sampling, determines the images of the student's pipeline; fit for JSON."""
    if not isinstance(student.pipeline, TextToImagePipeline):
        return student.source  # its encoders are known by the hash of the whole pipeline alone
    return {name: _part(student.pipeline, name) for name in PARTS}


# -- measurements --------------------------------------------------------------------------------------


def measure_pair(
    student: Model, teacher: Model, images: ImageSet, teacher_images: ImageSet, out: Path, device: torch.device
) -> dict[str, Any]:
    """The teacher's source, errors of layers and prediction, latency; and the images shown, also in `pair.png`."""
    firsts = [sample for sample in images.all if sample.number == 0]
    n = min(SHOWN, len(firsts))
    samples = [firsts[i * len(firsts) // n] for i in range(n)]  # evenly over the prompts
    folders = {"teacher": teacher_images.folder, "student": images.folder}
    shown = [
        {
            "prompt": sample.line["prompt"],
            "seed": sample.seed,
            **{name: Path(os.path.relpath(folder / sample.path, out)).as_posix() for name, folder in folders.items()},
        }
        for sample in samples
    ]
    write_grid(out, shown)
    first: list[Call] = []

    def trajectories() -> Iterator[list[Call]]:
        for sample in samples:  # one by one: outputs of every layer are kept
            chosen = spread_over(teacher_calls(student, teacher, sample.line["prompt"], sample.seed), TIMESTEPS)
            first[:] = first or [chosen[len(chosen) // 2]]
            yield chosen

    features = feature_errors(student.network, teacher.network, trajectories())
    times = latency(student.network, teacher.network, first[0], device)
    return {"teacher": teacher.source, "features": features, "latency": times, "shown": shown}


def teacher_calls(student: Model, teacher: Model, prompt: str, seed: int) -> list[Call]:
    """The calls of the teacher while it generates an image.

    Our own pipeline gives its trajectory; of a stock diffusers pipeline, which hides it, the calls are recorded.
    """
    if isinstance(student.pipeline, TextToImagePipeline):
        return trajectory_calls(teacher.network, student.pipeline, prompt, seed)
    with recorded_calls(teacher.network) as calls:
        teacher.generate([prompt], [seed])
    return calls


@contextmanager
def recorded_calls(network: nn.Module) -> Iterator[list[Call]]:
    """All calls of `network` inside a `with`, in order."""
    calls: list[Call] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        arguments = dict(kwargs)
        calls.append(Call(args[0] if args else arguments.pop("hidden_states"), arguments))

    handle = network.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def write_grid(out: Path, shown: Sequence[dict[str, Any]]) -> None:
    """`pair.png`: the teacher's images above the student's, each column of one prompt and one noise."""
    rows = ("teacher", "student")
    images = [Image.open(out / row[name]) for name in rows for row in shown]
    for image in images:
        image.thumbnail((GRID_SIDE, GRID_SIDE))
    scale = max(1, GRID_SIDE // 2 // max(images[0].size))
    settings = {"rows": rows, **{key: [row[key] for row in shown] for key in ("prompt", "seed")}}
    save_png(grid(images, len(shown), scale), out / "pair.png", settings)


def pair_metrics(pair: Mapping[str, Any] | None) -> dict[str, float]:
    """The numbers of a comparison for MLflow."""
    if pair is None:
        return {}
    errors = {f"pair_error_{part}": value for part, value in pair["features"]["mean"].items()}
    teacher = {f"teacher_{name}": value for name, value in pair["metrics"].items()}
    return {**errors, "pair_speedup": pair["latency"]["speedup"], **teacher}


def teacher_row(pair: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher's part of a student's row in the ledger."""
    return {
        "metrics": pair["ledger_metrics"],
        "errors": {part: value for part, value in pair["features"]["mean"].items() if math.isfinite(value)},
        "speedup": pair["latency"]["speedup"],
        **{key: pair["teacher"].get(key) for key in ("source", "weights", "sha256")},
    }
