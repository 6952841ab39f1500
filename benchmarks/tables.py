"""Renders the tables of the docs from the ledger: whatever stands between `<!-- table:NAME -->` and `<!-- end -->`.

    python -m benchmarks.tables            # after new rows in benchmarks/results/shapes.json
    python -m benchmarks.tables --check    # exit status 1 if a page is out of date (a test does this)

`<!-- table:NAME bare -->` leaves out the lines below the table (settings, commits, hardware). Rows and labels are those
of `experiments/sweeps/`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.common import ROOT, markdown_table, progress, write_json
from benchmarks.sweep import LEDGER, Sweep
from emmdit.evaluation import ledger
from emmdit.evaluation.geneval import TASKS
from emmdit.evaluation.report import flatten
from emmdit.provenance import machine, machine_line

ABLATION, STUDENTS = (Sweep(ROOT / f"experiments/sweeps/{name}.yaml") for name in ("ablation", "students"))
SCORES = {"geneval_overall": "GenEval", "clip_score": "CLIP score", "fid_clip": "FID-CLIP (lower is better)"}
COLOR, LOSS = {"asked_color": "asked color"}, {"val_loss": "validation loss"}
STEP_TIME = "benchmarks/results/shapes_step_time.json"
EMPTY = ("No rows yet.", "")
MAY_DIFFER = ("sha256", "source", "device", "batch_size")  # settings of a row alone: its weights, say
WORDS = {
    "train.steps": "optimizer steps",
    "prompts.name": "prompt set",
    "prompts.sha256": "sha256",
    "prompts.prompts": "prompts",
    "prompts.images_per_prompt": "images each",
    "sampling.steps": "sampling steps",
}
SCHEDULES = {"nitro": "flow_match_euler"}  # what rows before the renaming say as sampling.grid
Row = dict[str, Any]
Table = tuple[str, str]  # the table, and the notes below it


# -- numbers -----------------------------------------------------------------------------------------


def values(rows: Iterable[Row], metric: str) -> dict[int, list[float]]:
    """{training seed: a value for each evaluation seed} of one experiment."""
    found: dict[int, list[float]] = {}
    for row in rows:
        train = row.get("train") or {}
        own = row["metrics"] | {"val_loss": train.get("val_loss_ema", train.get("val_loss"))}
        if own.get(metric) is not None:
            found.setdefault(row["seed"], []).append(own[metric])
    return found


def spread(by_seed: Mapping[int, Sequence[float]]) -> tuple[float, float | None] | None:
    """Mean and sample standard deviation over training seeds; over evaluation seeds where there is one training."""
    if not by_seed:
        return None
    numbers = [mean(v) for v in by_seed.values()] if len(by_seed) > 1 else list(next(iter(by_seed.values())))
    return mean(numbers), stdev(numbers) if len(numbers) > 1 else None


def against(
    rows: list[Row], others: list[Row], metric: str, compare: Callable[[float, float], float] = lambda a, b: a - b
) -> tuple[float, float | None] | None:
    """Mean and standard deviation of rows against others, at the same evaluation seed, and the same training seed where
    the others have it (a teacher has one for all): runs of a seed share the order of data and noise."""
    by_seeds = {(row["seed"], row.get("eval_seed", 0)): row["metrics"].get(metric) for row in others}
    single = len({row["seed"] for row in others}) == 1 < len({row["seed"] for row in rows})
    found: dict[int, list[float]] = {}
    for row in rows:
        seed = others[0]["seed"] if single else row["seed"]
        own, other = row["metrics"].get(metric), by_seeds.get((seed, row.get("eval_seed", 0)))
        if own is not None and other is not None:
            found.setdefault(row["seed"], []).append(compare(own, other))
    return spread(found)


def shown(value: tuple[float, float | None] | None, sign: bool = False) -> str:
    if value is None:
        return ""
    digits = 3 if abs(value[0]) < 10 else 2
    text = f"{value[0]:{'+' if sign else ''}.{digits}f}"
    return text if value[1] is None else f"{text} ± {value[1]:.{digits}f}"


def by_experiment(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["experiment"], []).append(row)
    return found


def best_first(found: Mapping[str, list[Row]]) -> list[str]:
    return sorted(found, key=lambda name: (-(spread(values(found[name], "geneval_overall")) or (-1, 0))[0], name))


# -- tables ------------------------------------------------------------------------------------------


def cells(name: str, label: str, rows: list[Row]) -> dict[str, Any]:
    """All that a table may show of an experiment."""
    seeds, evaluations = {row["seed"] for row in rows}, {row.get("eval_seed", 0) for row in rows}
    steps = sorted({row["train"]["steps"] for row in rows if (row.get("train") or {}).get("steps")})
    timed = all(row.get("train_seconds") for row in rows)
    metrics = (*(f"geneval_{task}" for task in TASKS), *SCORES, *COLOR, *LOSS)
    return {
        "row": label,
        "yaml": f"`{name}`",
        **{metric: shown(spread(values(rows, metric))) for metric in metrics},
        "steps": " / ".join(f"{s:,}" for s in steps),
        "minutes": f"{mean(row['train_seconds'] for row in rows) / 60:.0f}" if timed else "",
        "trainings": len(seeds),
        "seeds": f"{len(seeds)} x {len(evaluations)}",
    }


def table(lines: Sequence[Mapping[str, Any]], columns: Mapping[str, str], left: int) -> str:
    """Markdown of the columns that have a value; all but the `left` first aligned to the right."""
    columns = {key: heading for key, heading in columns.items() if any(line.get(key) for line in lines)}
    head, rule, *rest = markdown_table(lines, columns).split("\n")
    return "\n".join([head, "|" + "---|" * left + "---:|" * (len(columns) - left), *rest])


def ablation(rows: list[Row], step_time: Mapping[str, Any] | None = None) -> Table:
    """The reference first, then by GenEval score; every row with its difference to the reference."""
    found = {name: found for name, found in by_experiment(rows).items() if name in ABLATION.rows}
    if not found:
        return EMPTY
    reference = found.get(ABLATION.compare, [])
    times = {row["experiment"]: row for row in (step_time or {}).get("rows", ())}
    lines, names = [], sorted(best_first(found), key=lambda name: name != ABLATION.compare)
    for name in names:
        line = cells(name, ABLATION.rows[name].label, found[name])
        if name != ABLATION.compare:
            line["difference"] = shown(against(found[name], reference, "geneval_overall"), sign=True)
        if time := times.get(name):
            line |= {"time": f"{time['ratio']:.2f}", "parameters": f"{time['parameters'] / 1e6:.2f}M"}
        lines.append(line)
    columns = {"row": "row", "yaml": "diff", "geneval_overall": SCORES["geneval_overall"], "difference": "to full"}
    columns |= SCORES | COLOR | LOSS
    columns |= {"time": "time per step, full = 1", "parameters": "parameters", "trainings": "seeds"}
    text = notes([row for name in names for row in found[name]])
    if times:
        text += f"\n\nTime per step: all rows in turn in one process; {machine_line(step_time['machine'])}"
    return table(lines, columns, 2), text


def ablation_tasks(rows: list[Row], step_time: Mapping[str, Any] | None = None) -> Table:
    """GenEval's tasks in the order of the table above."""
    found = {name: found for name, found in by_experiment(rows).items() if name in ABLATION.rows}
    names = sorted(best_first(found), key=lambda name: name != ABLATION.compare)
    lines = [cells(name, ABLATION.rows[name].label, found[name]) for name in names]
    return (table(lines, {"row": "row"} | PER_TASK, 1), "") if lines else EMPTY


