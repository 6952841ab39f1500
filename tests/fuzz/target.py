"""Target: a reader with a small valid input, and the list of all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.fuzz import mutations
from tests.fuzz.mutations import Tree

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Target:
    """A reader under attack.

    Args:
        make: writes a valid input into an empty folder.
        read: reads it, as the commands do.
        cost: milliseconds of an input; the short run reads as many as fit its time.
        reads: what may be opened: "inside" of the folder, what is "linked" there (a cache of the hub is made of links
            that lead out), or "anything" that the input names.
        named: a message names the file.
        apart: the files are inputs of their own.
    """

    name: str
    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    cost: float = 2
    reads: str = "linked"
    named: bool = True
    apart: bool = False

    @cached_property
    def valid(self) -> Tree:
        with tempfile.TemporaryDirectory() as folder:
            self.make(Path(folder))
            return mutations.read(Path(folder))

    @property
    def examples(self) -> list[Tree]:
        """The valid inputs, and those of the corpus."""
        valid = [{name: content} for name, content in self.valid.items()] if self.apart else [self.valid]
        return [*valid, *map(mutations.read, sorted((CORPUS / self.name).glob("*")))]


TARGETS: dict[str, Target] = {}


def target(make: Callable[[Path], Any], **settings: Any) -> Callable[[Callable], Callable]:
    """The function below is a reader, and its name the target's."""

    def add(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
        TARGETS[read.__name__] = Target(read.__name__, make, read, **settings)
        return read

    return add


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))
