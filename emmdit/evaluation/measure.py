"""An evaluation: one set of images, any number of metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from emmdit.evaluation.geneval import GenEval
from emmdit.evaluation.image_set import ImageSet, Progress
from emmdit.evaluation.metrics.base import ImageMetric
from emmdit.evaluation.metrics.clip_score import CLIPScore


def prepare(metrics: Sequence[ImageMetric], image_set: ImageSet, device: torch.device | str = "cpu") -> None:
    """Everything that can be missing or contradict itself shows here, before a picture is made."""
    names = [metric.name for metric in metrics]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"The metric {name} is asked for twice: leave one out.")
    for metric in metrics:
        metric.begin(image_set.all)
        metric.prepare(device)
        metric.to(device)


def measure(
    metrics: Sequence[ImageMetric],
    image_set: ImageSet,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """{metric's name: {part: value}} over the pictures of all processes. Call `prepare` first."""
    for metric in metrics:
        metric.reset()
    done = 0
    for images, samples in image_set.batches(batch_size):
        images = images.to(device)
        for metric in metrics:
            metric.update(images, samples)
        done += len(samples)
        if progress is not None:
            progress(done, len(image_set.samples))
    return {metric.name: metric.compute() for metric in metrics}


def labelled(metrics: Sequence[ImageMetric], values: dict[str, dict[str, float]], n: int) -> dict[str, float]:
    """Flat, by the names to report: {"fid_clean_5k": 12.3, "geneval_hf": 0.6, "geneval_hf_position": 0.2, ...}."""
    return {metric.label(n, part): value for metric in metrics for part, value in values[metric.name].items()}


def comparable(metrics: Sequence[ImageMetric], values: dict[str, dict[str, float]]) -> dict[str, float]:
    """By family, as the ledger names them: {"fid_clip": ..., "geneval_overall": ..., "geneval_position": ...}."""
    flat: dict[str, Any] = {}
    for metric in metrics:
        for part, value in values[metric.name].items():
            part = part or ("overall" if metric.kind == "geneval" else "")
            flat[f"{metric.kind}_{part}" if part else metric.kind] = value
    return flat


def gather_rows(metrics: Sequence[ImageMetric]) -> list[dict[str, Any]]:
    """GenEval's verdicts of all processes in the order of the pictures, with their CLIP scores where there are some.

    Every process must call it.
    """
    scores = {path: value for m in metrics if isinstance(m, CLIPScore) for path, value in m.scores.items()}
    rows = [dict(row) for m in metrics if isinstance(m, GenEval) for row in m.rows]
    for row in rows:
        if row["filename"] in scores:
            row["clip_score"] = scores[row["filename"]]
    if dist.is_available() and dist.is_initialized():
        parts: list[list] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, rows)
        rows = [row for part in parts for row in part]
    return sorted(rows, key=lambda row: row["filename"])
