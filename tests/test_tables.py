"""Sweeps and the tables in the docs: commands, resume and locks, and numbers checked by hand."""

from __future__ import annotations

import json
import shutil
from contextlib import chdir
from pathlib import Path

import pytest
from filelock import FileLock

from benchmarks import sweep, tables
from benchmarks.sweep import Sweep, Task
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


def entry(name: str, seed: int, overall: float, eval_seed: int = 0) -> dict:
    metrics = {"geneval_overall": overall, "geneval_position": overall / 2, "clip_score": 20 + overall}
    more = {"eval_seed": eval_seed, "settings": SETTINGS, "train": {"steps": 2000}, "metrics": metrics}
    return row(f"shapes/{name}", seed) | more


# -- sweeps ------------------------------------------------------------------------------------------

ABLATION, STUDENTS = (str(ROOT / f"experiments/sweeps/{name}.yaml") for name in ("ablation", "students"))


@pytest.mark.parametrize("path", [ABLATION, STUDENTS])
def test_every_row_has_its_files_and_its_command(path: str):
    found = Sweep(path)
    tasks = [Task(found, name, seed, "gpu") for name, row in found.rows.items() for seed in row.seeds]
    assert len({tuple(task.fit()) for task in tasks}) == len({task.folder for task in tasks}) == len(tasks)
    assert (ROOT / found.evaluation).is_file()
    for task in tasks:
        assert task.files()[-3::2] == [f"experiments/{task.experiment}.yaml", "experiments/trainer/gpu.yaml"]
        assert all((ROOT / file).is_file() for file in task.files()[1::2])
    for line in found.rows.values():  # what rows refer to are rows
        assert {line.compare, line.teacher} - {None} <= found.rows.keys()


def test_the_command_says_what_it_means():
    """Parsed by the real command line: seed, budget, folder, teacher, and the name in MLflow."""
    task = Task(Sweep(ABLATION), "shapes/one_path", 2)
    with chdir(ROOT):
        run = cli(*task.fit()[1:-1], "--trainer.accelerator=cpu")  # all but --ckpt_path, which only fit knows
    assert run.trainer.default_root_dir == "runs/ablation/one_path/seed2" and run.trainer.max_steps == task.steps()
    assert run.model.seed == run.datamodule.seed == 2
    assert run.trainer.logger._run_name == "shapes/one_path seed 2"
    settings = run.config.model.init_args.denoiser.init_args
    assert settings.compression_ratios == [2] and settings.block_groups == [1, 2, 1]  # its own, and the budget's
    assert task.fit()[-1] == "--ckpt_path=last"


def test_a_student_learns_from_the_teacher_of_its_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    students = Sweep(STUDENTS)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    tasks = [Task(students, f"shapes/{name}", 1) for name in ("edit", "edit_linear", "mm_edit", "emmdit_hybrid")]
    assert [task.teacher() for task in tasks] == [[]] * 4  # none was trained: the one in assets/
    (tmp_path / "runs/students/pixart_teacher/seed0").mkdir(parents=True)
    given = ["--model.init_args.teacher=runs/students/pixart_teacher/seed0"]
    assert [task.teacher() for task in tasks] == [given, given, [], []]


def test_dry_run_prints_what_is_missing(tmp_path: Path, capsys):
    path = tmp_path / "ledger.json"
    options = [ABLATION, "--dry-run", "--ledger", str(path), "--trainer", "cpu"]
    rows = len(Sweep(ABLATION).rows)
    assert sweep.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 3 * rows
    fits, evaluations = lines[::2], lines[1::2]
    assert all(line.startswith("emmdit fit -c experiments/shapes/short.yaml ") for line in fits)
    assert all("--seed_everything=0" in line for line in fits[:rows])  # a first table early
    assert all(f"--ledger {path} --experiment shapes/" in line for line in evaluations)
    ledger.append(path, entry("one_path", 1, 0.5))
    ledger.append(path, entry("one_path", 0, 0.5, eval_seed=3))  # another evaluation: still missing
    sweep.main(options)
    less = capsys.readouterr().out.splitlines()
    assert len(less) == len(lines) - 2 and not any("one_path/seed1" in line for line in less)


