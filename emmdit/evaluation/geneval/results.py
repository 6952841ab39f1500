"""GenEval's results: a row for each image with the official columns, their file, and the summary."""

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
    """One image. `metadata` and `details` are JSON texts: the prompt's line, and {class: [[x1, y1, x2, y2, score]]}
    of the objects that counted."""

    filename: str  # within the set's folder
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
    lines = [json.dumps({key: row[key] for key in ResultRow.__annotations__}) for row in _sorted(rows)]
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_results(path: str | Path) -> list[ResultRow]:
    """Rows of a results file, ours or the official tool's.

    Raises:
        ValueError: a line is none, with its number.
    """
    rows = []
    for number, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(text)
            rows.append(ResultRow(**{key: row[key] for key in ResultRow.__annotations__}))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: this is no row of GenEval results ({error!r}).") from None
    return _sorted(rows)


def _sorted(rows: Iterable[ResultRow]) -> list[ResultRow]:
    return sorted(rows, key=lambda row: row["filename"])


@dataclass(frozen=True)
class TaskScore:
    """`correct` of `images` show what their prompt asks for."""

    correct: int
    images: int

    @property
    def score(self) -> float:
        return self.correct / self.images


def score_tasks(verdicts: Iterable[tuple[str, bool]]) -> dict[str, TaskScore]:
    """(task, correct) of each image -> the score of each task, in the benchmark's order."""
    found: dict[str, list[bool]] = {}
    for tag, correct in verdicts:
        found.setdefault(tag, []).append(bool(correct))
    order = [tag for tag in TASKS if tag in found] + [tag for tag in found if tag not in TASKS]
    return {tag: TaskScore(sum(found[tag]), len(found[tag])) for tag in order}


def overall_score(tasks: Mapping[str, TaskScore]) -> float:
    """The mean of the tasks' scores, each weighing the same whatever its number of images."""
    return statistics.fmean(task.score for task in tasks.values())


@dataclass(frozen=True)
class Summary:
    """The official summary. A prompt is correct if one of its images is. `str()` gives the official text."""

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
    """Of the rows there are. Whether they are all that were asked for is not known here: `GenEval` checks that."""
    if not rows:
        raise ValueError("There are no GenEval results to sum up.")
    prompts: dict[str, bool] = {}
    for row in rows:
        prompts[row["metadata"]] = prompts.get(row["metadata"], False) or row["correct"]
    tasks = score_tasks((row["tag"], row["correct"]) for row in rows)
    correct = sum(row["correct"] for row in rows)
    return Summary(len(rows), len(prompts), correct, sum(prompts.values()), tasks, overall_score(tasks))
