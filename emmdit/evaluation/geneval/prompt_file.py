"""Reader of prompt files, with line-by-line validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emmdit.evaluation.geneval.prompts import RELATIONS, Line


def read_prompts(path: str | Path) -> list[Line]:
    """The lines of a .jsonl file (GenEval's metadata, or only {"prompt": ...}) or of a .txt file, one prompt per line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is invalid (with its number), the file is empty, or it has another suffix.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".jsonl", ".txt"):
        raise ValueError(f"The prompt file {path} must end in .jsonl or .txt.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no prompt file {path}.")
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # byte order mark
    lines = []
    for number, raw in enumerate(content.removesuffix(b"\n").split(b"\n") if content else (), 1):
        try:
            text = raw.decode("utf-8").strip()
            if not text:
                raise ValueError("it is empty")
            lines.append(_checked(json.loads(text)) if path.suffix == ".jsonl" else {"prompt": text})
        except UnicodeDecodeError:
            raise ValueError(f"{path}, line {number}: it is not UTF-8.") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: it is not JSON ({error}).") from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}.") from None
    if not lines:
        raise ValueError(f"The prompt file {path} is empty.")
    return lines


def _checked(line: Any) -> Line:
    if not isinstance(line, dict):
        raise ValueError('it is not a JSON object: write {"prompt": "..."}')
    if not isinstance(line.get("prompt"), str) or not line["prompt"].strip():
        raise ValueError('it has no "prompt" with text')
    if "tag" in line or "include" in line or "exclude" in line:
        check_metadata(line)
    return line


def check_metadata(line: dict[str, Any]) -> None:
    """Raise ValueError (a sentence without its period) unless GenEval can judge an image by `line`."""
    if not isinstance(line.get("tag"), str) or not line["tag"]:
        raise ValueError('it has no "tag", the name of its task')
    if not isinstance(line.get("include"), list) or not line["include"]:
        raise ValueError('it has no "include", a list of the objects asked for')
    exclude = line.get("exclude", [])
    if not isinstance(exclude, list):
        raise ValueError('its "exclude" is not a list')
    for where, clauses in (("include", line["include"]), ("exclude", exclude)):
        for place, clause in enumerate(clauses):
            _check_clause(clause, f'"{where}"[{place}]', place if where == "include" else None)


def _check_clause(clause: Any, where: str, place: int | None) -> None:
    if not isinstance(clause, dict) or not isinstance(clause.get("class"), str) or not clause["class"]:
        raise ValueError(f'{where} has no "class"')
    if not _is_int(clause.get("count")) or clause["count"] < 1:
        raise ValueError(f'{where} has no "count" of at least 1')
    if place is None:
        return
    if "color" in clause and not isinstance(clause["color"], str):
        raise ValueError(f'the "color" of {where} is not a string')
    if "position" in clause:
        position = clause["position"]
        if (
            not isinstance(position, list)
            or len(position) != 2
            or position[0] not in RELATIONS
            or not _is_int(position[1])
            or not 0 <= position[1] < place
        ):
            raise ValueError(
                f'the "position" of {where} is not [{" or ".join(RELATIONS)}, index of an earlier object in "include"]'
            )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
