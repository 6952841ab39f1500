"""Readers of weights, pipelines, run folders and configurations."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from emmdit.networks import EMMDiTTransformer2DModel, load_nitro_e, save_nitro_e
from tests.fuzz.target import target, write_json
from tests.tiny_run import CONFIG as SMALL_RUN

# -- weights -------------------------------------------------------------------------------------------

STATE = {f"{part}.{name}": torch.ones(2, 3) for part in ("denoiser", "ema_denoiser") for name in ("a", "b")}


@cache
def tiny_network() -> EMMDiTTransformer2DModel:
    torch.manual_seed(0)
    sizes = dict(sample_size=16, in_channels=2, out_channels=2, num_attention_heads=1, attention_head_dim=16)
    sizes |= dict(block_groups=(1, 1, 1), caption_channels=2, pos_embed_max_size=16, ff_ratio=0.5)
    return EMMDiTTransformer2DModel(**sizes).eval()


def make_safetensors(folder: Path) -> None:
    tensors = {"a": torch.ones(2, 3), "projectors.0.0.weight": torch.ones(2), "c": torch.ones(3, dtype=torch.bfloat16)}
    save_file(tensors, folder / "weights.safetensors", {"format": "pt"})


@target(make_safetensors, cost=0.5)
def safetensors(folder: Path) -> None:
    from emmdit.weights import component_weights, read_weights

    file = folder / "weights.safetensors"
    sum(tensor.float().sum() for tensor in read_weights(file)[0].values())
    component_weights(file, "repa")


@target(lambda folder: save_nitro_e(tiny_network(), folder / "nitro.safetensors"), cost=5)
def nitro_e(folder: Path) -> None:
    load_nitro_e(folder / "nitro.safetensors", 512)


def make_checkpoint(folder: Path) -> None:
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    torch.save({"state_dict": STATE, "global_step": 3, "samples_seen": 12, "loops": {}}, checkpoints / "step=3.ckpt")
    (checkpoints / "last.ckpt").symlink_to("step=3.ckpt")


def open_checkpoint(folder: Path) -> None:
    from emmdit.weights import checkpoint_progress, component_weights, find_checkpoint, read_weights

    state, _ = read_weights(folder)
    sum(tensor.float().sum() for tensor in state.values())
    checkpoint_progress(find_checkpoint(folder))
    component_weights(folder, "repa")


@target(make_checkpoint, cost=3)
def checkpoint(folder: Path) -> None:
    open_checkpoint(folder)


def make_sharded(folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    path = folder / "checkpoints/last.ckpt"
    with warnings.catch_warnings(action="ignore"):  # no process group
        dcp.save({"state_dict": STATE, "optimizer_0": {"lr": 0.1}}, checkpoint_id=path, no_dist=True)
    torch.save({"global_step": 3, "samples_seen": 12}, path / "meta.pt")


@target(make_sharded, cost=8)
def sharded(folder: Path) -> None:
    from emmdit.checkpoint_reader import load_sharded

    open_checkpoint(folder)
    load_sharded({"optimizer_0": {"lr": 0.0}}, folder / "checkpoints/last.ckpt", no_dist=True)


def make_metadata(folder: Path) -> None:
    make_sharded(folder)
    (folder / "checkpoints/last.ckpt/meta.pt").unlink()


@target(make_metadata, cost=1)
def metadata(folder: Path) -> None:
    from emmdit.checkpoint_reader import read_metadata

    read_metadata(folder / "checkpoints/last.ckpt/.metadata")


@target(lambda folder: tiny_network().save_pretrained(folder), cost=15)
def diffusers_network(folder: Path) -> None:
    from emmdit.weights import read_weights

    read_weights(folder, network_class=EMMDiTTransformer2DModel)


def make_pipeline(folder: Path) -> None:
    from emmdit import TextToImagePipeline
    from emmdit.encoders import DCTCodec

    codec = {"class_path": "emmdit.encoders.DCTCodec", "init_args": {"block_size": 4, "channels": 2}}
    text = {"class_path": "emmdit.shapes.ShapesText", "init_args": {"max_length": 12}}
    vae = DCTCodec(block_size=4, channels=2).components()["vae"]
    sampling = {"steps": 2, "guidance": 2.0, "guidance_interval": [0.0, 900.0]}
    pipeline = TextToImagePipeline(tiny_network(), vae, None, None, codec=codec, text=text, sampling=sampling)
    pipeline.save_pretrained(folder)


@target(make_pipeline, cost=40)
def pipeline(folder: Path) -> None:
    from lightning_modules.commands.load_model import open_model

    open_model(folder)


@target(lambda folder: write_json(folder / "transformer/config.json", dict(tiny_network().config)), cost=1)
def model_config(folder: Path) -> None:
    from emmdit.encoders.loading import read_config

    read_config(str(folder), "transformer")


def make_reference(folder: Path) -> None:
    from emmdit.evaluation.metrics.reference import write_reference

    rng = np.random.default_rng(0)
    arrays = {"mu": rng.random(3), "sigma": rng.random((3, 3)), "feats": rng.random((2, 3))}
    write_reference(folder / "reference.npz", arrays, {"features": {"name": "clean"}})


@target(make_reference, cost=2)
def reference(folder: Path) -> None:
    from emmdit.evaluation.metrics.reference import read_reference

    read_reference(folder / "reference.npz", ("mu", "sigma"))
    read_reference(folder / "reference.npz", ("feats",))


# -- configurations ------------------------------------------------------------------------------------


@target(lambda folder: (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG)), cost=30)
def run_folder(folder: Path) -> None:
    from emmdit.bounded import BoundedMemory
    from lightning_modules.runs import build_module, latest_config, read_config

    config = read_config(folder)
    with BoundedMemory(1 << 20):  # of a checkpoint beside it, see `load_pipeline`
        build_module(config, latest_config(folder))


def make_configs(folder: Path) -> None:
    (folder / "sub").mkdir()
    change = {"base": ["../base.yaml"], "model": {"lr": 2}, "steps": 4}
    (folder / "sub/change.yaml").write_text(yaml.safe_dump(change))
    base = {"model": {"lr": 0.1, "betas": [0.9, 0.99], "name": "x"}, "steps": 3, "total": "${steps}"}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))


@cache
def config_parser() -> Any:
    from jsonargparse import ActionConfigFile

    from lightning_modules.commands.config_files import ConfigParser

    parser = ConfigParser(parser_mode="omegaconf+", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile)
    parser.add_argument("--model.lr", type=float, default=0.1)
    parser.add_argument("--model.betas", type=tuple[float, float], default=(0.9, 0.99))
    parser.add_argument("--model.name", type=str | None)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--total", type=int, default=1)
    return parser


@target(make_configs, cost=8, reads="anything", named=False)  # files of one's own
def config_files(folder: Path) -> None:
    from omegaconf.errors import OmegaConfBaseException

    try:
        config_parser().parse_args(["-c", str(folder / "sub/change.yaml")])
    except OmegaConfBaseException as error:  # as `fit` does
        raise ValueError(str(error)) from error


CONFIG = SMALL_RUN | {"trainer": {"max_steps": 3}}
