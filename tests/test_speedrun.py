"""Speedruns: levels on curves made up by hand, a tiny one end to end with kills in it, and their tables."""

from __future__ import annotations

import json
import shlex
from contextlib import chdir
from pathlib import Path

import pytest
import yaml

from benchmarks import levels, speedrun, sweep, tables
from benchmarks.sweep import Sweep, joined
from emmdit.evaluation import ledger
from lightning_modules.callbacks import Evaluation
from lightning_modules.commands.main import main
from tests.command_line import EXPERIMENTS, cli
from tests.command_line import elsewhere as elsewhere
from tests.test_ledger import row
from tests.test_tables import cells

ROOT = Path(__file__).parents[1]
COMMIT = "a" * 40


def curve(*scores: float, cost: float = 1.0) -> list[dict]:
    """Evaluations every 100 samples, each 50 seconds and 100 core-seconds."""
    numbers = enumerate(scores, 1)
    return [
        {"step": n, "samples": 100 * n, "seconds": 50 * n * cost, "core_seconds": 100 * n * cost, levels.SCORE: score}
        for n, score in numbers
    ]


# -- levels ------------------------------------------------------------------------------------------


def test_a_level_counts_from_the_first_evaluation_that_reaches_it():
    found = {0: curve(0.2, 0.5, 0.4, 0.9), 1: curve(0.1, 0.2, 0.5, 0.6)}
    assert levels.reached(found[0], 0.5)["step"] == 2 and levels.reached(found[0], 0.45)["step"] == 2
    assert levels.reached(found[1], 0.61) is None
    assert levels.cost(found, 0.5, "samples") == "250 ± 71"  # of 200 and 300
    assert levels.cost(found, 0.5, "core_seconds") == "250 ± 71" and levels.cost(found, 0.5, "seconds") == "125 ± 35"
    assert levels.cost(found, 0.8, "samples") == "reached by 1 of 2 seeds"
    assert levels.cost(found, 0.95, "samples") == "not reached (best 0.90)"
    (line,) = [line for line in levels.seed_lines(found, [0.8]) if line["cost"] == "samples"]
    assert (line["seed0"], line["seed1"]) == ("400", "not reached (best 0.60)")


def test_ratios_are_of_the_same_seed_and_a_base_that_never_got_there_bounds_them():
    found = {0: curve(0.5, 0.9), 1: curve(0.2, 0.5)}
    others = {0: curve(0.1, 0.1, 0.5, cost=2), 1: curve(0.1, 0.5, 0.6, cost=2), 2: curve(0.5)}
    assert levels.ratio(found, others, 0.5, "samples") == "2.00 ± 1.41"  # 3 and 1
    assert levels.ratio(found, others, 0.5, "core_seconds") == "4.00 ± 2.83"
    assert levels.ratio({0: found[0]}, others, 0.9, "core_seconds") == "> 3.00"  # 600 at its end against 200
    assert levels.ratio(found, others, 0.9, "samples") == ""  # seed 1 has not reached it itself


def test_of_several_budgets_the_last_evaluation_of_each_counts():
    rows = [
        {"seed": 0, "budget": budget, "curve": curve(*scores)}
        for budget, scores in ((300, (0.1, 0.9, 0.6)), (100, (0.3,)), (200, (0.8, 0.4)))
    ]
    found = levels.curves(rows)
    assert [point[levels.SCORE] for point in found[0]] == [0.3, 0.4, 0.6]
    assert levels.cost(found, 0.5, "samples") == "300"
    assert levels.within(found[0], {"core_seconds": 250})["samples"] == 200
    assert levels.within(found[0], {})["samples"] == 300 and levels.within(found[0], {"samples": 50}) is None


# -- rows by options ---------------------------------------------------------------------------------


