"""Renders the tables of the docs from the ledger: whatever stands between `<!-- table:NAME -->` and `<!-- end -->`.

python -m benchmarks.tables            # after new rows in benchmarks/results/shapes.json
python -m benchmarks.tables --check    # exit status 1 if a page is out of date (a test does this)
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
from benchmarks.shapes_ablation import FULL, LEDGER, ROWS
from benchmarks.shapes_students import ABLATIONS, STUDENTS, TEACHER_OF, TEACHERS, base_of
from emmdit.evaluation import ledger
from emmdit.evaluation.report import flatten
from emmdit.provenance import machine, machine_line

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
METRICS = {
    "geneval_overall": "GenEval",
    "clip_score": "CLIP score",
    "fid_clip": "FID-CLIP (lower is better)",
    "asked_color": "asked colour",
    "val_loss": "validation loss",
}
STEP_TIME = "benchmarks/results/shapes_step_time.json"
MAY_DIFFER = ("sha256", "source", "device", "batch_size")  # settings of a row alone: its weights, say
WORDS = {
    "train.steps": "optimizer steps",
    "prompts.name": "prompt set",
    "prompts.sha256": "sha256",
    "prompts.prompts": "prompts",
    "prompts.images_per_prompt": "pictures each",
    "sampling.steps": "sampling steps",
}
Row = dict[str, Any]


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


def difference(rows: Iterable[Row], full: Iterable[Row], metric: str) -> tuple[float, float | None] | None:
    """Mean and standard deviation of row minus full, seed by seed: runs of a seed share order of data and noise."""
    a, b = values(rows, metric), values(full, metric)
    return spread({seed: [mean(a[seed]) - mean(b[seed])] for seed in sorted(a.keys() & b.keys())})


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


# -- tables ------------------------------------------------------------------------------------------


def ablation(rows: list[Row], step_time: Mapping[str, Any] | None = None) -> str:
    """Full first, then by their GenEval score; every number beside its difference to full."""
    found = _ablation_rows(rows)
    if not found:
        return "No rows yet."
    full = found.get(f"shapes/{FULL}", [])
    times = {row["experiment"]: row for row in (step_time or {}).get("rows", ())}
    table = []
    for name, of_row in found.items():
        time = times.get(name, {})
        table.append(
            {
                "row": ROWS[name.removeprefix("shapes/")],
                "yaml": f"`{name}`",
                **{metric: shown(spread(values(of_row, metric))) for metric in METRICS},
                "difference": shown(difference(of_row, full, "geneval_overall"), sign=True) if of_row != full else "",
                "time": f"{time['ratio']:.2f}" if time.get("ratio") else "",
                "parameters": f"{time['parameters'] / 1e6:.2f}M" if time else "",
                "seeds": len({row["seed"] for row in of_row}),
            }
        )
    columns = {"row": "row", "yaml": "diff", "geneval_overall": METRICS["geneval_overall"], "difference": "to full"}
    columns |= METRICS | {"time": "time per step, full = 1", "parameters": "parameters", "seeds": "seeds"}
    text = _right(markdown_table(table, {k: v for k, v in columns.items() if any(row[k] for row in table)}), 2)
    notes = [_notes([row for of_row in found.values() for row in of_row])]
    if times:
        notes.append(f"Time per step: all rows in turn in one process; {machine_line(step_time['machine'])}")
    return "\n\n".join([text, *notes])


def ablation_tasks(rows: list[Row], step_time: Mapping[str, Any] | None = None) -> str:
    """GenEval's tasks in the order of the table above."""
    found = _ablation_rows(rows)
    return _task_table({ROWS[n.removeprefix("shapes/")]: r for n, r in found.items()}) if found else "No rows yet."


def reference(rows: list[Row], step_time: Mapping[str, Any] | None = None) -> str:
    """All models that stand in no other table, with every task."""
    elsewhere = {f"shapes/{name}" for name in (*ROWS, *TEACHERS, *STUDENTS, *ABLATIONS)}
    found = by_experiment(row for row in rows if row["experiment"] not in elsewhere)
    if not found:
        return "No rows yet."
    found = dict(sorted(found.items(), key=lambda item: _rank(item[1])))
    return f"{_task_table(found, runs=True)}\n\n{_notes([row for of_row in found.values() for row in of_row])}"


