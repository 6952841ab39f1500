"""GenEval's results: one row per image with the official columns, their file, and the summary."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from emmdit.evaluation.geneval.judge import Detection, Verdict, confident
from emmdit.evaluation.geneval.prompts import TASKS

Row = dict[str, Any]


def result_row(filename: str, metadata: Mapping[str, Any], verdict: Verdict, detections: Iterable[Detection]) -> Row:
    """The official columns of one image, `filename` relative to the folder of the set; and "unseen" as in `metadata`.

    `metadata` and `details` are JSON strings: the prompt's line, and {class: [[x1, y1, x2, y2, score]]} of the objects
    above the thresholds.
    """
    counted = {name: found for name, found in confident(detections, metadata["tag"]).items() if found}
    return {
        "filename": filename,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": bool(verdict.correct),
        "reason": verdict.reason,
        "metadata": json.dumps(metadata),
        "details": json.dumps({name: [[*d.box, float(d.score)] for d in found] for name, found in counted.items()}),
        **({"unseen": True} if metadata.get("unseen") else {}),
    }


def write_results(path: str | Path, rows: Iterable[Row]) -> None:
    """The official results file, sorted by file name."""
    ordered = sorted(rows, key=lambda row: row["filename"])
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in ordered), encoding="utf-8")


def by_task(verdicts: Iterable[tuple[str, bool]]) -> dict[str, list[bool]]:
    """(task, correct) of each image -> the verdicts of each task, in the order of the benchmark.

    The score of a task is their mean, the overall score the mean of the tasks' scores.
    """
    found: dict[str, list[bool]] = {}
    for tag, correct in verdicts:
        found.setdefault(tag, []).append(bool(correct))
    return {tag: found[tag] for tag in dict.fromkeys([*TASKS, *found]) if tag in found}


def summary(rows: Sequence[Row]) -> str:
    """The official summary of `rows`, whose completeness `GenEval.compute` checks, and one of unseen prompts below it.

    A prompt is correct if one of its images is.
    """
    parts = {
        "Summary": [row for row in rows if not row.get("unseen")],
        "Summary of unseen compositions": [row for row in rows if row.get("unseen")],
    }
    return "\n\n".join(_summary(title, part) for title, part in parts.items() if part)


def _summary(title: str, rows: Sequence[Row]) -> str:
    prompts: dict[str, bool] = {}
    for row in rows:
        prompts[row["metadata"]] = prompts.get(row["metadata"], False) or row["correct"]
    tasks = by_task((row["tag"], row["correct"]) for row in rows)
    lines = [
        title,
        "=" * len(title),
        f"Total images: {len(rows)}",
        f"Total prompts: {len(prompts)}",
        f"% correct images: {fmean(row['correct'] for row in rows):.2%}",
        f"% correct prompts: {fmean(prompts.values()):.2%}",
        "",
        "Task breakdown",
        "==============",
        *(f"{tag:<16} = {fmean(right):.2%} ({sum(right)} / {len(right)})" for tag, right in tasks.items()),
        "",
        f"Overall score (avg. over tasks): {fmean(map(fmean, tasks.values())):.5f}",
    ]
    return "\n".join(lines)
