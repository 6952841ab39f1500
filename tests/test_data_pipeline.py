"""Real photographs from the hub to samples through the commands, and prompts to a dataset."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import datasets
import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from emmdit.data.images import load_image
from emmdit.data.precompute.generate import Prompts, generate
from emmdit.data.precompute.latents import LatentsDataset
from emmdit.data.readers.open import open_source
from emmdit.encoders import DCAE
from lightning_modules.commands.main import main
from tests.command_line import change, files
from tests.command_line import elsewhere as elsewhere
from tests.test_precompute import jpeg

CAPTIONS = {
    "china": "a photo of a tower with tiled roofs above a lake and trees",
    "flower": "a photo of an orange dahlia in front of dark leaves",
    "hopper": "a portrait of a woman in naval uniform before a flag",
}
TINY = """
model:
  init_args:
    denoiser:
      init_args:
        {num_attention_heads: 2, attention_head_dim: 16, block_groups: [1, 1, 1], caption_channels: 64}
    codec: {init_args: {source: "standin:dc_ae?downsample=8", downsample: 8}}
    text: {init_args: {source: "standin:llama?caption_channels=64", caption_channels: 64, max_length: 32}}
    sampling: {steps: 2}
    compile: false
    init_from: null
data:
  init_args: {source: latents, resolution: 128, batch_size: 2, num_workers: 0, validation_samples: 2}
