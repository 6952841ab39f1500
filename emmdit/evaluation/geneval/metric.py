"""The GenEval metric of a set of images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from emmdit.evaluation.geneval.detectors import Detector
from emmdit.evaluation.geneval.judge import (
    COUNTING_SCORE_THRESHOLD,
    MAX_PER_CLASS,
    POSITION_SLACK,
    SCORE_THRESHOLD,
    judge,
)
from emmdit.evaluation.geneval.prompt_file import check_metadata
from emmdit.evaluation.geneval.results import Row, by_task, result_row
from emmdit.evaluation.metrics.base import ImageMetric, Sample

_MISSING, _WRONG, _CORRECT = 0, 1, 2


class GenEval(ImageMetric):
    """Share of images that show what their prompt asks for: for each task, and as headline the mean over tasks.

    Prompts whose line has `"unseen": true` (compositions held out of training) are scored apart, as the part `unseen`:
    the mean over the tasks that they have.

    `begin` announces the images of the set; `compute` raises while one of them is missing. `rows` are the results of
    the images that this process judged, with reasons and detections.
    """

    kind = "geneval"
    verdicts: Tensor

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector
        self.rows: list[Row] = []
        self._samples: list[Sample] = []
        self._places: dict[tuple[int, int], int] = {}
        self.begin([])

    @property
    def name(self) -> str:
        return f"geneval_{self.detector.name}"

    def begin(self, samples: Sequence[Sample]) -> None:
        """Announce the images of the whole set, over all processes.

        Raises:
            ValueError: a prompt cannot be judged, with its index.
        """
        for index, line in {sample.index: sample.line for sample in samples}.items():
            try:
                self._check(line)
            except ValueError as error:
                raise ValueError(f"GenEval cannot judge prompt {index} ({line.get('prompt')!r}): {error}.") from None
        self._samples = list(samples)
        self._places = {(sample.index, sample.number): i for i, sample in enumerate(samples)}
        # One number per image, reduced by the maximum: a process may have any number of images, none, or the same
        # ones as another.
        default = torch.full((len(samples),), _MISSING, dtype=torch.int8, device=self.device)
        self.add_state("verdicts", default, dist_reduce_fx="max")
        self.reset()

    def _check(self, line: Any) -> None:
        check_metadata(line)
        for clause in [*line["include"], *line.get("exclude", ())]:
            unknown = [clause["class"]] if clause["class"] not in self.detector.classes else []
            unknown += [c for c in (clause.get("color"),) if c not in (None, *self.detector.color_names)]
            if unknown:
                raise ValueError(f"the detector '{self.detector.name}' does not know '{unknown[0]}', use another")

    def prepare(self, device: torch.device | str = "cpu") -> None:
        self.detector.prepare(device)

    def reset(self) -> None:
        super().reset()
        self.rows = []

    def update(self, images: Tensor, samples: list[Sample]) -> None:
        for image, sample, detections in zip(images, samples, self.detector(images), strict=True):
            place = self._places.get((sample.index, sample.number))
            if place is None:
                raise ValueError(f"{sample.path} is not an image of the set announced to GenEval: call begin first.")
            verdict = judge(sample.line, detections, partial(self.detector.colors, image))
            self.verdicts[place] = _CORRECT if verdict.correct else _WRONG
            self.rows.append(result_row(sample.path, sample.line, verdict, detections))

    def compute(self) -> dict[str, float]:
        """{"": mean over tasks, task: share of correct images}; the same of unseen prompts as "unseen", "unseen_TASK".

        Raises:
            ValueError: images of the set are missing, with their count and the first few.
        """
        verdicts = self.verdicts.tolist()
        if not verdicts:
            raise ValueError("GenEval has no images to score: call begin with the samples of the set.")
        judged = list(zip(self._samples, verdicts, strict=True))
        if missing := [sample for sample, verdict in judged if verdict == _MISSING]:
            prompts = len({sample.index for sample in missing})
            first = ", ".join(f"{sample.path} ({sample.line['prompt']!r})" for sample in missing[:3])
            raise ValueError(
                f"GenEval lacks {len(missing)} of {len(judged)} images, of {prompts} prompts: {first}"
                f"{', ...' if len(missing) > 3 else ''}; generate them first."
            )
        scores: dict[str, float] = {}
        for unseen, headline in ((False, ""), (True, "unseen")):
            found = [(s.line["tag"], v == _CORRECT) for s, v in judged if bool(s.line.get("unseen")) == unseen]
            tasks = {tag: fmean(correct) for tag, correct in by_task(found).items()}
            if tasks:
                scores[headline] = fmean(tasks.values())
                scores |= {f"{headline}_{tag}".lstrip("_"): score for tag, score in tasks.items()}
        return scores

    def settings(self) -> dict[str, Any]:
        return {
            **self.detector.settings(),
            "threshold": SCORE_THRESHOLD,
            "counting_threshold": COUNTING_SCORE_THRESHOLD,
            "max_objects": MAX_PER_CLASS,
            "position_threshold": POSITION_SLACK,
        }