def test_options_are_laid_over_an_experiment(tmp_path: Path):
    assert joined(["--a.b 1", "--c=2 --d 3"]) == ["--a.b=1", "--c=2", "--d=3"]
    options = ["--trainer.max_steps 7 --data.init_args.batch_size 3", "--trainer.logger=false"]
    content = {"runs": "runs/x", "seeds": [0], "rows": {"few": {"label": "few", "options": options}}}
    content["rows"]["few"]["experiment"] = "shapes/short"
    task = sweep.Task(Sweep("x.yaml", content), "few", 0)
    assert task.steps() == 7 and task.config()["data"]["init_args"] == {
        **yaml.safe_load((EXPERIMENTS / "shapes/emmdit.yaml").read_text())["data"]["init_args"],
        "batch_size": 3,
        "validation_samples": 128,
    }
    assert task.fit()[-4:-1] == ["--trainer.max_steps=7", "--data.init_args.batch_size=3", "--trainer.logger=false"]
    assert task.files() == ["-c", "experiments/shapes/short.yaml"]
    assert not any("run_name" in part for part in task.fit())  # there is no logger


def test_the_sweep_of_changes_is_for_this_command_alone(capsys):
    assert sweep.main([str(EXPERIMENTS / "sweeps/speedrun.yaml")]) == 2
    assert "benchmarks.speedrun" in capsys.readouterr().err
    found = Sweep(EXPERIMENTS / "sweeps/speedrun.yaml")
    assert found.compare in found.rows
    assert {row.experiment for row in found.rows.values()} <= {"shapes/speedrun"}


# -- a tiny speedrun ---------------------------------------------------------------------------------

TINY = f"""
base: {EXPERIMENTS}/shapes/short.yaml
model:
  init_args:
    denoiser: {{init_args: {{num_attention_heads: 2, attention_head_dim: 16, block_groups: [1, 1, 1]}}}}
    sampling: {{steps: 1, guidance: 1.0}}
data: {{init_args: {{batch_size: 4, validation_samples: 4}}}}
trainer: {{max_steps: 2, val_check_interval: 2, logger: false}}
checkpoint: {{every_n_train_steps: 1}}
"""
EVALUATED = """
base: plain.yaml
trainer:
  callbacks:
    - class_path: lightning_modules.callbacks.Evaluation
      init_args:
        every_n_steps: 1
        prompts: {class_path: emmdit.shapes.ShapesPrompts, init_args: {per_task: 1, images: 1}}
        metrics:
          - {class_path: emmdit.evaluation.GenEval, init_args: {detector: {class_path: emmdit.shapes.ShapesDetector}}}
"""


