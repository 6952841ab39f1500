"""`emmdit import-nitro-e` and what the command line says to a stranger."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from emmdit import EMMDiTPipeline
from lightning_modules.commands.main import USAGE, main

GOLDEN = Path(__file__).parent / "data/emmdit/emmdit_512_small.weights.safetensors"
STANDINS = ("--text-encoder", "standin:llama?caption_channels=24", "--autoencoder", "standin:dc_ae")


def test_a_released_file_becomes_a_folder_that_draws(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["import-nitro-e", str(GOLDEN), "--out", str(tmp_path / "folder"), *STANDINS, "--steps", "2"])
    assert "572,088" in capsys.readouterr().out

    pipeline = EMMDiTPipeline.from_pretrained(tmp_path / "folder")
    weight = load_file(GOLDEN)["pos_embed.proj.weight"]
    assert torch.equal(pipeline.transformer.patch_embed.weight, weight)
    assert (pipeline.sampling.steps, pipeline.sampling.guidance) == (2, 4.5)

    out = tmp_path / "pictures"
    main(["sample", "--ckpt", str(tmp_path / "folder"), "--prompt", "a lighthouse", "--out", str(out), "--seed", "3"])
    image = np.asarray(Image.open(out / "00000.png"))
    assert image.shape == (512, 512, 3) and image.std() > 0


def test_a_size_that_does_not_fit_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["import-nitro-e", str(GOLDEN), "--out", str(tmp_path / "folder"), *STANDINS])
    with pytest.raises(SystemExit) as end:
        main(["sample", "--ckpt", str(tmp_path / "folder"), "--prompt", "x", "--out", str(tmp_path), "--height", "96"])
    assert end.value.code == 2
    assert "3 x 16" in capsys.readouterr().err


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture) -> None:
    main([])
    assert capsys.readouterr().out == USAGE
    for command in ("fit", "validate", "sample", "export", "import-nitro-e"):
        assert f"\n  {command} " in USAGE
    with pytest.raises(SystemExit):
        main(["trian"])
    assert "'trian'" in capsys.readouterr().err
