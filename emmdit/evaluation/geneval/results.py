"""GenEval's results: one row per image with the official columns, their file, and the summary."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from emmdit.evaluation.geneval.judge import Detection, Verdict, confident
from emmdit.evaluation.geneval.prompts import TASKS


class ResultRow(TypedDict):
    """One image. `metadata` and `details` are JSON strings: the prompt's line, and {class: [[x1, y1, x2, y2, score]]}
    of the objects above the thresholds."""

    filename: str  # relative to the folder of the set
    tag: str
    prompt: str
    correct: bool
    reason: str
    metadata: str
    details: str


def result_row(
    filename: str, metadata: Mapping[str, Any], verdict: Verdict, detections: Iterable[Detection]
) -> ResultRow:
    counted = {name: found for name, found in confident(detections, metadata["tag"]).items() if found}
    return ResultRow(
        filename=filename,
        tag=metadata["tag"],
        prompt=metadata["prompt"],
        correct=bool(verdict.correct),
        reason=verdict.reason,
        metadata=json.dumps(metadata),
        details=json.dumps({name: [[*d.box, float(d.score)] for d in found] for name, found in counted.items()}),
    )


def write_results(path: str | Path, rows: Iterable[ResultRow]) -> None:
    """The official results file, sorted by file name."""
    ordered = sorted(rows, key=lambda row: row["filename"])
    lines = [json.dumps({key: row[key] for key in ResultRow.__annotations__}) for row in ordered]
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


@dataclass(frozen=True)
class TaskScore:
    """`correct` of `images` show what their prompt asks for."""

    correct: int
    images: int

    @property
    def score(self) -> float:
        return self.correct / self.images


def score_tasks(verdicts: Iterable[tuple[str, bool]]) -> dict[str, TaskScore]:
    """(task, correct) of each image -> the score of each task, in the order of the benchmark."""
    found: dict[str, list[bool]] = {}
    for tag, correct in verdicts:
        found.setdefault(tag, []).append(bool(correct))
    order = [tag for tag in TASKS if tag in found] + [tag for tag in found if tag not in TASKS]
    return {tag: TaskScore(sum(found[tag]), len(found[tag])) for tag in order}


def overall_score(tasks: Mapping[str, TaskScore]) -> float:
    """The mean of the tasks' scores, each with equal weight whatever its number of images."""
    return statistics.fmean(task.score for task in tasks.values())


@dataclass(frozen=True)
class Summary:
    """The official summary; a prompt is correct if one of its images is. `str()` gives the official text."""

    images: int
    prompts: int
    correct_images: int
    correct_prompts: int
    tasks: dict[str, TaskScore]
    overall: float

    def __str__(self) -> str:
        lines = [
            "Summary",
            "=======",
            f"Total images: {self.images}",
            f"Total prompts: {self.prompts}",
            f"% correct images: {self.correct_images / self.images:.2%}",
            f"% correct prompts: {self.correct_prompts / self.prompts:.2%}",
            "",
            "Task breakdown",
            "==============",
            *(f"{tag:<16} = {task.score:.2%} ({task.correct} / {task.images})" for tag, task in self.tasks.items()),
            "",
            f"Overall score (avg. over tasks): {self.overall:.5f}",
        ]
        return "\n".join(lines)


def summary(rows: Sequence[ResultRow]) -> Summary:
    """The summary of `rows`; that they are complete is checked by `GenEval.compute`, not here."""
    if not rows:
        raise ValueError("There are no GenEval results to summarize.")
    prompts: dict[str, bool] = {}
    for row in rows:
        prompts[row["metadata"]] = prompts.get(row["metadata"], False) or row["correct"]
    tasks = score_tasks((row["tag"], row["correct"]) for row in rows)
    correct = sum(row["correct"] for row in rows)
    return Summary(len(rows), len(prompts), correct, sum(prompts.values()), tasks, overall_score(tasks))
