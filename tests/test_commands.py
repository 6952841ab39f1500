"""`emmdit import-nitro-e` and what the command line says to a stranger."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from emmdit import EMMDiTPipeline
from emmdit.files import read_settings
from lightning_modules.commands.main import COMMANDS, LIGHTNING, USAGE, main, normalized

GOLDEN = Path(__file__).parent / "data/emmdit/emmdit_512_small.weights.safetensors"
STANDINS = ("--text-encoder", "standin:llama?caption_channels=24", "--autoencoder", "standin:dc_ae")


def test_a_released_file_becomes_a_folder_that_generates_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = str(tmp_path / "folder")
    main(["import-nitro-e", str(GOLDEN), "--out", folder, *STANDINS, "--steps", "2"])
    assert "566,976" in capsys.readouterr().out
    pipeline = EMMDiTPipeline.from_pretrained(folder)
    weight = load_file(GOLDEN)["pos_embed.proj.weight"]
    assert torch.equal(pipeline.transformer.patch_embed.weight, weight)
    assert (pipeline.sampling.steps, pipeline.sampling.guidance) == (2, 4.5)

    common = ("--prompt", "a lighthouse", "--seed", "3", "--steps", "1", "--guidance", "1")
    main(["sample", "--ckpt", folder, "--out", str(tmp_path / "a"), *common])
    main(["sample", "--ckpt", str(GOLDEN), *STANDINS, "--out", str(tmp_path / "b"), *common])
    a, b = (np.asarray(Image.open(tmp_path / name / "00000.png")).astype(int) for name in "ab")
    assert a.shape == (512, 512, 3) and a.std() > 0
    assert abs(a - b).max() <= 1 and read_settings(tmp_path / "b/00000.png")["steps"] == 1

    with pytest.raises(SystemExit) as end:
        main(["sample", "--ckpt", folder, "--prompt", "x", "--out", str(tmp_path), "--height", "96"])
    assert end.value.code == 2
    assert "3 x 16" in capsys.readouterr().err


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture) -> None:
    main([])
    assert capsys.readouterr().out == USAGE
    assert all(f"\n  {command} " in USAGE for command in (*LIGHTNING, *COMMANDS))
    with pytest.raises(SystemExit):
        main(["trian"])
    assert "'trian'" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_one_flag_style_and_a_help_text_for_each_option(
    command: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"emmdit {command}" in text and ("--out" in text or command == "runs")
    assert not re.findall(r"^ +(--\w+-\S+)", text, re.MULTILINE)
    if command not in ("precompute", "generate-dataset", "inspect-data"):  # class options: their help is the class'
        entries = re.split(r"(?m)^  (?=-)", text)[1:]
        assert not [entry for entry in entries if re.fullmatch(r"--?\w+(, --?\w+)?( \S+)*\s*", entry)]


def test_option_names_are_normalized_and_values_are_not() -> None:
    given = ["--num-images", "2", "--like-this=a-b", "--non-finite.some-key=x-y", "-c", "a-b.yaml", "--", "--as-is"]
    expected = ["--num_images", "2", "--like_this=a-b", "--non_finite.some-key=x-y", "-c", "a-b.yaml", "--", "--as-is"]
    assert normalized(given) == expected


def test_the_overview_does_not_wait_for_torch() -> None:
    code = "import sys; from lightning_modules.commands.main import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "lightning", "diffusers", "mlflow"} & set(done.stdout.splitlines()[-1].split())