trainer: {accelerator: cpu, max_steps: 2, val_check_interval: 2, log_every_n_steps: 1}
checkpoint: {every_n_train_steps: 2}
samples: {every_n_steps: 0, prompts: [a photo of a flower, a photo of a temple]}
"""
CODEC = """
codec: {init_args: {source: "standin:dc_ae?downsample=8", downsample: 8, dtype: float32}}
resolution: 128
batch_size: 2
rows_per_shard: 2
num_workers: 0
trainer: {accelerator: cpu}
"""


def photographs() -> dict[str, Image.Image]:
    """Those inside scikit-learn (which MLflow brings) and matplotlib, in parts, so that there are more than three."""
    sklearn = importlib.util.find_spec("sklearn")
    places = {"hopper": Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg"}
    if sklearn is not None:
        folder = Path(sklearn.origin).parent / "datasets/images"
        places |= {"china": folder / "china.jpg", "flower": folder / "flower.jpg"}
    parts = {}
    for name, place in sorted(places.items()):
        with Image.open(place) as image:
            for i in range(2):
                left, top = i * (image.width - 360), i * (image.height - 400)
                parts[f"{name}_{i}"] = image.crop((left, top, left + 360, top + 400))
    return parts


def test_photographs_go_from_the_hub_to_latents_to_training_to_samples(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = photographs()
    captions = [CAPTIONS[name[:-2]] for name in images]
    columns = {"image": [{"bytes": jpeg(image), "path": None} for image in images.values()], "caption": captions}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())

    def download(path: str, split: str, **how: object) -> datasets.Dataset:
        assert (path, how["revision"], how["data_files"]) == ("someone/photographs", "v1", None)
        return table

    monkeypatch.setattr(datasets, "load_dataset", download)
    source = "{source: someone/photographs, revision: v1, data_files: null, license: BSD-3-Clause, card: sklearn}"
    data = change(f"data: {{init_args: {source}}}", "source.yaml")
    main(["precompute", *files("data/pd12m.yaml", "precompute/dcae_512.yaml"), *data, *change(CODEC, "codec.yaml"),
          "--out", "latents"])  # fmt: skip
    count, lines = len(images), capsys.readouterr().out.splitlines()
    assert any(f"{count} " in line and f"{count // 2} shard" in line and "latents" in line for line in lines)
    rows = LatentsDataset("latents")
    assert [rows[i]["caption"] for i in range(count)] == captions
    assert rows.manifest["source"]["license"] == "BSD-3-Clause"
    codec = DCAE("standin:dc_ae?downsample=8", downsample=8)
    for i, image in enumerate(images.values()):
        expected = codec.encode(load_image(jpeg(image), 128)[None])[0]
        assert expected.std() > 0.01 and torch.allclose(rows[i]["latents"], expected, atol=0.01)

    experiment = [*files("emmdit/512_stage2.yaml", "data/latents.yaml"), *change(TINY, "tiny.yaml")]
    main(["fit", *experiment, "--trainer.default_root_dir=run"])
    saved = torch.load(Path("run/checkpoints/last.ckpt").resolve(), weights_only=True)
    assert saved["global_step"] == 2 and saved["samples_seen"] == 4
    main(["sample", "--ckpt", "run", "--prompt", "a photo of a flower", "--out", "out", "--steps", "1",
          "--height", "128", "--width", "128", "--device", "cpu"])  # fmt: skip
    pixels = np.asarray(Image.open("out/00000.png"))
    assert pixels.shape == (128, 128, 3) and pixels.std() > 0
    for wrong, words in (
        ("--data.init_args.resolution=256", ("resolution", "128", "256")),
        ("--model.init_args.codec.init_args.scaling_factor=0.5", ("scaling_factor", "0.41407", "0.5")),
    ):
        with pytest.raises(SystemExit):
            main(["fit", *experiment, "--trainer.default_root_dir=other", wrong])
        error = capsys.readouterr().err
        assert all(word in error for word in words) and "Traceback" not in error


# -- prompts to images  -----------------------------------------------------------------------------


def draw(prompts: list[str], seeds: list[int]) -> torch.Tensor:
    """An image that depends on its own seed alone; a blank one for the prompt "nothing"."""
    images = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in seeds]
    return torch.stack([image * (prompt != "nothing") for image, prompt in zip(images, prompts, strict=True)])


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_prompts_become_a_dataset_that_resumes_after_a_kill(kind: str, tmp_path: Path) -> None:
    lines = [f"prompt {i}" for i in range(10)]
    lines[3], lines[6] = " ", "nothing"
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    prompts = Prompts(str(tmp_path / "prompts.txt"))
    options = dict(made_with={"model": "toy"}, seed=5, batch_size=2, rows_per_shard=3, kind=kind)
    whole = generate(prompts, draw, tmp_path / "whole", **options)
    assert whole["counts"] == {"rows": 10, "samples": 8, "rejected": {"blank image": 1, "empty caption": 1}}

    def dies(asked: list[str], seeds: list[int]) -> torch.Tensor:
        if "prompt 8" in asked:
            raise KeyboardInterrupt
        return draw(asked, seeds)

    with pytest.raises(KeyboardInterrupt):
        generate(prompts, dies, tmp_path / "out", **options)
    for rank in range(2):
        manifest = generate(prompts, draw, tmp_path / "out", **options, rank=rank, world=2)
    assert manifest == whole
    with pytest.raises(ValueError, match=r"made_with\.model.*'toy'.*'other'"):
        generate(prompts, draw, tmp_path / "out", **{**options, "made_with": {"model": "other"}})

    rows = open_source(str(tmp_path / "out"))
    assert [rows[i]["caption"] for i in range(8)] == [line for line in lines if line.startswith("prompt")]
    if kind == "tar":
        assert rows[3]["json"] == {"prompt": "prompt 4", "seed": 9, "row": 4} and rows[3]["__key__"] == "000000004"


def test_generate_dataset_draws_with_an_exported_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    datasets.Dataset.from_dict({"text": ["a photo of a red circle", "a photo of a blue star"]}).to_parquet("p.parquet")
    model = Path(__file__).parents[1] / "assets/shapes_emmdit"
    options = ["--model", str(model), "--prompts.source", "p.parquet", "--prompts.column", "text", "--dtype", "float32"]
    main(["generate-dataset", *options, "--out", "drawn", "--steps", "2", "--trainer.accelerator=cpu"])
    assert any("2 " in line and "1 shard" in line for line in capsys.readouterr().out.splitlines())
    rows = open_source("drawn")
    assert rows[1]["caption"] == "a photo of a blue star"
    assert Image.open(io.BytesIO(rows[1]["image"]["bytes"])).size == (32, 32)
    about = json.loads(Path("drawn/manifest.json").read_text())["made_with"]
    assert about["sampling"]["steps"] == 2 and len(about["model"]["sha256"]) == 64
    with pytest.raises(SystemExit):
        main(["generate-dataset", "--model", "./nowhere", *options[2:], "--out", "x", "--trainer.accelerator=cpu"])
    assert "'./nowhere'" in capsys.readouterr().err
