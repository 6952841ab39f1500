"""Report of an evaluation: report.html, and a table for the terminal."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from PIL import Image, UnidentifiedImageError

from emmdit.config_text import flatten_config
from emmdit.files import atomic_path

Row = Mapping[str, Any]
Table = list[tuple[str, bool, list[str]]]  # first cell, whether it is part of the one above, other cells

THUMBNAIL = 192  # pixels: larger images are shrunk before they are embedded
SHOWN = 112  # pixels on the page
STRIP = 8  # images of a task that were judged wrong, and as many judged correct
NO_SETTINGS = ("metrics", "ledger_metrics", "columns", "pair")
LOWER_IS_BETTER = ("fid", "kid", "cmmd")
PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
{% macro table(headings, rows) %}
<table><tr>{% for text in headings %}<th{{ "" if loop.first else number }}>{{ text }}</th>{% endfor %}</tr>
{% for name, part, values in rows %}
<tr><td{{ ' class="part"'|safe if part }}>{{ name }}</td>
{%- for value in values %}<td{{ number }}>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endmacro %}
{% macro image(path, alt) %}
{% set uri, kind = thumbnail(path) %}
{% if uri %}<img class="{{ kind }}" src="{{ uri }}" alt="{{ alt }}">
{% else %}<div class="missing">image missing</div>
{% endif %}
{% endmacro %}
{% set number = ' class="number"'|safe %}
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1040px; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid #999; } td { border-bottom: 1px solid #eee; }
.number { text-align: right; font-variant-numeric: tabular-nums; } .part { padding-left: 1.2rem; color: #555; }
.value { font-family: ui-monospace, monospace; font-size: 12px; overflow-wrap: anywhere; }
.strip { display: flex; flex-wrap: wrap; gap: .8rem; } figure { margin: 0; width: 112px; font-size: 12px; }
figure img, .missing { width: 112px; min-height: 112px; display: block; background: #eee; }
.small { image-rendering: pixelated; } .why { color: #a22; white-space: pre-line; } summary { cursor: pointer; }
</style></head><body>
<h1>{{ title }}</h1>
{{ table(headings, metrics) }}
{% if pair %}
<h2>Teacher (above) and student, from the same prompt and noise</h2>
<div class="strip">
{% for row in pair.shown %}
<figure>{% for name in ("teacher", "student") %}{{ image(folder / row[name], name ~ ": " ~ row.prompt) }}{% endfor %}
<figcaption>{{ row.prompt }}</figcaption></figure>
{% endfor %}
</div>
{% for title, note, headings, rows in pair_tables %}
<h2>{{ title }}</h2><p>{{ note }}</p>
{{ table(headings, rows) }}
{% endfor %}
{% endif %}
{% for heading, strips in tasks %}
<h2>{{ heading }}</h2>
{% for title, rows in strips %}
<h3>{{ title }}</h3>
{% if rows %}<div class="strip">{% else %}<p>None.</p>{% endif %}
{% for row in rows %}
<figure>{{ image(images / row.filename, row.prompt) }}
<figcaption>{{ row.prompt }}{{ " (%.3g)" % row.clip_score if row.clip_score is number }}
{%- if not row.correct %}<div class="why">{{ row.reason }}</div>{% endif %}</figcaption></figure>
{% endfor %}
{% if rows %}</div>{% endif %}
{% endfor %}
{% endfor %}
<details open><summary><b>How it was made</b></summary><table>
{% for key, value in settings.items() %}
<tr><td>{{ key }}</td><td class="value">{{ value }}</td></tr>
{% endfor %}
</table></details>
</body></html>
""")


def write_report(folder: str | Path, result: Mapping[str, Any], rows: Sequence[Row], images: str | Path) -> Path:
    """Write `report.html`, which needs no other file; returns its path.

    Args:
        result: of the evaluation: "metrics" {name: value}, "columns" {heading: the same names of something else},
            "pair" (of a teacher, see `compare.py`); all else in it is listed as settings.
        rows: GenEval's result rows ("filename", "tag", "prompt", "correct", "reason"), with "clip_score" where the
            similarity of image and prompt is known: then it picks the images shown.
        images: folder that the file names lie in.
    """
    folder, pair = Path(folder), result.get("pair")
    source = result.get("source", {}).get("source", "")
    settings = {key: value for key, value in result.items() if key not in NO_SETTINGS}
    headings, metrics = metric_table(result)
    tasks: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["filename"]):
        tasks[row["tag"] + (", unseen" if row.get("unseen") else "")].append(row)
    text = PAGE.render(
        title=f"Evaluation of {source}" + (f" beside {pair['teacher']['source']}" if pair else ""),
        headings=headings,
        metrics=metrics,
        pair=pair,
        pair_tables=[_features(pair["features"]), _latency(pair["latency"])] if pair else [],
        tasks=[_task(tag, of_task) for tag, of_task in tasks.items()],
        settings=flatten(settings | ({"teacher": pair["teacher"]} if pair else {})),
        thumbnail=_thumbnail,
        folder=folder,
        images=Path(images),
    )
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    with atomic_path(page) as part:
        part.write_text(text, encoding="utf-8")
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


