"""A small run folder, and commands that end in a sentence."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_modules.commands.main import main
from lightning_modules.runs import build_module

ROOT = Path(__file__).parents[1]
CONFIG = yaml.safe_load("""
model:
  class_path: lightning_modules.TextToImage
  init_args:
    denoiser:
      class_path: emmdit.networks.EMMDiTTransformer2DModel
      init_args: {sample_size: 8, in_channels: 32, out_channels: 32, num_attention_heads: 2, attention_head_dim: 16,
        block_groups: [1, 1, 1], caption_channels: 64, compression_ratios: [2, 4],
        subregion_pattern: [full], pos_embed_max_size: 16}
    codec: {class_path: emmdit.encoders.DCTCodec, init_args: {whitening: 0.25}}
    text: {class_path: emmdit.shapes.ShapesText, init_args: {max_length: 12}}
    path: {class_path: emmdit.flow.RectifiedFlow}
    sampling: {steps: 1, guidance: 1.0}
""")
MODEL = ROOT / "assets/shapes_emmdit"
SMALL = ["--prompt", "a photo of a star", "--device", "cpu", "--steps", "1"]


def told(capsys: pytest.CaptureFixture, *arguments: Any) -> str:
    """The one sentence with which a command ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 2
    said = capsys.readouterr().err.partition("\n(EMMDIT_TRACEBACK")[0].splitlines()[-1]
    assert said.startswith(f"emmdit {arguments[0]}: ") and said.endswith(".") and len(said) < 900
    return said


def save(path: Path, network: torch.nn.Module, step: int) -> str:
    """A checkpoint file of a run; returns its sha256."""
    state = {f"denoiser.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state, "global_step": step, "samples_seen": 4 * step}, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_run(folder: Path) -> Path:
    """A run folder with a checkpoint of step 3."""
    (folder / "checkpoints").mkdir(parents=True)
    configure(folder)
    save(folder / "checkpoints/last.ckpt", build_module(CONFIG).build_denoiser(), 3)
    return folder


def configure(run: Path, **sections: Any) -> None:
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | sections))


def arguments(**changes: Any) -> dict[str, Any]:
    """The model section of the run's config with other arguments."""
    return {**CONFIG["model"], "init_args": CONFIG["model"]["init_args"] | changes}
