"""Model card of an export: network, training, usage, licenses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from emmdit.config_text import flatten_config
from emmdit.encoders.base import FrozenModel
from emmdit.pipeline import TextToImagePipeline
from emmdit.weights import find_checkpoint, run_folder
from lightning_modules.runs import read_config


def write_card(
    folder: Path, source: str | Path, pipeline: TextToImagePipeline, note: dict[str, Any], dtype: str
) -> None:
    """Write README.md and the run's configuration into an export, and copy its curve and last samples there."""
    checkpoint = find_checkpoint(source)
    run, config = run_folder(checkpoint), read_config(checkpoint)
    data, trainer = config["data"], config["trainer"]
    seen = f"{note['step']:,} optimizer steps, {note['samples_seen']:,} samples"
    parameters = sum(p.numel() for p in pipeline.transformer.parameters())
    rows = {
        "network": f"{type(pipeline.transformer).__name__}, {parameters:,} parameters, stored in {dtype}",
        "weights": {"ema": "EMA (exponential moving average)", "raw": "raw, not averaged"}[note["weights"]],
        "trained": f"{seen}, seed {config['seed_everything']}",
        "precision": trainer["precision"],
        "optimizer": _short(config["model"]["init_args"]["optimizer"]),
        "data": _short(data),
        "sampling": ", ".join(f"{key} {value}" for key, value in vars(pipeline.sampling).items() if value is not None),
    }
    arguments = config["model"]["init_args"]
    named = ((key.rpartition(".")[2], value) for key, value in flatten_config(arguments).items())
    teacher = next((value for key, value in named if key == "teacher" and isinstance(value, str)), None)
    if teacher is not None:
        rows["distilled from"] = f"`{teacher}`, whose license applies to this network, too"
    table = [f"| {key} | {value} |" for key, value in rows.items()]
    lines = [f"# {run.name}", "", "| | |", "| --- | --- |", *table, ""]
    grids = sorted((run / "samples").glob("step_*.png"))
    if grids:
        shutil.copy(grids[-1], folder / "grid.png")
        lines += ["![fixed prompts at the end of training](grid.png)", ""]
    for name in ("curve.csv", "curve.png"):
        if (run / name).is_file():
            shutil.copy(run / name, folder / name)
    if (folder / "curve.png").is_file():
        lines += ["![loss curve](curve.png)", "", "The numbers are in [curve.csv](curve.csv).", ""]
    lines += [
        "```python",
        "from emmdit import TextToImagePipeline",
        "",
        f'pipe = TextToImagePipeline.from_pretrained("{folder.name}")',
        'image = pipe("a photo of ...", seed=0).images[0]',
        "```",
        "",
    ]
    encoders = [part for part in (pipeline.codec, pipeline.text) if isinstance(part, FrozenModel)]
    if encoders:
        names = " and ".join(f"`{encoder.source}`" for encoder in encoders)
        lines += [f"Encoders: {names}. Their licenses apply to them, and may apply to their outputs.", ""]
    for section, key in (("trainer", "default_root_dir"), ("trainer", "logger"), ("checkpoint", "dirpath")):
        config[section].pop(key, None)  # paths of the machine it ran on
    config.pop("ckpt_path", None)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    lines += ["[config.yaml](config.yaml) is the whole configuration of the run.", ""]
    (folder / "README.md").write_text("\n".join(lines))


def _short(settings: dict[str, Any]) -> str:
    """MuonAdamW(lr=0.003, ...) from a class path and its arguments; unset and nested ones are left out."""
    arguments = settings.get("init_args") or {}
    plain = {key: value for key, value in arguments.items() if isinstance(value, (int, float, str)) and value != ""}
    inside = ", ".join(f"{key}={value}" for key, value in plain.items())
    return f"{settings['class_path'].rsplit('.', 1)[-1]}({inside})"
