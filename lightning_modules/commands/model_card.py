"""Model card of an export: network, training, usage, licenses."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from emmdit.config_text import flatten_config
from emmdit.encoders.base import FrozenModel
from emmdit.pipeline import TextToImagePipeline
from emmdit.weights import run_folder
from lightning_modules.runs import read_config


def write_card(
    folder: Path, name: str, source: str | Path, pipeline: TextToImagePipeline, note: dict[str, Any], dtype: str
) -> None:
    """Write README.md and the run's configuration into an export, and copy its curve and last samples there.

    Args:
        folder: the export, which will be called `name`.
    """
    run, config = run_folder(source), read_config(source)
    data, trainer = config.get("data"), config.get("trainer") or {}
    arguments = config["model"]["init_args"]
    parameters = sum(p.numel() for p in pipeline.transformer.parameters())
    seen = f"{note['step']:,} optimizer steps, {note['samples_seen']:,} samples"
    rows = {
        "network": f"{type(pipeline.transformer).__name__}, {parameters:,} parameters, stored in {dtype}",
        "weights": {"ema": "EMA (exponential moving average)", "raw": "raw, not averaged"}[note["weights"]],
        "trained": f"{seen}, seed {config.get('seed_everything')}",
        "precision": trainer.get("precision"),
        "optimizer": _short(arguments.get("optimizer")),
        "data": _short(data),
        "sampling": ", ".join(f"{key} {value}" for key, value in vars(pipeline.sampling).items() if value is not None),
    }
    rows = {key: plain_text(value) for key, value in rows.items() if value is not None}
    named = ((key.rpartition(".")[2], value) for key, value in flatten_config(arguments).items())
    teacher = next((value for key, value in named if key == "teacher" and isinstance(value, str)), None)
    if teacher is not None:
        rows["distilled from"] = f"{plain_text(teacher)}, whose license applies to this network, too"
    table = [f"| {key} | {value} |" for key, value in rows.items()]
    lines = [f"# {plain_text(run.name)}", "", "| | |", "| --- | --- |", *table, ""]
    grids = sorted((run / "samples").glob("step_*.png"))
    if grids and _copy_own(run, grids[-1], folder / "grid.png"):
        lines += ["![fixed prompts at the end of training](grid.png)", ""]
    for file in ("curve.csv", "curve.png"):
        _copy_own(run, run / file, folder / file)
    if (folder / "curve.png").is_file():
        lines += ["![loss curve](curve.png)", "", "The numbers are in [curve.csv](curve.csv).", ""]
    lines += [
        "```python",
        "from emmdit import TextToImagePipeline",
        "",
        f"pipe = TextToImagePipeline.from_pretrained({json.dumps(name)})",
        'image = pipe("a photo of ...", seed=0).images[0]',
        "```",
        "",
    ]
    encoders = [part for part in (pipeline.codec, pipeline.text) if isinstance(part, FrozenModel)]
    if encoders:
        names = " and ".join(plain_text(encoder.source) for encoder in encoders)
        lines += [f"Encoders: {names}. Their licenses apply to them, and may apply to their outputs.", ""]
    for section, key in (("trainer", "default_root_dir"), ("trainer", "logger"), ("checkpoint", "dirpath")):
        (config.get(section) or {}).pop(key, None)  # paths of the machine it ran on
    config.pop("ckpt_path", None)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    lines += ["[config.yaml](config.yaml) is the whole configuration of the run.", ""]
    (folder / "README.md").write_text("\n".join(lines))


def plain_text(value: Any) -> str:
    """`value` in Markdown as it is: one line, no HTML, link, image, code or table cell of its own."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text).replace("://", "&#58;//").replace("www.", "www&#46;")


def _copy_own(run: Path, source: Path, target: Path) -> bool:
    """Copy a file of the run, if it is there; a link that leaves the run may lead to what is not to be published."""
    own = source.is_file() and source.resolve().is_relative_to(run.resolve())
    if own:
        shutil.copy(source, target)
    return own


def _short(settings: Any) -> str | None:
    """MuonAdamW(lr=0.003, ...) from a class path and its arguments; unset and nested ones are left out."""
    if not isinstance(settings, dict) or not isinstance(settings.get("class_path"), str):
        return None
    arguments = settings.get("init_args") or {}
    plain = {key: value for key, value in arguments.items() if isinstance(value, (int, float, str)) and value != ""}
    inside = ", ".join(f"{key}={value}" for key, value in plain.items())
    return f"{settings['class_path'].rsplit('.', 1)[-1]}({inside})"
