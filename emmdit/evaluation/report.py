"""Report of an evaluation: report.html, and a table for the terminal."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from emmdit.config_text import flatten_config
from emmdit.evaluation.pair_report import Table, pair_tables

Row = Mapping[str, Any]

THUMBNAIL = 192  # pixels: larger images are shrunk before they are embedded
SHOWN = 112  # pixels on the page
NO_SETTINGS = ("metrics", "ledger_metrics", "columns", "pair")
LOWER_IS_BETTER = ("fid", "kid", "cmmd")
PAIR_COLUMNS = {"teacher": "metrics", "difference": "difference", "ratio": "ratio"}
PAIR_TITLE = "Teacher (above) and student, from the same prompt and noise"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1040px; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid #999; } td { border-bottom: 1px solid #eee; }
.number { text-align: right; font-variant-numeric: tabular-nums; } .part { padding-left: 1.2rem; color: #555; }
.value { font-family: ui-monospace, monospace; font-size: 12px; overflow-wrap: anywhere; }
.strip { display: flex; flex-wrap: wrap; gap: .8rem; } figure { margin: 0; width: 112px; font-size: 12px; }
figure img, .missing { width: 112px; min-height: 112px; display: block; background: #eee; }
.small { image-rendering: pixelated; } .why { color: #a22; white-space: pre-line; } summary { cursor: pointer; }
"""


def write_report(folder: str | Path, result: Mapping[str, Any], rows: Sequence[Row], images: str | Path) -> Path:
    """Write `report.html`, which needs no other file; returns its path.

    Args:
        result: of the evaluation: "metrics" {name: value}, "columns" {heading: the same names of something else},
            "pair" (of a teacher, see `compare.py`); all else in it is listed as settings.
        rows: GenEval's result rows ("filename", "tag", "prompt", "correct", "reason"), with "clip_score" where the
            similarity of image and prompt is known: then it picks the images shown.
        images: folder that the file names lie in.
    """
    folder, images = Path(folder), Path(images)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    page.write_text(_html(folder, result, rows, images), encoding="utf-8")
    return page


def text_table(result: Mapping[str, Any]) -> str:
    """The metrics in aligned columns; parts of a metric are indented below it."""
    headings, table = metric_table(result)
    lines = [headings] + [["  " * part + name, *values] for name, part, values in table]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )


def metric_table(result: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, bool, list[str]]]]:
    """Headings, and for each metric its name, whether it is a part of the one above, and its values as text."""
    columns = {"this model": result["metrics"], **(result.get("columns") or {})}
    if "pair" in result:
        pair = {name: result["pair"][key] for name, key in PAIR_COLUMNS.items()}
        columns = {"student": columns.pop("this model"), **pair, **columns}
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    table, headline = [], None
    for name in names:
        part = headline is not None and name.startswith(f"{headline}_")
        if not part:
            headline = name
        shown = name.removeprefix(f"{headline}_") if part else name + _direction(name)
        table.append((shown, part, [_number(v.get(name), heading == "difference") for heading, v in columns.items()]))
    return ["metric", *columns], table


def pick(rows: Sequence[Row], correct: bool, n: int) -> list[Row]:
    """The `n` worst of the wrong images, or the best of the correct ones, of as many different prompts as possible.

    By the similarity to the prompt where every row has a "clip_score"; otherwise by the hash of the file name:
    arbitrary, but reproducible.
    """
    found = [row for row in rows if bool(row["correct"]) == correct]
    if ranked(rows):
        found.sort(key=lambda row: (-row["clip_score"] if correct else row["clip_score"], row["filename"]))
    else:
        found.sort(key=lambda row: hashlib.sha256(row["filename"].encode()).digest())
    seen: dict[str, int] = defaultdict(int)
    rounds = []
    for row in found:
        rounds.append(seen[row["prompt"]])
        seen[row["prompt"]] += 1
    order = sorted(range(len(found)), key=rounds.__getitem__)  # stable: the first of every prompt, then the second
    return [found[i] for i in order[:n]]


def ranked(rows: Sequence[Row]) -> bool:
    """Whether every image has a CLIP score."""
    return all(isinstance(row.get("clip_score"), int | float) for row in rows)


def by_task(rows: Sequence[Row]) -> dict[str, list[Row]]:
    tasks: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["filename"]):  # prompts of a task follow each other in GenEval's files
        tasks.setdefault(row["tag"], []).append(row)
    return tasks


def flatten(settings: Mapping[str, Any]) -> dict[str, str]:
    """{"sampling.steps": "20", ...}; lists and empty values as JSON."""
    flat = flatten_config(settings)
    return {key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in flat.items()}


# -- HTML --------------------------------------------------------------------------------------------


