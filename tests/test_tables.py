"""The ablation's runs and the tables in the docs: the right commands, what is resumed, and numbers by hand."""

from __future__ import annotations

import json
from contextlib import chdir
from pathlib import Path

import pytest
from filelock import FileLock

from benchmarks import shapes_ablation, tables
from benchmarks.shapes_ablation import FULL, ROWS, Task
from benchmarks.shapes_students import Student
from emmdit.evaluation import ledger
from tests.command_line import cli
from tests.command_line import elsewhere as elsewhere
from tests.test_ledger import row

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "prompts": {"name": "shapes", "sha256": "ab" * 32, "prompts": 300},
    "sampling": {"steps": 20, "sampler": "euler", "height": None},
    "sha256": "of the weights",
}


def entry(name: str, seed: int, overall: float, eval_seed: int = 0, **more) -> dict:
    metrics = {"geneval_overall": overall, "geneval_position": overall / 2, "clip_score": 20 + overall}
    return row(f"shapes/{name}", seed, eval_seed=eval_seed, settings=SETTINGS, train={"steps": 2000}) | {
        "metrics": metrics,
        **more,
    }


# -- the ablation's runs -----------------------------------------------------------------------------


def test_every_row_has_its_files_and_its_command():
    seen = set()
    for name in ROWS:
        task = Task(name, 1, Path("runs/ablation"), trainer="gpu")
        assert task.files[0] == "experiments/shapes/emmdit.yaml" and task.files[1] == "experiments/shapes/short.yaml"
        assert task.files[-2] == f"experiments/shapes/{name}.yaml" and task.files[-1].startswith("experiments/trainer")
        assert all((ROOT / file).is_file() for file in task.files), task.files
        seen.add(tuple(task.fit()))
        assert shapes_ablation.budget(task) == shapes_ablation.budget(Task(FULL, 0, Path("runs")))
    assert len(seen) == len(ROWS)


@pytest.mark.parametrize("kind", [Task, Student])
def test_each_evaluation_seed_has_a_folder_of_pictures(kind) -> None:
    task = kind("one_path", 1, Path("runs"))
    commands = [task.evaluate("e.yaml", seed, "ledger.json") for seed in (0, 1, 2)]
    assert len({command[command.index("--out") + 1] for command in commands}) == 3
    assert ("--prompts.init_args.images" in commands[0]) is (kind is Task)


def test_the_command_says_what_it_means():
    """Parsed by the real command line: seed, budget, folder, and the name in MLflow."""
    task = Task("one_path", 2, Path("runs/ablation"), steps=40)
    with chdir(ROOT):
        run = cli(*task.fit()[1:-1], "--trainer.accelerator=cpu")  # all but --ckpt_path, which only fit knows
    assert run.trainer.default_root_dir == "runs/ablation/one_path/seed2" and run.trainer.max_steps == 40
    assert run.model.seed == run.datamodule.seed == 2
    assert run.trainer.logger._run_name == "one_path seed 2"
    settings = run.config.model.init_args
    assert settings.scheduler.init_args.total == 40 and settings.denoiser.init_args.compression_ratios == [2]
    assert task.fit()[-1] == "--ckpt_path=last"


def test_dry_run_prints_what_is_missing(tmp_path: Path, capsys):
    path = tmp_path / "ledger.json"
    options = ["--dry-run", "--ledger", str(path), "--trainer", "cpu", "--runs", str(tmp_path / "runs")]
    assert shapes_ablation.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 3 * len(ROWS) and not (tmp_path / "runs").exists()
    fits, evaluations = lines[::2], lines[1::2]
    assert all(line.startswith("emmdit fit -c experiments/shapes/emmdit.yaml ") for line in fits)
    assert all("-c experiments/trainer/cpu.yaml" in line for line in fits)
    assert all(f"--ledger {path} --experiment shapes/" in line for line in evaluations)
    ledger.append(path, entry("one_path", 1, 0.5))
    ledger.append(path, entry("one_path", 0, 0.5, eval_seed=3))  # another evaluation: still missing
    shapes_ablation.main(options)
    less = capsys.readouterr().out.splitlines()
    assert len(less) == len(lines) - 2 and not any("one_path/seed1" in line for line in less)


