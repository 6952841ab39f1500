"""Renderer of the tables in the docs, from the ledgers: what stands between `<!-- table:NAME -->` and `<!-- end -->`.

    python -m benchmarks.tables            # after new rows in benchmarks/results/shapes.json or speedrun.json
    python -m benchmarks.tables --check    # exit status 1 if a page is out of date (a test does this)

`<!-- table:NAME bare -->` leaves out the lines below the table (settings, commits, hardware). Rows and labels are those
of `experiments/sweeps/`, and of `SUMMARY`. Seeds of a row that were trained at different commits, or with uncommitted
changes, are an error.
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
from benchmarks.levels import COSTS, LEVEL_COLUMNS, LEVELS, curves, level_line, within
from benchmarks.speedrun import LEDGER as SPEEDRUN_LEDGER
from benchmarks.sweep import LEDGER, Sweep, experiment_file
from emmdit.evaluation import ledger
from emmdit.evaluation.geneval import TASKS
from emmdit.evaluation.report import flatten
from emmdit.provenance import machine, machine_line

SWEEPS = ("ablation", "students", "speedrun")
ABLATION, STUDENTS, CHANGES = (Sweep(ROOT / f"experiments/sweeps/{name}.yaml") for name in SWEEPS)
RECORD = {"shapes/speedrun": "record", "shapes/emmdit": "base"}  # the base last
SUMMARY = {
    "shapes/emmdit": "E-MMDiT, from scratch",
    "shapes/emmdit_hybrid": "hybrid attention, distilled from E-MMDiT",
    "shapes/mmdit_teacher": "an MM-DiT of SD3.5's kind",
    "shapes/mm_edit": "MM-EDiT, distilled from that MM-DiT",
    "shapes/pixart_teacher": "a DiT of PixArt's kind",
    "shapes/edit": "EDiT, distilled from that DiT",
    "quickstart": "E-MMDiT, minutes on two CPU cores",
}
STEP_TIME = "benchmarks/results/shapes_step_time.json"
SEEDS = "seeds of training x evaluation"
SCORES = {"geneval_overall": "GenEval", "geneval_unseen": "GenEval, unseen"}
SCORES |= {"clip_score": "CLIP score", "fid_clip": "FID-CLIP (lower is better)"}
LOSS = {"val_loss": "validation loss"}
PER_TASK = {f"geneval_{task}": task.replace("_", " ") for task in TASKS} | {"geneval_overall": "overall"}
STUDENT_COLUMNS = {"row": "model", "yaml": "experiment"} | SCORES | LOSS
STUDENT_COLUMNS |= {"steps": "steps", "minutes": "minutes of training", "seeds": SEEDS}
ABLATION_COLUMNS = {"row": "row", "yaml": "diff", "geneval_overall": "GenEval", "difference": "to full"}
ABLATION_COLUMNS |= SCORES | {"asked_color": "asked color"} | LOSS
ABLATION_COLUMNS |= {"time": "time per step, full = 1", "parameters": "parameters", "trainings": "seeds"}
CHANGE_COLUMNS = {"row": "change", "yaml": "options", "geneval_overall": "GenEval", "difference": "to the base"}
CHANGE_COLUMNS |= {"clip_score": "CLIP score", **LOSS, "caption_gain": "caption gain", "samples": "samples"}
CHANGE_COLUMNS |= {"core_seconds": "core-seconds", "ratio": "core-seconds, base = 1", "trainings": "seeds"}
MAY_DIFFER = ("sha256", "source", "device", "batch_size", "config")  # settings of a row alone: its weights, say
WORDS = {
    "train.steps": "optimizer steps",
    "prompts.name": "prompt set",
    "prompts.sha256": "sha256",
    "prompts.prompts": "prompts",
    "prompts.images_per_prompt": "images each",
    "sampling.steps": "sampling steps",
}
Row = dict[str, Any]
Found = Mapping[str, list[Row]]  # the ledger by experiment
Table = tuple[str, str]  # the table, and the notes below it


# -- numbers -----------------------------------------------------------------------------------------


def values(rows: Iterable[Row], metric: str) -> dict[int, list[float]]:
    """{training seed: a value for each evaluation seed} of one experiment."""
    found: dict[int, list[float]] = {}
    for row in rows:
        train = row.get("train") or {}
        own = row["metrics"] | {"val_loss": train.get("val_loss_ema", train.get("val_loss"))}
        own |= {"caption_gain": train.get("val_caption_gain")}
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


def shown(value: tuple[float, float | None] | None, sign: str = "") -> str:
    if value is None:
        return ""
    digits = 3 if abs(value[0]) < 10 else 2
    text = f"{value[0]:{sign}.{digits}f}"
    return text if value[1] is None else f"{text} ± {value[1]:.{digits}f}"


def best_first(found: Found) -> list[str]:
    return sorted(found, key=lambda name: (-(spread(values(found[name], "geneval_overall")) or (-1, 0))[0], name))


# -- tables ------------------------------------------------------------------------------------------


def cells(name: str, label: str, rows: list[Row], others: list[Row] | None = None) -> dict[str, Any]:
    """All that a table may show of an experiment; `difference`: in GenEval to `others`."""
    seeds, evaluations = {row["seed"] for row in rows}, {row.get("eval_seed", 0) for row in rows}
    steps = sorted({row["train"]["steps"] for row in rows if (row.get("train") or {}).get("steps")})
    timed = all(row.get("train_seconds") for row in rows)
    return {
        **{metric: shown(spread(values(rows, metric))) for metric in PER_TASK | ABLATION_COLUMNS | CHANGE_COLUMNS},
        "row": label,
        "yaml": f"`{name}`",
        "difference": shown(against(rows, others, "geneval_overall"), "+") if others else "",
        "steps": " / ".join(f"{s:,}" for s in steps),
        "minutes": f"{mean(row['train_seconds'] for row in rows) / 60:.0f}" if timed else "",
        "trainings": len(seeds),
        "seeds": f"{len(seeds)} x {len(evaluations)}",
    }


def table(lines: Sequence[Mapping[str, Any]], columns: Mapping[str, str], left: int, rows: list[Row]) -> Table:
    """The columns that have a value, all but the `left` first aligned to the right; notes on the `rows` in them."""
    if not lines:
        return "No rows yet.", ""
    columns = {key: heading for key, heading in columns.items() if any(line.get(key) for line in lines)}
    head, _, *rest = markdown_table(lines, columns).split("\n")
    return "\n".join([head, "|" + "---|" * left + "---:|" * (len(columns) - left), *rest]), notes(rows) if rows else ""


def summary(found: Found) -> Table:
    """A few models for the README, in whose folder the links begin."""
    lines = [
        cells(name, label, found[name]) | {"yaml": f"[`{name}`]({experiment_file(name)})"}
        for name, label in SUMMARY.items()
        if name in found
    ]
    columns = {"yaml": "experiment", "row": "what it is", "steps": "training steps"}
    columns |= {"geneval_overall": "GenEval (shapes)", "geneval_unseen": "unseen compositions"}
    columns |= {"fid_clip": SCORES["fid_clip"]}
    return table(lines, columns, 2, [row for name in SUMMARY for row in found.get(name, ())])


def ablation_rows(found: Found) -> dict[str, list[Row]]:
    """The reference first, then by GenEval score."""
    found = {name: rows for name, rows in found.items() if name in ABLATION.rows}
    return {name: found[name] for name in sorted(best_first(found), key=lambda name: name != ABLATION.compare)}


def ablation(found: Found, step_time: Mapping[str, Any] | None = None) -> Table:
    """Every row with its difference to the reference."""
    times = {row["experiment"]: row for row in (step_time or {}).get("rows", ())}
    lines, found = [], ablation_rows(found)
    for name, rows in found.items():
        others = None if name == ABLATION.compare else found.get(ABLATION.compare)
        lines.append(cells(name, ABLATION.rows[name].label, rows, others))
        if time := times.get(name):
            lines[-1] |= {"time": f"{time['ratio']:.2f}", "parameters": f"{time['parameters'] / 1e6:.2f}M"}
    body, below = table(lines, ABLATION_COLUMNS, 2, sum(found.values(), []))
    if below and times:
        below += f"\n\nTime per step: all rows in turn in one process; {machine_line(step_time['machine'])}"
    return body, below


def ablation_tasks(found: Found) -> Table:
    """GenEval's tasks in the order of the table above."""
    lines = [cells(name, ABLATION.rows[name].label, rows) for name, rows in ablation_rows(found).items()]
    return table(lines, {"row": "row"} | PER_TASK, 1, [])


