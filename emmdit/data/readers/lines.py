"""Lines of a text file as rows: a list of prompts."""

from __future__ import annotations

import hashlib

from emmdit.data.images import MAX_TEXT
from emmdit.data.readers.protocol import Rows, Source
from emmdit.files import first_line, read_bytes

MAX_FILE = 1 << 31  # bytes: some ten million prompts


class TextLines(Rows):
    """Column: `prompt`, one line of the file."""

    column_names = ["prompt"]

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    @classmethod
    def open(cls, source: Source) -> TextLines | None:
        if source.path.suffix != ".txt" or not source.path.is_file():
            return None
        try:
            lines = read_bytes(source.path, MAX_FILE).decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"'{source.name}' is not UTF-8 text ({first_line(error)}): convert it.") from error
        for number, line in enumerate(lines, 1):
            if len(line) > MAX_TEXT:
                raise ValueError(f"'{source.name}', line {number} has more than {MAX_TEXT:,} characters: no prompt is.")
        return cls(lines)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"prompt": self.lines[index]}
