"""Configurations and checkpoints of older versions, translated to present names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Class paths, the modules of a pipeline's components, and the class of a pipeline.
CLASSES = {
    "EMMDiTPipeline": "TextToImagePipeline",
    "emmdit.encoders.ShapesText": "emmdit.shapes.ShapesText",
    "emmdit.evaluation.AskedColor": "emmdit.shapes.AskedColor",
    "emmdit.evaluation.ShapesDetector": "emmdit.shapes.ShapesDetector",
    "emmdit.evaluation.ShapesPrompts": "emmdit.shapes.ShapesPrompts",
    "emmdit.networks.linearize": "emmdit.networks.edit.students",
}
KEYS = {"grid": "schedule", "licence": "license"}
VALUES = {("schedule", "nitro"): "flow_match_euler"}  # (key, old value)
# Arguments that a class no longer has, with the only values it took.
GONE = {
    "emmdit.shapes.ShapesText": {"world": None, "hidden_size": 64, "layers": 2, "seed": 0, "pretrained": True},
}
# Options of a student's attention that are constants now, and those by which its baselines differed.
ATTENTION: dict[str, Any] = {
    **dict(kernel="relu", eps=1e-4, float32=True, qk_norm=True, negative_slope=0.01, zero_init=True),
    **dict(conv_fusion_form="v2", conv_fusion_ratio=8, conv_fusion_groups=32, conv_fusion_kernel=3),
    **dict(compressor_kernel=3, compressor_stride=2, compressor_init="average", compressor_shared=False),
    **dict(compressor_norm=False, joint="hybrid", prompt_rows="joint", prompt_keys="compressed", rectified=False),
    **dict(compensate=False, second_attention="linear", feed_forward="teacher", mix_ratio=2.5, layers=None),
}
ATTENTION_OF: dict[str, dict[str, Any]] = {
    "edit": {},
    "linear": dict(joint="linear"),
    "sana": dict(joint="linear", feed_forward="mix"),
    "linfusion": dict(kernel="elu", joint="linear"),
    "kv_compression": dict(
        kernel="softmax", joint="softmax", compressor_kernel=2, compressor_shared=True, compressor_norm=True
    ),
}


def modernize(config: Any) -> Any:
    """A copy of a pipeline's or a run's configuration in present names; what has them already stays as it is.

    >>> modernize({"sampling": {"steps": 20, "grid": "nitro"}})
    {'sampling': {'steps': 20, 'schedule': 'flow_match_euler'}}
    """
    if isinstance(config, dict):
        renamed = {KEYS.get(key, key): modernize(value) for key, value in config.items()}
        if gone := GONE.get(str(renamed.get("class_path"))):
            arguments = (renamed.get("init_args") or {}).items()
            renamed["init_args"] = {key: value for key, value in arguments if (key, value) not in gone.items()}
        return {key: VALUES.get((key, str(value)), value) for key, value in renamed.items()}
    if isinstance(config, list | tuple):
        return type(config)(modernize(value) for value in config)
    return CLASSES.get(config, config) if isinstance(config, str) else config


def modernize_run(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a run folder in present names; REPA's projector and its tap were the network's once."""
    config = modernize(config)
    arguments = config["model"]["init_args"]
    network = arguments["denoiser"].get("init_args") or {}
    old = {key: network.pop(f"repa_{key}", None) for key in ("feature_dim", "projector_dim", "depth")}
    for component in arguments.get("components") or []:
        if component["class_path"].endswith(".REPA"):
            depth = old.pop("depth", None) or network.get("block_groups", [4])[0]
            component["init_args"] = {"block": f"blocks.{depth - 1}", **old, **component["init_args"]}
    return config


def modernize_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a checkpoint in present names: REPA's projector was a part of the denoiser once."""
    renamed = {modern_key(key): value for key, value in state.items()}
    return {key: value for key, value in renamed.items() if not key.startswith("ema_components.")}


def modern_key(key: str) -> str:
    """The present name of a tensor in a checkpoint, be it of the state dict or of an optimizer's state.

    >>> modern_key("optimizer_0.state.denoiser.repa_projector.0.bias.step")
    'optimizer_0.state.components.repa.projector.0.bias.step'
    """
    return key.replace("denoiser.repa_projector.", "components.repa.projector.")


def modernize_attention(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `LinearAttentionConfig`: options that are constants now give way to the baseline they amount to."""
    removed = {name: fields[name] for name in ATTENTION if name in fields}
    rest = {name: value for name, value in fields.items() if name not in removed}
    if not removed:
        return rest
    given = rest.get("baseline", "edit")
    values = ATTENTION | ATTENTION_OF.get(given, {}) | removed
    for name in [given] if "baseline" in rest else ATTENTION_OF:
        if values == ATTENTION | ATTENTION_OF.get(name, {}):
            return rest | {"baseline": name}
    changed = ", ".join(f"{name}={value!r}" for name, value in removed.items() if value != ATTENTION[name])
    raise ValueError(
        f"This version of emmdit has no attention with {changed or 'these options'}: use the version that trained the "
        "student, or drop the options."
    )
