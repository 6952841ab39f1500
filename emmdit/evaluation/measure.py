"""Measuring one image set with any number of metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from emmdit.evaluation.geneval import GenEval, summary, write_results
from emmdit.evaluation.image_set import ImageSet, Progress
from emmdit.evaluation.metrics.base import ImageMetric
from emmdit.evaluation.metrics.clip_score import CLIPScore
from emmdit.files import atomic_path


@dataclass(frozen=True)
class Scores:
    """Results of the metrics on one image set.

    Attributes:
        metrics: by the names to report: {"fid_clean_5k": 12.3, "geneval_hf": 0.6, "geneval_hf_position": 0.2, ...}.
        families: as the ledger names them: {"fid_clip": ..., "geneval_overall": ..., "geneval_position": ...}.
        rows: GenEval's verdicts in the order of the images, with "clip_score" where `CLIPScore` was measured.
    """

    metrics: dict[str, float]
    families: dict[str, float]
    rows: list[dict[str, Any]]

    def write(self, folder: Path, result: Mapping[str, Any]) -> None:
        """`evaluation.json` with `result` in it, and GenEval's official files where it was measured."""
        with atomic_path(folder / "evaluation.json") as part:
            part.write_text(json.dumps(result, indent=1) + "\n")
        if self.rows:
            write_results(folder / "geneval_results.jsonl", self.rows)
            (folder / "geneval_summary.txt").write_text(f"{summary(self.rows)}\n")


def prepare(metrics: Sequence[ImageMetric], images: ImageSet, device: torch.device | str = "cpu") -> None:
    """Load and check everything, so that errors show before an image is generated."""
    names = [metric.name for metric in metrics]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"The metric {twice} is asked for twice: leave one out.")
    for metric in metrics:
        metric.begin(images.all)
        metric.prepare(device)
        metric.to(device)


def measure(
    metrics: Sequence[ImageMetric],
    images: ImageSet,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Scores:
    """Score the images of all processes; every process must call it. Call `prepare` once before."""
    for metric in metrics:
        metric.begin(images.all)
        metric.reset()
    done = 0
    for batch, samples in images.batches(batch_size):
        batch = batch.to(device)
        for metric in metrics:
            metric.update(batch, samples)
        done += len(samples)
        if progress is not None:
            progress(done, len(images.samples))
    values = [(metric, part, value) for metric in metrics for part, value in metric.compute().items()]
    return Scores(
        {metric.label(len(images.all), part): value for metric, part, value in values},
        {_family(metric, part): value for metric, part, value in values},
        _gather_rows(metrics),
    )


def _family(metric: ImageMetric, part: str) -> str:
    part = part or ("overall" if metric.kind == "geneval" else "")
    return f"{metric.kind}_{part}" if part else metric.kind


def _gather_rows(metrics: Sequence[ImageMetric]) -> list[dict[str, Any]]:
    scores: Mapping[str, float] = {path: v for m in metrics if isinstance(m, CLIPScore) for path, v in m.scores.items()}
    rows = [dict(row) for m in metrics if isinstance(m, GenEval) for row in m.rows]
    for row in rows:
        if row["filename"] in scores:
            row["clip_score"] = scores[row["filename"]]
    if dist.is_available() and dist.is_initialized():
        parts: list[list] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, rows)
        rows = [row for part in parts for row in part]
    return sorted(rows, key=lambda row: row["filename"])
