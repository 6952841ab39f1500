"""Reader of prompt files, with line-by-line validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emmdit.evaluation.geneval.prompts import RELATIONS, Line
from emmdit.files import parse_json, read_bytes

MAX_FILE = 1 << 30  # bytes


def read_prompts(path: str | Path) -> list[Line]:
    """The lines of a .jsonl file (GenEval's metadata, or only {"prompt": ...}) or of a .txt file, one prompt per line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is empty or invalid (with its number), or the file has another suffix.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".jsonl", ".txt"):
        raise ValueError(f"The prompt file {path} must end in .jsonl or .txt.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no prompt file {path}.")
    content = read_bytes(path, MAX_FILE).removeprefix(b"\xef\xbb\xbf")  # byte order mark
    lines = []
    for number, raw in enumerate(content.removesuffix(b"\n").split(b"\n"), 1):
        try:
            text = raw.decode("utf-8").strip()
            _require(text, "it is empty")
            lines.append(_checked(parse_json(text)) if path.suffix == ".jsonl" else {"prompt": text})
        except ValueError as error:
            why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
            raise ValueError(f"{path}, line {number}: {why}.") from None
    return lines


def _checked(line: Any) -> Line:
    _require(isinstance(line, dict), 'it is not a JSON object: write {"prompt": "..."}')
    _require(isinstance(line.get("prompt"), str) and line["prompt"].strip(), 'it has no "prompt" with text')
    if "tag" in line or "include" in line or "exclude" in line:
        check_metadata(line)
    return line


def check_metadata(line: dict[str, Any]) -> None:
    """Raise ValueError (a sentence without its period) unless GenEval can judge an image by `line`."""
    include, exclude = line.get("include"), line.get("exclude", [])
    _require(isinstance(line.get("tag"), str) and line["tag"], 'it has no "tag", the name of its task')
    _require(isinstance(include, list) and include, 'it has no "include", a list of the objects asked for')
    _require(isinstance(exclude, list), 'its "exclude" is not a list')
    for name, clauses in (("include", include), ("exclude", exclude)):
        for place, clause in enumerate(clauses):
            _check_clause(clause, f'"{name}"[{place}]', place)


def _check_clause(clause: Any, where: str, place: int) -> None:
    _require(
        isinstance(clause, dict) and isinstance(clause.get("class"), str) and clause["class"], f'{where} has no "class"'
    )
    # bool is a subclass of int
    _require(type(clause.get("count")) is int and clause["count"] > 0, f'{where} has no "count" of at least 1')
    _require(isinstance(clause.get("color", ""), str), f'the "color" of {where} is not a string')
    if "position" in clause:
        match clause["position"]:
            case [relation, target] if relation in RELATIONS and type(target) is int and 0 <= target < place:
                return
        ways = " or ".join(RELATIONS)
        raise ValueError(f'the "position" of {where} is not [{ways}, index of an earlier object in "include"]')


def _require(holds: Any, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