def reference(found: Found) -> Table:
    """All models that no sweep trains, with every task."""
    elsewhere = {name for sweep in (ABLATION, STUDENTS) for name, row in sweep.rows.items() if row.seeds}
    found = {name: rows for name, rows in found.items() if name not in elsewhere}
    names = best_first(found)
    columns = {"row": "model", "steps": "steps", "seeds": SEEDS} | PER_TASK | SCORES
    columns = {key: PER_TASK.get(key, heading) for key, heading in columns.items()}
    lines = [cells(name, name, found[name]) for name in names]
    return table(lines, columns, 1, [row for name in names for row in found[name]])


def students(found: Found) -> Table:
    """Each teacher, and below it its student; differences at the same prompts and noise."""
    lines, used = [], []
    for name, row in STUDENTS.rows.items():
        own, teacher = found.get(name, []), found.get(row.teacher, [])
        if row.teacher is None or not own:
            continue
        if teacher:
            lines.append(cells(row.teacher, STUDENTS.rows[row.teacher].label, teacher))
        ratio = shown(against(own, teacher, "fid_clip", lambda a, b: a / b))
        lines.append(cells(name, row.label, own, teacher) | {"ratio": ratio})
        used += teacher + own
    more = {"difference": "to its teacher", "ratio": "FID-CLIP, times its teacher's"}
    return table(lines, STUDENT_COLUMNS | more, 2, used)


