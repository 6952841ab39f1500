"""Lines of a text file as rows: a list of prompts."""

from __future__ import annotations

import hashlib

from emmdit.data.readers.protocol import Rows, Source


class TextLines(Rows):
    """Column: `prompt`, one line of the file."""

    column_names = ["prompt"]

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    @classmethod
    def open(cls, source: Source) -> TextLines | None:
        if source.path.suffix != ".txt" or not source.path.is_file():
            return None
        return cls(source.path.read_text(encoding="utf-8").splitlines())

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"prompt": self.lines[index]}
