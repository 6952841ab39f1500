"""What is asked of a model in an evaluation: an ordered set of prompts, with images and seeds for each."""

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
        images: made for each prompt.
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
        """Of the prompts as JSON lines: two evaluations with the same hash asked for the same."""
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        return hashlib.sha256(text.encode()).hexdigest()

    def samples(self, seed: int = 0) -> list[Sample]:
        """Every image to make. Its seed is a function of its place and of `seed`; no two evaluations share one."""
        first = seed * len(self.lines) * self.images
        return [
            Sample(index, number, line, first + index * self.images + number)
            for index, line in enumerate(self.lines)
            for number in range(self.images)
        ]

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sha256": self.sha256,
            "prompts": len(self.lines),
            "images_per_prompt": self.images,
        }


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
    """Prompts from a text file, one a line, or from a .jsonl of GenEval lines."""

    def __init__(self, path: str, images: int = 1, count: int | None = None) -> None:
        super().__init__(images)
        self.path, self.count = path, count
        self.name = path.rsplit("/", 1)[-1].rsplit(".", 1)[0]

    def load(self) -> list[dict[str, Any]]:
        from emmdit.evaluation.geneval import read_prompts

        return _cut(read_prompts(self.path), self.count, self.path)


class HubPrompts(PromptSet):
    """Captions of a `datasets` source (hub id, parquet, folder), in a fixed random order.

    Args:
        source, split, revision: as `datamodules.HubDataModule` takes them.
        column: of the captions; a list in it gives its first.
        count: how many; FID-30K takes 30,000.
        seed: of the order.
    """

    def __init__(
        self,
        source: str,
        column: str = "caption",
        split: str = "train",
        count: int | None = 30_000,
        seed: int = 0,
        revision: str | None = None,
        images: int = 1,
    ) -> None:
        super().__init__(images)
        self.source, self.column, self.split, self.revision = source, column, split, revision
        self.count, self.seed = count, seed
        self.name = source.rstrip("/").rsplit("/", 1)[-1].removesuffix(".parquet")

    def load(self) -> list[dict[str, Any]]:
        from emmdit.data.readers.open import open_source

        rows = open_source(self.source, self.split, revision=self.revision)
        if self.column not in rows.column_names:
            raise ValueError(
                f"'{self.source}' has no column '{self.column}': set column to one of {', '.join(rows.column_names)}."
            )
        captions = rows.select_columns([self.column]).table.shuffle(seed=self.seed)
        count = len(captions) if self.count is None else self.count
        if count > len(captions):
            raise ValueError(
                f"'{self.source}' has {len(captions)} captions, fewer than the {count} asked for: set count."
            )
        chosen = captions.select(range(count))[self.column]
        return [{"prompt": caption[0] if isinstance(caption, list) else caption} for caption in chosen]


def _cut(lines: list[dict[str, Any]], count: int | None, source: str) -> list[dict[str, Any]]:
    if count is not None and count > len(lines):
        raise ValueError(f"{source} has {len(lines)} prompts, fewer than the {count} asked for: set count.")
    return lines[:count]
