"""Config files that name their bases, prompt files, and run folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from emmdit.config_text import read_yaml
from lightning_modules.commands.config_files import config_files, default_run_dir, with_bases
from lightning_modules.commands.main import main
from tests.command_line import EXPERIMENTS, ON_CPU, SHAPES, change, cli, files
from tests.command_line import elsewhere as elsewhere


def names(*arguments: str) -> list[str]:
    return [Path(file).stem for file in config_files(with_bases(arguments))]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    bases = {"a": None, "b": "a.yaml", "c": ["b.yaml"], "sub/d": ["../a.yaml", "../b.yaml"]}
    for name, base in bases.items():
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# what it is\n{'' if base is None else f'base: {base}'}\nseed_everything: 1\n")
    return tmp_path


def test_bases_come_first_and_once(tree: Path) -> None:
    assert names("fit", "-c", "c.yaml", "--x=1") == ["a", "b", "c"]
    assert names("-c", "a.yaml", "-c", "c.yaml") == names("-c", "c.yaml") == ["a", "b", "c"]
    assert names("-csub/d.yaml") == ["a", "b", "d"]
    assert names("--config=sub/d.yaml", "-c=c.yaml") == ["a", "b", "d", "c"]  # relative to the file, shared bases once
    assert names("-c", "c.yaml", "-c", "a.yaml") == ["a", "b", "c", "a"]  # what is given is laid over what was before
    assert with_bases(["fit", "-c", "a.yaml", "--ckpt_path", "last", "-c"]) == [
        "fit", "-c", "a.yaml", "--ckpt_path", "last", "-c"
    ]  # fmt: skip


def test_a_missing_base_and_a_cycle_are_one_sentence(tree: Path, capsys: pytest.CaptureFixture) -> None:
    for name, base, words in (
        ("missing", "nowhere.yaml", "nowhere.yaml"),
        ("cycle", "[c.yaml, loop.yaml]", "loop.yaml"),
        ("loop", "cycle.yaml", "cycle.yaml"),
        ("itself", "itself.yaml", "itself.yaml"),
        ("number", "3", "base"),
    ):
        Path(f"{name}.yaml").write_text(f"base: {base}\n")
        if name == "cycle":
            continue
        with pytest.raises(SystemExit) as ended:
            main(["fit", "-c", f"{name}.yaml"])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and f"{name}.yaml" in error and words in error
        assert len(error.splitlines()) == 2  # the sentence, and how to see the traceback


def test_a_base_is_parsed_as_if_it_were_given(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    diff = f"base: {EXPERIMENTS / SHAPES}\ntrainer: {{max_steps: 7}}\n"
    (tmp_path / "block.yaml").write_text(f"base:\n  - {EXPERIMENTS / SHAPES}\ntrainer: {{max_steps: 7}}\n")
    alone = cli(*change(diff, "diff.yaml"), *ON_CPU)
    options = [*ON_CPU, "--trainer.default_root_dir=runs/diff"]
    given = cli(*files(SHAPES), *change("trainer: {max_steps: 7}", "plain.yaml"), *options)
    block = cli("-c", "block.yaml", *options)
    text, *others = (run.parser.dump(run.config, skip_none=False) for run in (alone, given, block))
    assert others == [text, text] and "max_steps: 7" in text and "default_root_dir: runs/diff" in text
    assert "base" not in yaml.safe_load(text)  # complete: what a run saves can be read back from anywhere
    with pytest.raises(SystemExit):
        cli(*change(diff, "diff.yaml"), "--print_config", command="fit")
    assert "base" not in yaml.safe_load(capsys.readouterr().out)


def test_run_folders_are_named_after_the_last_experiment_given() -> None:
    assert default_run_dir(["experiments/shapes/emmdit.yaml", "experiments/trainer/gpu.yaml"]) == "runs/shapes/emmdit"
    assert default_run_dir(["experiments/a.yaml", "/a/experiments/shapes/one_path.yaml"]) == "runs/shapes/one_path"
    for command in (None, "fit"):  # and the command line really finds the files
        run = cli(*files("shapes/one_path.yaml", "trainer/cpu.yaml"), command=command)
        assert run.trainer.default_root_dir == "runs/shapes/one_path"
        assert run.trainer.checkpoint_callback.dirpath.endswith("runs/shapes/one_path/checkpoints")


def test_prompts_may_be_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml/prompts.txt").write_text("a photo of a star\n\n  two squares \n")
    (tmp_path / "yaml/grid.yaml").write_text(f"base: {EXPERIMENTS / SHAPES}\nsamples: {{prompts: prompts.txt}}\n")
    run = cli("-c", "yaml/grid.yaml", *ON_CPU)  # the path is relative to the YAML
    saved = yaml.safe_load(run.parser.dump(run.config))
    assert saved["samples"]["prompts"] == ["a photo of a star", "two squares"]
    listed = cli(*files(SHAPES), *ON_CPU, "--samples.prompts=[a photo of a circle, two squares]")
    assert listed.config.samples.prompts == ["a photo of a circle", "two squares"]
    with pytest.raises(SystemExit):
        main(["fit", *files(SHAPES), *change("samples: {prompts: nowhere.txt}")])
    assert "nowhere.txt" in capsys.readouterr().err


ALIASES = {
    "sequences": "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9 if i else 1}]\n" for i in range(12)),
    "merge keys": "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40)),
}
BROKEN = {
    "a: 1\nb: [1, 2\n": ("line 3, column 1", "line 2, column 4"),
    "a: 1\n b: 2": ("line 2",),
    "a: 1\na: 2\n": ("line 2", "'a'"),
    "- a\n- b\n": ("list",),
    "# nothing\n": ("empty",),
    "true: 1\n": ("True",),
    "a: !!python/object/apply:os.system [x]": ("line 1", "os.system"),
    "a: !!bool 3": ("'3'",),
    "a: \0": ("#x0000",),
    "a: *b": ("line 1, column 4",),
    "&a [*a]": ("line 1",),
    "[" * 100_000: ("levels",),
    "- " * 100_000: ("levels",),
    "a: [" + "1, " * 200_000 + "]": ("100,000",),
    ALIASES["sequences"]: ("100,000",),
    ALIASES["merge keys"]: ("100,000",),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:20])
def test_broken_and_boundless_yaml_is_one_sentence_that_names_file_and_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        read_yaml(tmp_path / "x.yaml")
    told = str(caught.value)
    assert all(words in told for words in ("x.yaml", *BROKEN[text])) and "\n" not in told and told.endswith(".")


def test_yaml_is_read_as_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes("\ufeffa: &a {b: 1}\nc: {<<: *a, d: ü}\ne: [*a, *a]\n".encode())
    assert read_yaml(file) == {"a": {"b": 1}, "c": {"b": 1, "d": "ü"}, "e": [{"b": 1}] * 2}
    file.write_bytes("a: ü".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        read_yaml(file)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_yaml(tmp_path / "nowhere.yaml")