class Suite:
    """Stands in for the `emmdit` processes: a run moves on, an evaluation writes its row."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        self.steps: dict[Path, int] = {}
        self.fails: set[tuple[str, str]] = set()
        self.commit = "0" * 40
        shutil.copytree(ROOT / "experiments", root / "experiments")
        monkeypatch.setattr(sweep, "ROOT", root)
        monkeypatch.setattr(sweep, "call", self.call)
        monkeypatch.setattr(sweep, "git_commit", lambda: self.commit)
        monkeypatch.setattr(sweep, "position", lambda folder: self.steps.get(folder, 0))
        self.root = root
        self.sweep = str(root / "experiments/sweeps/ablation.yaml")

    def call(self, command: list[str], log: Path, threads: int | None) -> None:
        folder = log.parent
        self.calls.append((command[0], folder.parent.name))
        if self.calls[-1] in self.fails:
            raise RuntimeError("it broke")
        if command[0] == "fit":
            assert "--ckpt_path=last" in command
            self.steps[folder] = 600
            (folder / "config.yaml").write_text("trainer: {max_steps: 600}")
        else:
            name = command[command.index("--experiment") + 1].removeprefix("shapes/")
            ledger.append(self.root / command[command.index("--ledger") + 1], entry(name, int(folder.name[4:]), 0.5))

    def main(self, *rows: str, **options: str) -> int:
        more = [part for key, value in options.items() for part in (f"--{key}", value)]
        names = [f"shapes/{row}" for row in rows]
        return sweep.main([self.sweep, "--rows", *names, "--seeds", "0", "--trainer", "none", *more])


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    return Suite(tmp_path / "root", monkeypatch)


def test_a_killed_sweep_resumes(suite: Suite, capsys):
    rows = ("short", "one_path", "adamw")
    suite.fails = {("fit", "one_path"), ("evaluate", "adamw")}
    assert suite.main(*rows) == 1  # the rows after a broken one are made all the same
    expected = [("fit", "short"), ("evaluate", "short"), ("fit", "one_path"), ("fit", "adamw"), ("evaluate", "adamw")]
    assert suite.calls == expected
    printed = capsys.readouterr()
    assert "it broke" in printed.err and "| shapes/adamw | 0 | step 600 of 600 |" in printed.out
    suite.calls, suite.fails = [], set()
    assert suite.main(*rows) == 0
    assert suite.calls == [("fit", "one_path"), ("evaluate", "one_path"), ("evaluate", "adamw")]
    suite.calls = []
    assert suite.main(*rows) == 0 and suite.calls == []
    assert capsys.readouterr().out.count("in the ledger") == 6


def test_two_processes_do_not_make_the_same_run(suite: Suite, capsys):
    folder = suite.root / "runs/ablation/short/seed0"
    folder.mkdir(parents=True)
    with FileLock(folder / ".sweep.lock"):
        suite.main("short", "one_path")
    assert suite.calls == [("fit", "one_path"), ("evaluate", "one_path")]
    assert "locked" in capsys.readouterr().err


def test_runs_of_another_budget_are_not_mixed_in(suite: Suite, capsys):
    suite.main("short", ledger="other.json")
    (suite.root / "other.json").unlink()
    (suite.root / "runs/ablation/short/seed0/config.yaml").write_text("trainer: {max_steps: 300}")
    suite.calls = []
    assert suite.main("short", ledger="other.json") == 1 and suite.calls == []
    error = capsys.readouterr().err
    assert "300 steps" in error and "600" in error


def test_a_row_is_trained_at_one_commit_without_changes(suite: Suite, capsys):
    suite.commit += "-dirty"
    assert suite.main("short") == 2 and suite.calls == []
    error = capsys.readouterr().err
    assert "0000000000" in error and "--allow-dirty" in error
    suite.commit = "0" * 40
    suite.fails = {("fit", "short")}
    assert suite.main("short") == 1
    suite.fails, suite.calls, suite.commit = set(), [], "1" * 40
    assert suite.main("short") == 1 and suite.calls == []  # it was begun at another
    assert "0" * 40 in capsys.readouterr().err
    ledger.append(suite.root / "ledger.json", entry("one_path", 1, 0.5) | {"train": {"commit": "2" * 40}})
    assert suite.main("one_path", ledger="ledger.json") == 1 and suite.calls == []  # so was another seed
    assert "seed 1" in capsys.readouterr().err


def test_missing_files_and_unknown_rows_are_named_before_the_first_run(suite: Suite, capsys):
    assert suite.main("short", "paint") == 2 and "shapes/paint" in capsys.readouterr().err
    (suite.root / "experiments/shapes/adamw.yaml").unlink()
    assert suite.main("short") == 2 and suite.calls == []
    assert "experiments/shapes/adamw.yaml" in capsys.readouterr().err
    (suite.root / "wrong.yaml").write_text("runs: runs/x\nrow: {}\n")
    assert sweep.main([str(suite.root / "wrong.yaml")]) == 2 and "row" in capsys.readouterr().err


def test_a_command_that_fails_says_why(tmp_path: Path):
    with pytest.raises(RuntimeError, match="paint") as error:
        sweep.call(["paint"], tmp_path / "log", 1)
    assert "status 2" in str(error.value) and "paint" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_time_of_a_step_is_that_of_a_training(tmp_path: Path, capsys):
    out = tmp_path / "out.json"
    rows = ["--rows", "shapes/short", "shapes/no_compression", "--trainer", "cpu", "--rounds", "1", "--steps", "4"]
    assert sweep.main([ABLATION, "--time", *rows, "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    short, plain = written["rows"]
    assert short["ratio"] == 1 and plain["ratio"] == pytest.approx(plain["ms"] / short["ms"])
    assert 0 < plain["parameters"] < short["parameters"] and f"{plain['ratio']:.3g}" in capsys.readouterr().out


# -- the tables --------------------------------------------------------------------------------------

SCORES = {"short": (0.50, 0.54, 0.58), "one_path": (0.41, 0.45, 0.52), "adamw": (0.60, 0.66, 0.66), "repa_clip": (0.7,)}


def ablation_rows() -> list[dict]:
    return [entry(name, seed, score) for name, scores in SCORES.items() for seed, score in enumerate(scores)]


def page(name: str, rows: list[dict], step_time: dict | None = None) -> str:
    return "\n\n".join(tables.tables(rows, step_time)[name])


def cells(text: str) -> list[dict[str, str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, line, strict=True)) for line in body]


def test_ablation_by_hand():
    ratios = {"shapes/short": 1.0, "shapes/adamw": 0.876}
    times = [{"experiment": name, "ratio": ratio, "parameters": 3_180_960} for name, ratio in ratios.items()]
    machine = {"gpu": None, "cpu": "a CPU", "cpu_cores": 2, "torch_threads": 1, "ram_gib": 8, "load_average": 0.1}
    machine |= {"torch": "2", "date": "2026-01-01T", "commit": None}
    text = page("ablation", ablation_rows(), {"rows": times, "machine": machine})
    found = cells(text)
    names = ["`shapes/short`", "`shapes/repa_clip`", "`shapes/adamw`", "`shapes/one_path`"]
    assert [line["diff"] for line in found] == names
    full, single, adamw, one = found
    assert full["GenEval"] == "0.540 ± 0.040" and full["to full"] == "" and full["seeds"] == "3"
    assert one["GenEval"] == "0.460 ± 0.056"
    assert one["to full"] == "-0.080 ± 0.017"  # of -0.09, -0.09, -0.06: seed by seed, not of the two columns
    assert adamw["to full"] == "+0.100 ± 0.020"
    assert single["GenEval"] == "0.700" and single["to full"] == "+0.200" and single["seeds"] == "1"
    assert full["CLIP score"] == "20.54 ± 0.04" and "FID-CLIP (lower is better)" not in full
    assert [line["time per step, full = 1"] for line in found] == ["1.00", "", "0.88", ""]
    assert "3.18M" in text and "a CPU" in text
    tasks = cells(page("ablation_tasks", ablation_rows()))
    assert [line["row"] for line in tasks] == [line["row"] for line in found]
    assert tasks[0]["position"] == "0.270 ± 0.020" and list(tasks[0]) == ["row", "position", "overall"]


def test_evaluation_seeds_are_averaged_before_training_seeds():
    rows = [entry("short", s, v, eval_seed=e) for s, e, v in ((0, 0, 0.1), (0, 1, 0.3), (1, 0, 0.4), (1, 1, 0.8))]
    assert tables.spread(tables.values(rows, "geneval_overall")) == pytest.approx((0.4, 0.2828), abs=1e-4)
    assert tables.spread(tables.values(rows[:2], "geneval_overall")) == pytest.approx((0.2, 0.1414), abs=1e-4)


def test_reference_holds_all_that_no_sweep_trains():
    more = [entry("distill_4step", 0, 0.9), entry("mm_edit", 0, 0.9)]  # the latter in the table of students
    text = page("reference", [*ablation_rows(), *(entry("emmdit", 0, 0.8 + e / 100, e) for e in range(3)), *more])
    found = cells(text)
    assert [line["model"] for line in found] == ["shapes/distill_4step", "shapes/emmdit"]
    assert found[1]["overall"] == "0.810 ± 0.010" and found[1]["seeds of training x evaluation"] == "1 x 3"
    assert "0000000000" in text and "abababababab" in text and "sampling steps 20" in text
    assert "of the weights" not in text and "**" not in text


def test_students_stand_below_their_teacher_and_differ_from_it_at_the_same_noise():
    teacher = [entry("mmdit_teacher", 0, score, eval_seed=e) for e, score in ((0, 0.8), (1, 0.6))]
    students = [entry("mm_edit", seed, 0.75 + seed / 100) for seed in range(3)]  # of evaluation seed 0
    others = [entry("mm_edit_linear", 0, 0.5), entry("pixart_teacher", 0, 0.9), entry("emmdit", 0, 0.9)]
    found = cells(page("students", [*students, *others, *teacher]))
    assert [line["experiment"] for line in found] == ["`shapes/mmdit_teacher`", "`shapes/mm_edit`"]
    assert [line["to its teacher"] for line in found] == ["", "-0.040 ± 0.010"]
    assert found[0]["GenEval"].startswith("0.700")
    assert "|" not in page("students", [entry("emmdit", 0, 0.9)])


def test_ablations_of_students_differ_from_them_seed_by_seed():
    rows = [entry("edit", seed, 0.5 + seed / 10) for seed in range(2)]
    rows += [entry("edit_linear", seed, 0.3 + seed / 10) for seed in range(2)] + [entry("mm_edit_linear", 0, 0.4)]
    found = cells(page("student_ablation", rows))  # mm_edit itself is missing
    assert [line["to the student"] for line in found] == ["", "-0.200 ± 0.000"]


def test_the_summary_links_to_the_experiments(tmp_path: Path):
    ledger.append(tmp_path / "ledger.json", entry("edit", 0, 0.5))
    (tmp_path / "page.md").write_text("<!-- table:summary bare -->\n<!-- end -->")
    assert tables.main([str(tmp_path / "page.md"), "--ledger", str(tmp_path / "ledger.json")]) == 0
    (line,) = cells(text := (tmp_path / "page.md").read_text())
    assert line["GenEval (shapes)"] == "0.500" and line["training steps"] == "2,000" and "0000000000" not in text
    assert line["experiment"] == "[`shapes/edit`](experiments/shapes/edit.yaml)"
    assert all((ROOT / f"experiments/{name}.yaml").is_file() for name in tables.SUMMARY)


def test_rows_that_do_not_compare_are_said_to():
    rows = ablation_rows()
    rows[1] = rows[1] | {"train": {"steps": 500}}
    assert "optimizer steps (2,000, 500)" in page("ablation", rows)
    rows[1] = rows[2] | {"settings": SETTINGS | {"sampling": {"steps": 4}}}
    assert "sampling steps (20, 4)" in page("ablation", rows)


def test_pages_are_filled_between_the_markers_alone(tmp_path: Path, capsys):
    file, options = tmp_path / "page.md", [str(tmp_path / "page.md"), "--ledger", str(tmp_path / "ledger.json")]
    for one in ablation_rows():
        ledger.append(tmp_path / "ledger.json", one)
    before, after = "# Text | with <!-- a comment -->\n\n", "\nand the end\n"
    second = "<!-- table:reference -->\n<!-- end -->"
    file.write_text(f"{before}<!-- table:ablation bare -->\nold\n<!-- end -->{after}{second}")
    assert tables.main([*options, "--check"]) == 1 and "old" in file.read_text()
    assert f"{file} " in capsys.readouterr().err
    assert tables.main(options) == 0
    text = file.read_text()
    assert text.startswith(before) and after in text and "old" not in text and "0.540 ± 0.040" in text
    assert "0000000000" not in text  # bare: without notes
    assert tables.main([*options, "--check"]) == 0
    ledger.append(tmp_path / "ledger.json", entry("one_path", 0, 0.1))
    assert tables.main([*options, "--check"]) == 1


BROKEN = {
    "<!-- table:nothing -->\n<!-- end -->": "'nothing'",
    "<!-- table:ablation -->\n": "<!-- end -->",
    "<!-- table:ablation -->\n<!-- table:reference -->\n<!-- end -->": "<!-- end -->",
}


@pytest.mark.parametrize(("text", "words"), BROKEN.items())
def test_broken_markers_name_the_page(tmp_path: Path, capsys, text: str, words: str):
    (tmp_path / "page.md").write_text(text)
    assert tables.main([str(tmp_path / "page.md"), "--ledger", str(tmp_path / "none.json")]) == 2
    error = capsys.readouterr().err
    assert words in error and "page.md" in error and (tmp_path / "page.md").read_text() == text


def test_the_docs_are_up_to_date():
    assert ROOT / "docs" / "results_shapes.md" in tables.pages()
    assert tables.main(["--check"]) == 0, "run python -m benchmarks.tables"