def students(rows: list[Row], step_time: Mapping[str, Any] | None = None) -> str:
    """Each teacher, and below it its student; differences at the same prompts and noise."""
    found, table, used = by_experiment(rows), [], []
    for name, teacher in TEACHER_OF.items():
        of_student, of_teacher = found.get(f"shapes/{name}", []), found.get(f"shapes/{teacher}", [])
        if not of_student:
            continue
        if of_teacher:
            table.append(_student_row(f"shapes/{teacher}", TEACHERS.get(teacher, "E-MMDiT") + " (teacher)", of_teacher))
        table.append(
            _student_row(f"shapes/{name}", STUDENTS[name], of_student)
            | {
                "difference": shown(_against(of_student, of_teacher, "geneval_overall", lambda a, b: a - b), True),
                "ratio": shown(_against(of_student, of_teacher, "fid_clip", lambda a, b: a / b)),
            }
        )
        used += of_teacher + of_student
    if not table:
        return "No rows yet."
    columns = STUDENT_COLUMNS | {"difference": "to its teacher", "ratio": "FID-CLIP, times its teacher's"}
    return f"{_right(markdown_table(table, columns), 2)}\n\n{_notes(used)}"


def student_ablation(rows: list[Row], step_time: Mapping[str, Any] | None = None) -> str:
    """The students again, and below each its ablations; differences to it, seed by seed."""
    found, table, used = by_experiment(rows), [], []
    for name, words in STUDENTS.items():
        base = found.get(f"shapes/{name}", [])
        ablations = [a for a in ABLATIONS if base_of(a) == name and f"shapes/{a}" in found]
        if not base or not ablations:
            continue
        table.append(_student_row(f"shapes/{name}", words, base))
        used += base
        for ablation in ablations:
            of_row = found[f"shapes/{ablation}"]
            difference = _against(of_row, base, "geneval_overall", lambda a, b: a - b)
            row = _student_row(f"shapes/{ablation}", ABLATIONS[ablation], of_row)
            table.append(row | {"difference": shown(difference, True)})
            used += of_row
    if not table:
        return "No rows yet."
    columns = STUDENT_COLUMNS | {"difference": "to the student"}
    return f"{_right(markdown_table(table, columns), 2)}\n\n{_notes(used)}"


STUDENT_COLUMNS = {"row": "model", "yaml": "experiment"} | {k: v for k, v in METRICS.items() if k != "asked_color"}
STUDENT_COLUMNS |= {"steps": "steps", "minutes": "minutes of training", "seeds": "seeds of training x evaluation"}


def _student_row(name: str, words: str, rows: list[Row]) -> dict[str, Any]:
    timed = all(row.get("train_seconds") for row in rows)
    return {
        "row": words,
        "yaml": f"`{name}`",
        **{metric: shown(spread(values(rows, metric))) for metric in METRICS},
        "steps": f"{rows[0]['train']['steps']:,}" if rows[0].get("train") else "",
        "minutes": f"{mean(row['train_seconds'] for row in rows) / 60:.0f}" if timed else "",
        "seeds": f"{len({row['seed'] for row in rows})} x {len({row.get('eval_seed', 0) for row in rows})}",
        "difference": "",
        "ratio": "",
    }


def _against(
    rows: list[Row], others: list[Row], metric: str, compare: Callable[[float, float], float]
) -> tuple[float, float | None] | None:
    """Mean and standard deviation of rows against others, at the same evaluation seed, and the same training seed where
    the others have it (a teacher has one for all)."""
    by_seeds = {(row["seed"], row.get("eval_seed", 0)): row["metrics"].get(metric) for row in others}
    single = len({row["seed"] for row in others}) == 1 < len({row["seed"] for row in rows})
    found: dict[int, list[float]] = {}
    for row in rows:
        seed = others[0]["seed"] if single else row["seed"]
        own, other = row["metrics"].get(metric), by_seeds.get((seed, row.get("eval_seed", 0)))
        if own is not None and other is not None:
            found.setdefault(row["seed"], []).append(compare(own, other))
    return spread(found)


TABLES: dict[str, Callable[..., str]] = {
    "ablation": ablation,
    "ablation_tasks": ablation_tasks,
    "reference": reference,
    "students": students,
    "student_ablation": student_ablation,
}


def _ablation_rows(rows: list[Row]) -> dict[str, list[Row]]:
    found = by_experiment(row for row in rows if row["experiment"].removeprefix("shapes/") in ROWS)
    return dict(sorted(found.items(), key=lambda item: (item[0] != f"shapes/{FULL}", _rank(item[1]), item[0])))


def _rank(rows: list[Row]) -> float:
    best = spread(values(rows, "geneval_overall"))
    return -best[0] if best else float("inf")


