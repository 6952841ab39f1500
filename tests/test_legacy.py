"""Folders and configurations of older versions."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path

import torch

import emmdit
from emmdit import TextToImagePipeline
from emmdit.legacy import CLASSES, modernize, modernize_run
from lightning_modules.commands.load_model import open_model

ASSETS = Path(__file__).parents[1] / "assets"
OLD = {  # of model_index.json, as version 0.1.0 wrote it
    "_class_name": "EMMDiTPipeline",
    "transformer": ["emmdit.networks.emmdit", "EMMDiTTransformer2DModel"],
    "text": {"class_path": "emmdit.encoders.ShapesText", "init_args": {"max_length": 12, "pretrained": True}},
    "sampling": {"steps": 4, "guidance": 3.0, "guidance_interval": [0.0, 1000.0], "grid": "nitro", "shift": 1.0},
}


def test_a_folder_of_an_older_version_gives_the_same_images(tmp_path: Path) -> None:
    folder = shutil.copytree(ASSETS / "shapes_emmdit", tmp_path / "old")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | OLD))
    old, new = (TextToImagePipeline.from_pretrained(path) for path in (folder, ASSETS / "shapes_emmdit"))
    call = dict(prompt="a photo of a red circle", num_inference_steps=4, output_type="pt")
    assert old.sampling == new.sampling.replace(steps=4)
    assert torch.equal(old(**call).images, new(**call).images)
    old.save_pretrained(tmp_path / "new")
    saved = json.loads((tmp_path / "new/model_index.json").read_text())
    assert saved["_class_name"] == "TextToImagePipeline" and saved["sampling"]["schedule"] == "flow_match_euler"
    assert open_model(folder).sampling == open_model(tmp_path / "new").sampling  # no stock pipeline of diffusers
    assert emmdit.EMMDiTPipeline is TextToImagePipeline


def test_a_run_config_of_an_older_version() -> None:
    sampling = {"class_path": "emmdit.generate.Sampling", "init_args": {"grid": "ddpm", "steps": 20}}
    old = {
        "model": {"init_args": {"text": OLD["text"], "sampling": sampling, "path": None}},
        "data": {
            "init_args": {"licence": "cc0", "prompts": ["nitro", {"class_path": "emmdit.evaluation.ShapesPrompts"}]}
        },
    }
    new = modernize(old)
    assert new["model"]["init_args"]["text"]["class_path"] == "emmdit.shapes.ShapesText"
    assert new["model"]["init_args"]["sampling"]["init_args"] == {"schedule": "ddpm", "steps": 20}
    prompts = ["nitro", {"class_path": "emmdit.shapes.ShapesPrompts"}]  # a prompt is no setting
    assert new["data"]["init_args"] == {"license": "cc0", "prompts": prompts}
    assert "grid" in sampling["init_args"] and modernize(new) == new


def test_repa_of_an_older_run_has_its_block_and_widths() -> None:
    network = {"block_groups": [2, 4, 2], "repa_feature_dim": 128, "repa_projector_dim": 256, "repa_depth": None}
    losses = [{"class_path": "emmdit.losses.REPA", "init_args": {"weight": 0.5}}]
    config = {"model": {"init_args": {"denoiser": {"init_args": network}, "components": losses}}}
    new = modernize_run(config)["model"]["init_args"]
    expected = {"block": "blocks.1", "feature_dim": 128, "projector_dim": 256, "weight": 0.5}
    assert new["components"][0]["init_args"] == expected
    assert new["denoiser"]["init_args"] == {"block_groups": [2, 4, 2]}
    assert modernize_run(modernize_run(config)) == modernize_run(config)


def test_every_new_class_path_exists() -> None:
    for path in CLASSES.values():
        module, _, name = path.rpartition(".")
        assert hasattr(import_module(module or "emmdit"), name), path