def student_ablation(found: Found) -> Table:
    """The students again, and below each its ablations; differences to it, seed by seed."""
    lines, used = [], []
    for name, student in STUDENTS.rows.items():
        ablations = [other for other, row in STUDENTS.rows.items() if row.compare == name and other in found]
        if name in found and ablations:
            lines.append(cells(name, student.label, found[name]))
            lines += [cells(other, STUDENTS.rows[other].label, found[other], found[name]) for other in ablations]
            used += [row for one in (name, *ablations) for row in found[one]]
    return table(lines, STUDENT_COLUMNS | {"difference": "to the student"}, 2, used)


def speedrun(found: Found) -> Table:
    """What it cost the record and the base to reach each level: one run with its curve, or runs of several budgets."""
    lines, used = [], []
    for budgets in (False, True):
        runs = {name: [row for row in found.get(name, ()) if bool(row["budget"]) == budgets] for name in RECORD}
        *_, base = runs.values()
        for name, rows in runs.items():
            others = curves(base) if base and rows is not base else None
            row = {"row": RECORD[name] + ", a run for each budget" * budgets, "yaml": f"`{name}`"}
            lines += [row | level_line(curves(rows), others, level) for level in LEVELS if rows]
            used += rows
    return table(lines, {"row": "run", "yaml": "experiment"} | LEVEL_COLUMNS, 2, used)


def changes(found: Found) -> Table:
    """One change a row, at the sweep's budget, or at the end of each run; differences and ratios seed by seed."""

    def scored(name: str) -> list[Row]:
        whole = [row for row in found.get(name, ()) if not row["budget"]]
        points = [(row, within(row["curve"], CHANGES.budget or {})) for row in whole]
        return [row | {"metrics": point} for row, point in points if point is not None]

    base, lines, used = scored(CHANGES.compare), [], []
    for name, row in CHANGES.rows.items():
        own = scored(name)
        others = base if name != CHANGES.compare else None
        costs = {cost: f"{mean(line['metrics'][cost] for line in own):,.0f}" for cost in COSTS if own}
        ratio = shown(against(own, others, "core_seconds", lambda a, b: a / b)) if own and others else ""
        options = f"`{' '.join(row.options)}`" if row.options else f"`{row.experiment}`"
        lines += [cells(name, row.label, own, others) | costs | {"yaml": options, "ratio": ratio}] if own else []
        used += own
    return table(lines, CHANGE_COLUMNS, 2, used)