def test_shards_share_the_work():
    def names(shard: str) -> list[tuple[str, int]]:
        return [(task.name, task.seed) for task in shapes_ablation.tasks(shapes_ablation.arguments(["--shard", shard]))]

    parts = [names(f"{i}/3") for i in (1, 2, 3)]
    assert sorted(sum(parts, [])) == sorted(names("1/1")) and len(set(sum(parts, []))) == 3 * len(ROWS)
    assert {seed for _, seed in names("1/1")[: len(ROWS)]} == {0}  # a first table early
    for bad in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(SystemExit):
            shapes_ablation.arguments(["--shard", bad])


class Suite:
    """Stands in for the `emmdit` processes: a run moves on, an evaluation writes its row."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        self.steps: dict[Path, int] = {}
        self.fails: set[tuple[str, str]] = set()
        for file in (ROOT / "experiments").rglob("*.yaml"):
            copied = root / file.relative_to(ROOT)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_text(file.read_text())
        (root / "experiments" / "evaluation").mkdir(exist_ok=True)
        (root / shapes_ablation.EVALUATION).write_text("{}")
        monkeypatch.setattr(shapes_ablation, "ROOT", root)
        monkeypatch.setattr(shapes_ablation, "call", self.call)
        monkeypatch.setattr(shapes_ablation, "position", lambda folder: self.steps.get(folder, 0))
        record = {"seconds": 80.0, "seconds_per_step": 0.1}
        monkeypatch.setattr(shapes_ablation, "read_training_record", lambda folder, steps: record | {"steps": steps})
        self.root = root

    def call(self, command: list[str], log: Path, threads: int | None) -> None:
        folder = log.parent
        self.calls.append((command[0], folder.parent.name))
        if self.calls[-1] in self.fails:
            raise RuntimeError("it broke")
        if command[0] == "fit":
            assert "--ckpt_path=last" in command
            self.steps[folder] = shapes_ablation.budget(Task(folder.parent.name, 0, Path("runs")))
        else:
            record = json.loads((folder / "train.json").read_text())
            assert record["steps"] == self.steps[folder] and record["seconds"] == 80.0
            name = command[command.index("--experiment") + 1].removeprefix("shapes/")
            ledger.append(self.root / command[command.index("--ledger") + 1], entry(name, int(folder.name[4:]), 0.5))


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    return Suite(tmp_path / "root", monkeypatch)


def test_a_killed_ablation_goes_on_where_it_was(suite: Suite, capsys):
    rows = ["--rows", "short", "one_path", "adamw", "--seeds", "0", "--trainer", "none"]
    suite.fails = {("fit", "one_path"), ("evaluate", "adamw")}
    assert shapes_ablation.main(rows) == 1  # the rows after a broken one are made all the same
    assert suite.calls == [
        ("fit", "short"),
        ("evaluate", "short"),
        ("fit", "one_path"),
        ("fit", "adamw"),
        ("evaluate", "adamw"),
    ]
    printed = capsys.readouterr()
    assert "it broke" in printed.err and "| shapes/adamw | 0 | step 600 " in printed.out
    suite.calls, suite.fails = [], set()
    assert shapes_ablation.main(rows) == 0
    assert suite.calls == [("fit", "one_path"), ("evaluate", "one_path"), ("evaluate", "adamw")]
    suite.calls = []
    assert shapes_ablation.main(rows) == 0 and suite.calls == []
    assert capsys.readouterr().out.count("ledger") == 6


def test_two_processes_do_not_make_the_same_run(suite: Suite, capsys):
    folder = suite.root / "runs/ablation/short/seed0"
    folder.mkdir(parents=True)
    options = ["--rows", "short", "one_path", "--seeds", "0", "--trainer", "none"]
    with FileLock(folder / ".lock"):
        shapes_ablation.main(options)
        printed = capsys.readouterr()
    assert suite.calls == [("fit", "one_path"), ("evaluate", "one_path")]
    assert "process" in printed.err and "| shapes/short | 0 | -" in printed.out


def test_runs_of_another_budget_are_not_mixed_in(suite: Suite, capsys):
    options = ["--rows", "short", "--seeds", "0", "--trainer", "none", "--ledger", "other.json"]
    shapes_ablation.main(options)
    (suite.root / "other.json").unlink()
    for steps in ("300", "4000"):
        suite.calls = []
        assert shapes_ablation.main([*options, "--steps", steps]) == 1 and suite.calls == []
        assert "600" in capsys.readouterr().err


def test_missing_files_are_named_before_the_first_run(suite: Suite, capsys):
    (suite.root / "experiments/shapes/adamw.yaml").unlink()
    assert shapes_ablation.main(["--rows", "short", "adamw"]) == 2 and suite.calls == []
    assert "experiments/shapes/adamw.yaml" in capsys.readouterr().err


def test_a_command_that_fails_says_why(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"\b2\b.*'paint'"):
        shapes_ablation.call(["paint"], tmp_path / "log", 1)
    assert "'paint'" in (tmp_path / "log").read_text()


# -- the tables --------------------------------------------------------------------------------------

SCORES = {"short": (0.50, 0.54, 0.58), "one_path": (0.41, 0.45, 0.52), "adamw": (0.60, 0.66, 0.66), "repa_clip": (0.7,)}


def ablation_rows() -> list[dict]:
    return [entry(name, seed, score) for name, scores in SCORES.items() for seed, score in enumerate(scores)]


def cells(table: str) -> list[dict[str, str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, line, strict=True)) for line in body]


def test_ablation_by_hand():
    found = cells(tables.ablation(ablation_rows()))
    assert [line["diff"] for line in found] == [
        "`shapes/short`",
        "`shapes/repa_clip`",
        "`shapes/adamw`",
        "`shapes/one_path`",
    ]
    full, single, adamw, one = found
    assert full["GenEval"] == "0.540 ± 0.040" and full["to full"] == "" and full["seeds"] == "3"
    assert one["GenEval"] == "0.460 ± 0.056"
    assert one["to full"] == "-0.080 ± 0.017"  # of -0.09, -0.09, -0.06: seed by seed, not of the two columns
    assert adamw["to full"] == "+0.100 ± 0.020"
    assert single["GenEval"] == "0.700" and single["to full"] == "+0.200" and single["seeds"] == "1"
    assert full["CLIP score"] == "20.54 ± 0.04" and "FID-CLIP (lower is better)" not in full
    tasks = cells(tables.ablation_tasks(ablation_rows()))
    assert [line["row"] for line in tasks] == [line["row"] for line in found]
    assert tasks[0]["position"] == "0.270 ± 0.020" and list(tasks[0]) == ["row", "position", "overall"]


def test_time_per_step_is_the_ratio_of_one_process():
    rows = [
        {"experiment": f"shapes/{n}", "ratio": r, "parameters": 3_180_960}
        for n, r in (("short", 1.0), ("adamw", 0.876))
    ]
    machine = {"gpu": None, "cpu": "a CPU", "cpu_cores": 2, "torch_threads": 1, "ram_gib": 8, "load_average": 0.1}
    machine |= {"torch": "2", "date": "2026-01-01T", "commit": None}
    text = tables.ablation(ablation_rows(), {"rows": rows, "machine": machine})
    times = {line["diff"]: line["time per step, full = 1"] for line in cells(text)}
    assert times == {
        "`shapes/short`": "1.00",
        "`shapes/adamw`": "0.88",
        "`shapes/one_path`": "",
        "`shapes/repa_clip`": "",
    }
    assert "3.18M" in text and "a CPU" in text


def test_evaluation_seeds_are_averaged_before_training_seeds():
    rows = [entry("short", s, v, eval_seed=e) for s, e, v in ((0, 0, 0.1), (0, 1, 0.3), (1, 0, 0.4), (1, 1, 0.8))]
    assert tables.spread(tables.values(rows, "geneval_overall")) == (
        pytest.approx(0.4),
        pytest.approx(0.2828, abs=1e-4),
    )
    once = [row for row in rows if row["seed"] == 0]
    assert tables.spread(tables.values(once, "geneval_overall")) == (
        pytest.approx(0.2),
        pytest.approx(0.1414, abs=1e-4),
    )


def test_reference_holds_all_that_is_no_ablation():
    rows = [
        *ablation_rows(),
        *(entry("emmdit", 0, 0.8 + e / 100, eval_seed=e) for e in range(3)),
        entry("distill_4step", 0, 0.9),
        entry("mm_edit", 0, 0.9),  # in the table of students
    ]
    text = tables.reference(rows)
    found = cells(text)
    assert [line["model"] for line in found] == ["shapes/distill_4step", "shapes/emmdit"]
    assert found[1]["overall"] == "0.810 ± 0.010" and found[1]["seeds of training x evaluation"] == "1 x 3"
    assert "0000000000" in text and "abababababab" in text and "sampling steps 20" in text
    assert "of the weights" not in text and "**" not in text


def test_students_stand_below_their_teacher_and_differ_from_it_at_the_same_noise():
    teacher = [entry("mmdit_teacher", 0, score, eval_seed=e) for e, score in ((0, 0.8), (1, 0.6))]
    students = [entry("mm_edit", seed, 0.75 + seed / 100) for seed in range(3)]  # of evaluation seed 0
    others = [entry("mm_edit_linear", 0, 0.5), entry("pixart_teacher", 0, 0.9), entry("emmdit", 0, 0.9)]
    found = cells(tables.students([*students, *others, *teacher]))
    assert [line["experiment"] for line in found] == ["`shapes/mmdit_teacher`", "`shapes/mm_edit`"]
    assert [line["to its teacher"] for line in found] == ["", "-0.040 ± 0.010"]
    assert found[0]["GenEval"].startswith("0.700")
    assert "|" not in tables.students([entry("emmdit", 0, 0.9)])  # no table


def test_ablations_of_students_differ_from_them_seed_by_seed():
    rows = [entry("edit", seed, 0.5 + seed / 10) for seed in range(2)]
    rows += [entry("edit_linear", seed, 0.3 + seed / 10) for seed in range(2)] + [entry("mm_edit_linear", 0, 0.4)]
    found = cells(tables.student_ablation(rows))  # mm_edit itself is missing
    assert [line["to the student"] for line in found] == ["", "-0.200 ± 0.000"]


def test_rows_that_do_not_compare_are_said_to():
    rows = ablation_rows()
    rows[1] = rows[1] | {"train": {"steps": 500}}
    assert "**" in tables.ablation(rows) and "optimizer steps (2,000, 500)" in tables.ablation(rows)
    rows[1] = rows[2] | {"settings": SETTINGS | {"sampling": {"steps": 4}}}
    assert "sampling steps (20, 4)" in tables.ablation(rows)


def test_pages_are_filled_between_the_markers_alone(tmp_path: Path, capsys):
    ledger_file, page = tmp_path / "ledger.json", tmp_path / "page.md"
    for one in ablation_rows():
        ledger.append(ledger_file, one)
    before, after = "# Text | with <!-- a comment -->\n\n", "\nand the end\n"
    page.write_text(f"{before}<!-- table:ablation -->\nold\n<!-- end -->{after}<!-- table:reference -->\n<!-- end -->")
    options = [str(page), "--ledger", str(ledger_file), "--step-time", str(tmp_path / "none.json")]
    assert tables.main([*options, "--check"]) == 1 and "old" in page.read_text()
    assert f"{page} " in capsys.readouterr().err
    assert tables.main(options) == 0
    text = page.read_text()
    assert text.startswith(before) and after in text and "old" not in text and "0.540 ± 0.040" in text
    assert "|" not in text.partition("<!-- table:reference -->")[2]
    assert tables.main([*options, "--check"]) == 0
    ledger.append(ledger_file, entry("one_path", 0, 0.1))
    assert tables.main([*options, "--check"]) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<!-- table:nothing -->\n<!-- end -->", "'nothing'"),
        ("<!-- table:ablation -->\n", "<!-- end -->"),
        ("<!-- table:ablation -->\n<!-- table:reference -->\n<!-- end -->", "<!-- end -->"),
    ],
)
def test_broken_markers_name_the_page(tmp_path: Path, capsys, text: str, words: str):
    (tmp_path / "page.md").write_text(text)
    assert tables.main([str(tmp_path / "page.md"), "--ledger", str(tmp_path / "none.json")]) == 2
    error = capsys.readouterr().err
    assert words in error and "page.md" in error and (tmp_path / "page.md").read_text() == text


def test_the_docs_are_up_to_date():
    assert ROOT / "docs" / "results_shapes.md" in tables.pages()
    assert tables.main(["--check"]) == 0, "run python -m benchmarks.tables"