def reference(rows: list[Row], step_time: Mapping[str, Any] | None = None) -> Table:
    """All models that no sweep trains, with every task."""
    elsewhere = {name for sweep in (ABLATION, STUDENTS) for name, row in sweep.rows.items() if row.seeds}
    found = {name: found for name, found in by_experiment(rows).items() if name not in elsewhere}
    names = best_first(found)
    lines = [cells(name, name, found[name]) for name in names]
    columns = {"row": "model", "steps": "steps", "seeds": SEEDS} | PER_TASK
    columns |= {key: SCORES[key] for key in ("clip_score", "fid_clip")}
    return (table(lines, columns, 1), notes([row for name in names for row in found[name]])) if lines else EMPTY


def students(rows: list[Row], step_time: Mapping[str, Any] | None = None) -> Table:
    """Each teacher, and below it its student; differences at the same prompts and noise."""
    found, lines, used = by_experiment(rows), [], []
    for name, row in STUDENTS.rows.items():
        own, teacher = found.get(name, []), found.get(row.teacher, [])
        if row.teacher is None or not own:
            continue
        if teacher:
            lines.append(cells(row.teacher, STUDENTS.rows[row.teacher].label, teacher))
        difference = shown(against(own, teacher, "geneval_overall"), sign=True)
        ratio = shown(against(own, teacher, "fid_clip", lambda a, b: a / b))
        lines.append(cells(name, row.label, own) | {"difference": difference, "ratio": ratio})
        used += teacher + own
    columns = STUDENT_COLUMNS | {"difference": "to its teacher", "ratio": "FID-CLIP, times its teacher's"}
    return (table(lines, columns, 2), notes(used)) if lines else EMPTY


def student_ablation(rows: list[Row], step_time: Mapping[str, Any] | None = None) -> Table:
    """The students again, and below each its ablations; differences to it, seed by seed."""
    found, lines, used = by_experiment(rows), [], []
    for name, student in STUDENTS.rows.items():
        own = found.get(name, [])
        ablations = [other for other, row in STUDENTS.rows.items() if row.compare == name and other in found]
        if not own or not ablations:
            continue
        lines.append(cells(name, student.label, own))
        used += own
        for other in ablations:
            difference = shown(against(found[other], own, "geneval_overall"), sign=True)
            lines.append(cells(other, STUDENTS.rows[other].label, found[other]) | {"difference": difference})
            used += found[other]
    return (table(lines, STUDENT_COLUMNS | {"difference": "to the student"}, 2), notes(used)) if lines else EMPTY