class Tiny:
    """The command in a folder of its own; trainings run in this process, or are made up."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.calls, self.trains = folder, [], True
        self.commands: list[list[str]] = []
        (folder / "plain.yaml").write_text(TINY)
        (folder / "tiny.yaml").write_text(EVALUATED)
        monkeypatch.setattr(sweep, "call", self.call)
        monkeypatch.setattr(sweep, "git_commit", lambda: COMMIT)
        monkeypatch.setattr(speedrun, "source_id", lambda: COMMIT[:8])

    def call(self, command: list[str], log: Path, threads: int | None) -> None:
        self.calls.append((log.parents[2].relative_to(self.folder / "runs").as_posix(), log.parent.name))
        self.commands.append(command)
        if self.trains:
            with chdir(ROOT):
                main(command)
            return
        found = {"ledger_metrics": {levels.SCORE: 0.5}, "prompts": {}}
        for step in (1, 2):
            file = log.parent / f"evaluation/step_{step:07d}/x/evaluation.json"
            file.parent.mkdir(parents=True)
            training = {"samples": 4 * step, "seconds": step, "core_seconds": step}
            file.write_text(json.dumps(found | {"step": step, "training": training}))

    def main(self, *options: str, status: int = 0) -> list[dict]:
        """The rows of the ledger."""
        given = f"--levels 0 0.99 --trainer cpu --ledger {self.folder}/ledger.json --runs {self.folder}/runs"
        assert speedrun.main([f"{self.folder}/tiny.yaml", *shlex.split(given), *options]) == status
        return ledger.read(self.folder / "ledger.json")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    return Tiny(tmp_path, monkeypatch)


class Killed(BaseException):
    pass


def test_a_killed_speedrun_goes_on_and_does_nothing_twice(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys):
    """Killed in the evaluation of step 1, then in that of the last step, both after the checkpoint of that step."""
    write, kills = Evaluation._write, [1, 2]

    def die(self, trainer, pl_module, images, scores, step):
        if kills and step == kills[0]:
            raise Killed(kills.pop(0))
        write(self, trainer, pl_module, images, scores, step)

    monkeypatch.setattr(Evaluation, "_write", die)
    for _ in range(2):
        with pytest.raises(Killed):
            tiny.main("--seeds", "0", "1")
    assert not (tiny.folder / "ledger.json").exists()
    rows = tiny.main("--seeds", "0", "1")
    assert tiny.calls == [("tiny", "seed0")] * 3 + [("tiny", "seed1")]
    for one, seed in zip(rows, (0, 1), strict=True):
        assert (one["experiment"], one["seed"]) == ("tiny", seed) and one["metrics"][levels.SCORE] >= 0
        assert [(point["step"], point["samples"]) for point in one["curve"]] == [(1, 4), (2, 8)]
        first, last = one["curve"]
        assert 0 < first["seconds"] < last["seconds"] and 0 < first["core_seconds"] < last["core_seconds"]
        assert one["train"] == {"steps": 2, "commit": COMMIT} and one["commit"] == COMMIT
        assert one["settings"]["prompts"]["prompts"] == 6 and one["machine"]["cpu"]
        assert one["difference"]["data.batch_size"] == 4 and "model.text" not in one["difference"]
    found = cells(capsys.readouterr().out.split("## tiny")[1])
    assert found[2] == {"GenEval": "0", "cost": "samples", "seed 0": "4", "seed 1": "4", "mean": "4 ± 0"}
    assert found[5]["mean"].startswith("not reached (best 0.")
    tiny.calls.clear()
    tiny.main("--seeds", "1", "0")
    assert tiny.calls == []


def test_experiments_take_turns_and_a_level_ends_a_run(tiny: Tiny, capsys):
    rows = tiny.main("--seeds", "3", "--compare", f"{tiny.folder}/plain.yaml", "--stop", "0")
    assert [len(one["curve"]) for one in rows] == [1, 1]  # at step 1 of 2
    printed = capsys.readouterr().out.split("against plain")[1].split("##")[0]
    (line,) = [line for line in cells(printed) if line["GenEval"] == "0"]
    assert line["samples, times less than the base"] == "1.00" and line["samples"] == "4"
    rows = tiny.main("--seeds", "3")  # without the stop it goes on
    assert [len(one["curve"]) for one in rows] == [1, 2]
    tiny.trains = False
    tiny.calls.clear()
    tiny.main("--seeds", "4", "5", "--compare", f"{tiny.folder}/plain.yaml")
    assert tiny.calls == [(name, seed) for seed in ("seed4", "seed5") for name in ("tiny", "plain")]


def test_each_budget_is_a_run_whose_schedule_ends_with_it(tiny: Tiny):
    tiny.trains = False
    rows = tiny.main("--seeds", "0", "--steps", "1", "2")
    assert tiny.calls == [("tiny/1_steps", "seed0"), ("tiny/2_steps", "seed0")]
    assert [(one["of"], one["budget"]) for one in rows] == [("tiny", 1), ("tiny", 2)]
    assert rows[1]["difference"]["model.scheduler.total"] == rows[1]["difference"]["trainer.max_steps"] == 2
    with chdir(ROOT):
        run = cli(*tiny.commands[1][1:-1])  # all but --ckpt_path
    (callback,) = (callback for callback in run.trainer.callbacks if isinstance(callback, Evaluation))
    assert run.trainer.max_steps == 2 and callback.every_n_steps == 0  # the last evaluation alone counts
    assert run.config.model.init_args.scheduler.init_args.total == 2


def test_seeds_of_one_row_are_of_one_commit(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys):
    tiny.trains = False
    tiny.main("--seeds", "0", "--stop", "0")
    monkeypatch.setattr(sweep, "git_commit", lambda: "b" * 40)
    monkeypatch.setattr(speedrun, "source_id", lambda: "b" * 8)
    tiny.main("--seeds", "0", "1", "--stop", "0", status=1)
    assert "--again" in capsys.readouterr().err and len(tiny.calls) == 1
    rows = tiny.main("--seeds", "0", "1", "--stop", "0", "--again")
    assert {one["train"]["commit"] for one in rows} == {"b" * 40} and len(tiny.calls) == 3
    monkeypatch.setattr(sweep, "git_commit", lambda: "c" * 40 + "-dirty")
    tiny.main("--seeds", "2", status=2)
    assert "--allow-dirty" in capsys.readouterr().err


def test_files_that_cannot_be_raced_are_named(tiny: Tiny, capsys):
    assert speedrun.main([f"{tiny.folder}/plain.yaml"]) == 2 and "Evaluation" in capsys.readouterr().err
    assert speedrun.main(["nowhere.yaml"]) == 2 and "nowhere.yaml" in capsys.readouterr().err
    assert speedrun.main([str(EXPERIMENTS / "sweeps/speedrun.yaml"), "--rows", "paint"]) == 2
    assert "paint" in capsys.readouterr().err


# -- tables ------------------------------------------------------------------------------------------


def run(name: str, seed: int, points: list[dict], **more) -> dict:
    points = [point | {"clip_score": 30.0} for point in points]
    train = {"steps": 4, "commit": COMMIT, "val_loss_ema": 0.2, "val_caption_gain": 0.05 + seed / 100}
    own = {"of": name, "budget": None, "curve": points, "train": train, "metrics": points[-1], "settings": {}}
    return row(name, seed, commit=COMMIT) | own | more


def test_the_record_against_the_base():
    runs = [run("shapes/speedrun", seed, curve(0.5, 0.9)) for seed in (0, 1)]
    runs += [run("shapes/emmdit", seed, curve(0.1, 0.2, 0.5, cost=2)) for seed in (0, 1)]
    runs += [run("shapes/speedrun/1_steps", 0, curve(0.8), of="shapes/speedrun", budget=1)]
    text = "\n\n".join(tables.tables([], runs=runs)["speedrun"])
    found = {(line["run"], line["GenEval"]): line for line in cells(text)}
    line = found["record", "0.5"]
    assert (line["core-seconds"], line["samples"], line["seeds"]) == ("100 ± 0", "100 ± 0", "2")
    assert line["core-seconds, times less than the base"] == "6.00 ± 0.00"
    assert found["record", "0.9"]["core-seconds, times less than the base"] == "> 3.00 ± 0.00"
    assert found["base", "0.8"]["samples"] == "not reached (best 0.50)"
    assert found["record, a run for each budget", "0.8"]["samples"] == "100"
    assert f"trained at {COMMIT[:10]}" in text


def test_changes_at_a_budget(monkeypatch: pytest.MonkeyPatch):
    base, other, *_ = tables.CHANGES.rows
    runs = [run(base, seed, curve(0.2, 0.4 + seed / 10)) for seed in (0, 1)]
    runs += [run(other, seed, curve(0.3, 0.3 + seed / 10, cost=1.5)) for seed in (0, 1)]
    first, second = cells("\n".join(tables.tables([], runs=runs)["changes"]))
    assert (first["GenEval"], first["core-seconds"], first["caption gain"]) == ("0.450 ± 0.071", "200", "0.055 ± 0.007")
    assert second["to the base"] == "-0.100 ± 0.000" and second["core-seconds, base = 1"] == "1.500 ± 0.000"
    monkeypatch.setattr(tables.CHANGES, "budget", {"core_seconds": 200})
    _, second = cells("\n".join(tables.tables([], runs=runs)["changes"]))
    assert second["GenEval"].startswith("0.300") and second["samples"] == "100"


BAD = [
    ({"commit": "b" * 40}, "b" * 40),
    ({"commit": COMMIT + "-dirty"}, "-dirty"),
    ({"commit": f"{COMMIT}, {'c' * 40}"}, "c" * 40),  # resumed elsewhere
    ({}, "unknown"),
]


@pytest.mark.parametrize(("train", "words"), BAD)
def test_seeds_of_different_or_uncommitted_sources_are_no_row(train: dict, words: str):
    rows = [row("x", 0, train={"commit": COMMIT}, commit=COMMIT), row("x", 1, train=train)]
    with pytest.raises(ValueError, match="x was trained at") as error:
        tables.tables(rows)
    assert words in str(error.value)
    tables.tables([row("x", 0, train={"steps": 3}, commit=COMMIT + "-dirty"), row("x", 1)])  # from before the rule
    with pytest.raises(ValueError, match="uncommitted"):
        tables.tables([row("x", 0, train={"commit": COMMIT}, commit=COMMIT + "-dirty")])
