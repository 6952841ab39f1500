"""Prompt sets: ordered prompts, with the number of images and the seeds of each."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

from emmdit.evaluation.metrics.base import Sample


class PromptSet(ABC):
    """An ordered set of prompts, each a dict with at least "prompt"; the same arguments give the same set.

    Args:
        images: images per prompt.
    """

    name: str

    def __init__(self, images: int = 1) -> None:
        if images < 1:
            raise ValueError(f"{type(self).__name__} needs at least one image for each prompt, got images={images}.")
        self.images = images

    @abstractmethod
    def load(self) -> list[dict[str, Any]]:
        """The prompts, in order."""

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        lines = self.load()
        if not lines:
            raise ValueError(f"The prompt set '{self.name}' is empty.")
        return lines

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the prompts as JSON lines: equal hashes mean equal prompts."""
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        return hashlib.sha256(text.encode()).hexdigest()

    def samples(self, seed: int = 0) -> list[Sample]:
        """Every image to generate. Its seed depends on its place and on `seed`; no two evaluations share one."""
        first = seed * len(self.lines) * self.images
        return [
            Sample(index, number, line, first + index * self.images + number)
            for index, line in enumerate(self.lines)
            for number in range(self.images)
        ]

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.sha256, "prompts": len(self.lines), "images_per_prompt": self.images}


class GenEvalPrompts(PromptSet):
    """The official 553 prompts of GenEval; `first` takes only so many of each task (a smoke test, not a score)."""

    name = "geneval"

    def __init__(self, images: int = 4, first: int | None = None) -> None:
        super().__init__(images)
        self.first = first
        if first is not None:
            self.name = f"geneval_first{first}"

    def load(self) -> list[dict[str, Any]]:
        from emmdit.evaluation.geneval import official_prompts

        taken: dict[str, int] = {}
        lines = []
        for line in official_prompts():
            taken[line["tag"]] = taken.get(line["tag"], 0) + 1
            if self.first is None or taken[line["tag"]] <= self.first:
                lines.append(line)
        return lines


class PromptFile(PromptSet):
    """Prompts of a text file, one per line, or of a .jsonl of GenEval lines; with `count` only the first ones."""

    def __init__(self, path: str, images: int = 1, count: int | None = None) -> None:
        super().__init__(images)
        self.path, self.count = path, count
        self.name = path.rsplit("/", 1)[-1].rsplit(".", 1)[0]

    def load(self) -> list[dict[str, Any]]:
        from emmdit.evaluation.geneval import read_prompts

        lines = read_prompts(self.path)
        if self.count is not None and self.count > len(lines):
            raise ValueError(f"{self.path} has {len(lines)} prompts, fewer than count ({self.count}): lower count.")
        return lines[: self.count]