def _html(folder: Path, result: Mapping[str, Any], rows: Sequence[Row], images: Path, n: int = 8) -> str:
    e = html.escape
    body = [f"<h1>{e(_title(result))}</h1>", *_html_table(*metric_table(result))]
    if "pair" in result:
        figures = "".join(_pair_figure(row, folder) for row in result["pair"]["shown"])
        body += [f"<h2>{e(PAIR_TITLE)}</h2>", f'<div class="strip">{figures}</div>']
        for title, note, headings, table in pair_tables(result["pair"]):
            body += [f"<h2>{e(title)}</h2>", f"<p>{e(note)}</p>", *_html_table(headings, table)]
    for task, of_task in by_task(rows).items():
        body.append(f"<h2>{e(_task_line(task, of_task))}</h2>")
        for correct in (False, True):
            body.append(f"<h3>{e(_strip_title(of_task, correct))}</h3>")
            chosen = pick(of_task, correct, n)
            figures = "".join(_figure(row, images) for row in chosen)
            body.append(f'<div class="strip">{figures}</div>' if chosen else "<p>None.</p>")
    body.append("<details open><summary><b>How it was made</b></summary><table>")
    for key, value in _settings(result).items():
        body.append(f'<tr><td>{e(key)}</td><td class="value">{e(value)}</td></tr>')
    body.append("</table></details>")
    head = f'<meta charset="utf-8"><title>{e(_title(result))}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _html_table(headings: Sequence[str], rows: Table) -> list[str]:
    e = html.escape
    numbers = "".join(f'<th class="number">{e(h)}</th>' for h in headings[1:])
    lines = [f"<table><tr><th>{e(headings[0])}</th>{numbers}</tr>"]
    for name, part, values in rows:
        cells = "".join(f'<td class="number">{e(v)}</td>' for v in values)
        first = '<td class="part">' if part else "<td>"
        lines.append(f"<tr>{first}{e(name)}</td>{cells}</tr>")
    return [*lines, "</table>"]


def _pair_figure(row: Row, folder: Path) -> str:
    images = "".join(_embedded(folder / row[name], f"{name}: {row['prompt']}") for name in ("teacher", "student"))
    return f"<figure>{images}<figcaption>{html.escape(row['prompt'])}</figcaption></figure>"


def _embedded(path: Path, alt: str) -> str:
    found = _thumbnail(path)
    if found is None:
        return '<div class="missing">image missing</div>'
    uri, small = found
    return f'<img class="{"small" if small else "large"}" src="{uri}" alt="{html.escape(alt)}">'


def _figure(row: Row, images: Path) -> str:
    image = _embedded(images / row["filename"], row["prompt"])
    score = f" ({row['clip_score']:.3g})" if isinstance(row.get("clip_score"), int | float) else ""
    why = "" if row["correct"] else f'<div class="why">{html.escape(row["reason"])}</div>'
    return f"<figure>{image}<figcaption>{html.escape(row['prompt'])}{score}{why}</figcaption></figure>"


def _thumbnail(path: Path) -> tuple[str, bool] | None:
    """A PNG as data URI and whether it is shown enlarged; None where there is no image."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except (OSError, UnidentifiedImageError):  # one broken image must not lose the report
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}", image.width < SHOWN


# -- text --------------------------------------------------------------------------------------------


def _title(result: Mapping[str, Any]) -> str:
    source = result.get("source") or ""
    if isinstance(source, Mapping):
        source = next((source[key] for key in ("source", "checkpoint", "ckpt") if source.get(key)), "")
    beside = f" beside {result['pair']['teacher']['source']}" if "pair" in result else ""
    return f"Evaluation of {source}{beside}" if source else "Evaluation"


def _settings(result: Mapping[str, Any]) -> dict[str, str]:
    teacher = {"teacher": result["pair"]["teacher"]} if "pair" in result else {}
    return flatten({key: value for key, value in result.items() if key not in NO_SETTINGS} | teacher)


def _task_line(task: str, rows: Sequence[Row]) -> str:
    right = sum(bool(row["correct"]) for row in rows)
    return f"{task.replace('_', ' ')}: {right:,} of {len(rows):,} correct ({right / len(rows):.1%})"


def _strip_title(rows: Sequence[Row], correct: bool) -> str:
    title = "Judged correct" if correct else "Judged wrong"
    how = "most similar to their prompt" if correct else "least similar to their prompt"
    return f"{title}, {how} by CLIP" if ranked(rows) else f"{title}, arbitrary choice"


def _direction(name: str) -> str:
    """A note on metrics that are better when lower."""
    return " (lower is better)" if name.split("_")[0] in LOWER_IS_BETTER else ""


def _number(value: Any, sign: bool = False) -> str:
    if value is None:
        return ""
    plus = "+" if sign else ""
    return f"{value:{plus}.3f}" if 1e-3 <= abs(value) < 1e3 or value == 0 else f"{value:{plus}.3g}"