def tables(
    rows: Iterable[Row], step_time: Mapping[str, Any] | None = None, runs: Iterable[Row] = ()
) -> dict[str, Table]:
    """All of them by name; `runs` are those of speedruns.

    Raises:
        ValueError: of `ledger.check_commits`.
    """
    rows, runs = list(rows), list(runs)
    found, raced = by_experiment(rows), by_experiment(runs, "of")
    ledger.check_commits(rows)
    ledger.check_commits(runs)
    made = {make.__name__: make(found) for make in (summary, ablation_tasks, reference, students, student_ablation)}
    made |= {make.__name__: make(raced) for make in (speedrun, changes)}
    return made | {"ablation": ablation(found, step_time)}


def by_experiment(rows: Iterable[Row], key: str = "experiment") -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


def notes(rows: list[Row]) -> str:
    """How these rows were made, and a warning where they are not comparable."""
    same, odd = [], []
    flat = [{"train.steps": (row.get("train") or {}).get("steps")} | flatten(row.get("settings") or {}) for row in rows]
    for key in dict.fromkeys(key for own in flat for key in own if key not in MAY_DIFFER):
        kinds = list(dict.fromkeys(own.get(key) for own in flat))
        name = WORDS.get(key, key.removeprefix("sampling.").replace("_", " "))
        if len(kinds) > 1:
            odd.append(f"{name} ({', '.join(map(_short, kinds))})")
        elif kinds[0] not in (None, "null"):
            same.append(f"{name} {_short(kinds[0])}")
    for key, word in (("seed", "training seeds"), ("eval_seed", "evaluation seeds")):
        same.append(f"{word} {', '.join(str(s) for s in sorted({row.get(key, 0) for row in rows}))}")
    trained = {(row.get("train") or {}).get("commit") for row in rows} - {None}
    for word, commits in (("trained at", trained), ("evaluated at", {str(row["commit"] or "unknown") for row in rows})):
        told = sorted({c[:10] + " with uncommitted changes" * c.endswith("-dirty") for c in commits})
        same += [f"{word} {', '.join(told)}"] if told else []
    same.append("; ".join(sorted({str(row["hardware"]) for row in rows})))
    over = "over training seeds, over evaluation seeds where a model was trained once"
    text = f"{'; '.join(same)}. ± is the standard deviation {over}."
    return text if not odd else f"{text}\n\n**Rows differ in {'; '.join(odd)}: compare only what is alike.**"


def _short(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{40,64}", text) else text


# -- pages -------------------------------------------------------------------------------------------

MARKED = re.compile(r"<!-- table:(\w+)( bare)? -->\n(.*?)<!-- end -->", re.DOTALL)


def pages() -> list[Path]:
    """Those with a marker."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "assets").rglob("*.md"))]
    return [path for path in found if "<!-- table:" in path.read_text(encoding="utf-8")]


def render(text: str, made: Mapping[str, Table]) -> str:
    """The page with its tables; all else stays as it is.

    Raises:
        ValueError: a marker names no table, or lacks its end.
    """

    def fill(match: re.Match) -> str:
        if match[1] not in made:
            raise ValueError(f"There is no table {match[1]!r}: the marker takes {', '.join(made)}.")
        body, below = made[match[1]]
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
    words = f"default: {SPEEDRUN_LEDGER}"
    parser.add_argument("--speedrun", type=Path, default=ROOT / SPEEDRUN_LEDGER, help=words)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is out of date")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the tables and the machine")
    args = parser.parse_args(argv)
    stale = []
    try:
        made = tables(ledger.read(args.ledger), json.loads((ROOT / STEP_TIME).read_text()), ledger.read(args.speedrun))
        for page in args.pages or pages():
            old = page.read_text(encoding="utf-8")
            try:
                new = render(old, made)
            except ValueError as error:
                raise ValueError(f"{page}: {error}") from error
            if new != old:
                stale.append(page)
                progress(f"{page} is out of date: python -m benchmarks.tables" if args.check else f"written: {page}")
                if not args.check:
                    page.write_text(new, encoding="utf-8")
    except (ValueError, OSError) as error:
        progress(str(error))
        return 2
    content = {name: "\n\n".join(part for part in parts if part) for name, parts in made.items()}
    write_json(args.json, {"benchmark": "tables", "machine": machine(), "tables": content})
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