def _task_table(found: Mapping[str, list[Row]], runs: bool = False) -> str:
    names = {f"geneval_{task}": task.replace("_", " ") for task in TASKS} | {"geneval_overall": "overall"}
    names |= {name: METRICS[name] for name in ("clip_score", "fid_clip")} if runs else {}
    table = []
    for name, rows in found.items():
        seeds, evaluations = {row["seed"] for row in rows}, {row.get("eval_seed", 0) for row in rows}
        steps = sorted({row["train"]["steps"] for row in rows if (row.get("train") or {}).get("steps")})
        own = {"row": name, "seeds": f"{len(seeds)} x {len(evaluations)}", "steps": " / ".join(f"{s:,}" for s in steps)}
        table.append(own | {metric: shown(spread(values(rows, metric))) for metric in names})
    columns = {"row": "model" if runs else "row"}
    columns |= {"steps": "steps", "seeds": "seeds of training x evaluation"} if runs else {}
    columns |= {name: heading for name, heading in names.items() if any(row[name] for row in table)}
    return _right(markdown_table(table, columns), 1)


def _right(table: str, left: int) -> str:
    """All columns but the `left` first aligned to the right: values with their spread are text to `markdown_table`."""
    head, rule, *rest = table.split("\n")
    count = rule.count("|") - 1
    return "\n".join([head, "|" + "---|" * left + "---:|" * (count - left), *rest])


def _notes(rows: list[Row]) -> str:
    """How these rows came about, and a warning where they do not compare."""
    told, odd = [], []
    steps = {"train.steps": [(row.get("train") or {}).get("steps") for row in rows]}
    flat = [flatten(row.get("settings") or {}) for row in rows]
    keys = dict.fromkeys(key for settings in flat for key in settings if key not in MAY_DIFFER)
    for key, found in (steps | {key: [settings.get(key) for settings in flat] for key in keys}).items():
        kinds = list(dict.fromkeys(found))
        name = WORDS.get(key, key.removeprefix("sampling.").replace("_", " "))
        if len(kinds) > 1:
            odd.append(f"{name} ({', '.join(_short(kind) for kind in kinds)})")
        elif kinds[0] not in (None, "null"):
            told.append(f"{name} {_short(kinds[0])}")
    for key, word in (("seed", "training seeds"), ("eval_seed", "evaluation seeds")):
        told.append(f"{word} {', '.join(str(s) for s in sorted({row.get(key, 0) for row in rows}))}")
    told.append(f"commits {', '.join(sorted({_commit(row['commit']) for row in rows}))}")
    told.append("; ".join(sorted({str(row["hardware"]) for row in rows})))
    text = (
        f"{'; '.join(told)}. ± is the standard deviation over training seeds, over evaluation seeds where a model was "
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

MARKED = re.compile(r"<!-- table:(\w+) -->\n(.*?)<!-- end -->", re.DOTALL)


def pages() -> list[Path]:
    """Those with a marker."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "assets").rglob("*.md"))]
    return [path for path in found if "<!-- table:" in path.read_text(encoding="utf-8")]


def render(text: str, tables: Mapping[str, str]) -> str:
    """The page with its tables; all else stays as it is."""

    def fill(match: re.Match) -> str:
        if match[1] not in tables:
            raise ValueError(f"There is no table {match[1]!r}: the marker takes {', '.join(tables)}.")
        return f"<!-- table:{match[1]} -->\n\n{tables[match[1]]}\n\n<!-- end -->"

    if len(MARKED.findall(text)) != text.count("<!-- table:") or any(
        "<!-- table:" in m[1] for m in MARKED.findall(text)
    ):
        raise ValueError("A <!-- table:NAME --> lacks its <!-- end -->.")
    return MARKED.sub(fill, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, help="default: every page of the docs with a marker")
    parser.add_argument("--ledger", type=Path, default=ROOT / LEDGER, help=f"default: {LEDGER}")
    parser.add_argument("--step-time", type=Path, default=ROOT / STEP_TIME, help=f"default: {STEP_TIME}")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is out of date")
    parser.add_argument("--print", action="store_true", help="print the tables, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the tables and the machine")
    args = parser.parse_args(argv)
    try:
        rows = ledger.read(args.ledger)
        step_time = json.loads(args.step_time.read_text()) if args.step_time.is_file() else None
        tables = {name: table(rows, step_time) for name, table in TABLES.items()}
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
        print("\n\n".join(f"## {name}\n\n{table}" for name, table in tables.items()))
    if args.json is not None:
        write_json(args.json, {"benchmark": "tables", "machine": machine(), "tables": tables})
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