def metric_table(result: Mapping[str, Any]) -> tuple[list[str], Table]:
    """Headings, and the row of each metric."""
    columns = {"this model": result["metrics"], **(result.get("columns") or {})}
    if pair := result.get("pair"):
        beside = {"teacher": pair["metrics"], "difference": pair["difference"], "ratio": pair["ratio"]}
        columns = {"student": columns.pop("this model"), **beside, **columns}
    table: Table = []
    headline = None
    for name in dict.fromkeys(name for values in columns.values() for name in values):
        part = headline is not None and name.startswith(f"{headline}_")
        if part:
            shown = name.removeprefix(f"{headline}_")
        else:
            headline = name
            shown = name + (" (lower is better)" if name.split("_")[0] in LOWER_IS_BETTER else "")
        table.append((shown, part, [_number(v.get(name), heading == "difference") for heading, v in columns.items()]))
    return ["metric", *columns], table


def _number(value: float | None, sign: bool = False) -> str:
    if value is None:
        return ""
    plus = "+" if sign else ""
    return f"{value:{plus}.3f}" if 1e-3 <= abs(value) < 1e3 or value == 0 else f"{value:{plus}.3g}"


def flatten(settings: Mapping[str, Any]) -> dict[str, str]:
    """{"sampling.steps": "20", ...}; lists and empty values as JSON."""
    flat = flatten_config(settings)
    return {key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in flat.items()}


# -- a student beside its teacher ------------------------------------------------------------------------


def _features(errors: Mapping[str, Any]) -> tuple[str, str, list[str], Table]:
    """Title, note, headings and rows of the table of `pair["features"]`."""
    note = (
        "Relative L2 error |student - teacher| / |teacher| of each attention layer's output and of the prediction, "
        "both networks on the inputs of the teacher's own sampling; by timestep (1000 is noise)."
    )
    rows = [("prediction", False, errors["prediction"])]
    for layer, values in errors["image"].items():
        rows.append((layer, False, values))
        if layer in errors["prompt"]:
            rows.append(("prompt tokens", True, errors["prompt"][layer]))
    table = [(name, part, [f"{v:.3f}" for v in [*values, sum(values) / len(values)]]) for name, part, values in rows]
    return "Error of each layer", note, ["layer", *(f"t = {t:.0f}" for t in errors["timesteps"]), "mean"], table


def _latency(times: Mapping[str, Any]) -> tuple[str, str, list[str], Table]:
    """The same of `pair["latency"]`."""
    note = (
        f"One call of the network on latents {' x '.join(map(str, times['latents']))}, both in turn in one process, "
        f"median of {times['rounds']} rounds. Teacher's time / student's: {times['speedup']:.2f}."
    )
    columns = {"ms": "ms", "ms_low": "fastest round", "ms_high": "slowest", "parameters": "parameters"}
    if "peak_memory_mib" in times["student"]:
        columns["peak_memory_mib"] = "peak MiB beyond the weights"
    cells = {name: [times[name][key] for key in columns] for name in ("student", "teacher")}
    table = [
        (name, False, [f"{v:,}" if isinstance(v, int) else f"{v:.4g}" for v in row]) for name, row in cells.items()
    ]
    return "Latency", note, ["network", *columns.values()], table


# -- images ----------------------------------------------------------------------------------------------


def _task(tag: str, rows: list[Row]) -> tuple[str, list[tuple[str, list[Row]]]]:
    """Heading of a GenEval task, and its two strips of images with their titles."""
    right = sum(bool(row["correct"]) for row in rows)
    heading = f"{tag.replace('_', ' ')}: {right:,} of {len(rows):,} correct ({right / len(rows):.1%})"
    how = "{} similar to their prompt by CLIP" if ranked(rows) else "arbitrary choice"
    wrong = "Judged wrong, " + how.format("least"), pick(rows, False, STRIP)
    return heading, [wrong, ("Judged correct, " + how.format("most"), pick(rows, True, STRIP))]


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
    seen: Counter[str] = Counter()
    rounds = []
    for row in found:
        rounds.append((seen[row["prompt"]], len(rounds)))
        seen[row["prompt"]] += 1
    return [found[place] for _, place in sorted(rounds)[:n]]  # the first of every prompt, then the second


def ranked(rows: Sequence[Row]) -> bool:
    """Whether every image has a CLIP score."""
    return all(isinstance(row.get("clip_score"), int | float) for row in rows)


def _thumbnail(path: Path) -> tuple[str, str]:
    """A PNG as data URI, "" where there is no image; and its class: small ones are shown enlarged."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except (OSError, UnidentifiedImageError):  # one broken image must not lose the report
        return "", ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return uri, "small" if image.width < SHOWN else "large"