SEEDS = "seeds of training x evaluation"
PER_TASK = {f"geneval_{task}": task.replace("_", " ") for task in TASKS} | {"geneval_overall": "overall"}
STUDENT_COLUMNS = {"row": "model", "yaml": "experiment"} | SCORES | LOSS
STUDENT_COLUMNS |= {"steps": "steps", "minutes": "minutes of training", "seeds": SEEDS}
TABLES: dict[str, Callable[..., Table]] = {
    function.__name__: function for function in (ablation, ablation_tasks, reference, students, student_ablation)
}


def notes(rows: list[Row]) -> str:
    """How these rows were made, and a warning where they are not comparable."""
    same, odd = [], []
    settings = {"train.steps": [(row.get("train") or {}).get("steps") for row in rows]}
    flat = [
        {key.replace("sampling.grid", "sampling.schedule"): SCHEDULES.get(value, value) for key, value in own.items()}
        for own in (flatten(row.get("settings") or {}) for row in rows)
    ]
    keys = dict.fromkeys(key for own in flat for key in own if key not in MAY_DIFFER)
    for key, found in (settings | {key: [own.get(key) for own in flat] for key in keys}).items():
        kinds = list(dict.fromkeys(found))
        name = WORDS.get(key, key.removeprefix("sampling.").replace("_", " "))
        if len(kinds) > 1:
            odd.append(f"{name} ({', '.join(_short(kind) for kind in kinds)})")
        elif kinds[0] not in (None, "null"):
            same.append(f"{name} {_short(kinds[0])}")
    for key, word in (("seed", "training seeds"), ("eval_seed", "evaluation seeds")):
        same.append(f"{word} {', '.join(str(s) for s in sorted({row.get(key, 0) for row in rows}))}")
    same.append(f"commits {', '.join(sorted({_commit(row['commit']) for row in rows}))}")
    same.append("; ".join(sorted({str(row["hardware"]) for row in rows})))
    text = (
        f"{'; '.join(same)}. ± is the standard deviation over training seeds, over evaluation seeds where a model was "
    )
    text += "trained once."
    return text if not odd else f"{text}\n\n**Rows differ in {'; '.join(odd)}: compare only what is alike.**"


def _short(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{40,64}", text) else text


def _commit(commit: str | None) -> str:
    if commit is None:
        return "unknown"
    return commit[:10] + (" with uncommitted changes" if commit.endswith("-dirty") else "")


# -- pages -------------------------------------------------------------------------------------------

MARKED = re.compile(r"<!-- table:(\w+)( bare)? -->\n(.*?)<!-- end -->", re.DOTALL)


def pages() -> list[Path]:
    """Those with a marker."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "assets").rglob("*.md"))]
    return [path for path in found if "<!-- table:" in path.read_text(encoding="utf-8")]


def render(text: str, tables: Mapping[str, Table]) -> str:
    """The page with its tables; all else stays as it is.

    Raises:
        ValueError: a marker names no table, or lacks its end.
    """

    def fill(match: re.Match) -> str:
        if match[1] not in tables:
            raise ValueError(f"There is no table {match[1]!r}: the marker takes {', '.join(tables)}.")
        body, below = tables[match[1]]
        parts = [f"<!-- table:{match[1]}{match[2] or ''} -->", body, below if match[2] is None else "", "<!-- end -->"]
        return "\n\n".join(part for part in parts if part)

    found = MARKED.findall(text)
    if len(found) != text.count("<!-- table:") or any("<!-- table:" in body for *_, body in found):
        raise ValueError("A <!-- table:NAME --> lacks its <!-- end -->.")
    return MARKED.sub(fill, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.tables", description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, help="default: every page of the docs with a marker")
    parser.add_argument("--ledger", type=Path, default=ROOT / LEDGER, help=f"default: {LEDGER}")
    parser.add_argument("--step-time", type=Path, default=ROOT / STEP_TIME, help=f"default: {STEP_TIME}")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is out of date")
    parser.add_argument("--print", action="store_true", help="also print the tables")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the tables and the machine")
    args = parser.parse_args(argv)
    try:
        rows = ledger.read(args.ledger)
        step_time = json.loads(args.step_time.read_text()) if args.step_time.is_file() else None
        tables = {name: make(rows, step_time) for name, make in TABLES.items()}
        stale = []
        for page in args.pages or pages():
            old = page.read_text(encoding="utf-8")
            try:
                new = render(old, tables)
            except ValueError as error:
                raise ValueError(f"{page}: {error}") from error
            if new != old:
                stale.append(page)
                if not args.check:
                    page.write_text(new, encoding="utf-8")
    except (ValueError, OSError) as error:
        progress(str(error))
        return 2
    for page in stale:
        progress(f"{page} is out of date: python -m benchmarks.tables" if args.check else f"written: {page}")
    if args.print:
        print("\n\n".join(f"## {name}\n\n{body}\n\n{below}".strip() for name, (body, below) in tables.items()))
    if args.json is not None:
        content = {name: "\n\n".join(part for part in made if part) for name, made in tables.items()}
        write_json(args.json, {"benchmark": "tables", "machine": machine(), "tables": content})
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
