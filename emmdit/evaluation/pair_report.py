"""Tables of a report that compare a student with its teacher: errors of each layer, latency."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Table = list[tuple[str, bool, list[str]]]  # first cell, whether it is part of the one above, other cells


def pair_tables(pair: Mapping[str, Any]) -> list[tuple[str, str, list[str], Table]]:
    """Title, a sentence on what is shown, headings and rows of each table of `evaluation.json`'s "pair"."""
    return [_features(pair["features"]), _latency(pair["latency"])]


def _features(errors: Mapping[str, Any]) -> tuple[str, str, list[str], Table]:
    note = (
        "Relative L2 error |student - teacher| / |teacher| of each attention layer's output and of the prediction, "
        "both networks on the inputs of the teacher's own sampling; by timestep (1000 is noise)."
    )
    rows: Table = [("prediction", False, _values(errors["prediction"]))]
    for layer, values in errors["image"].items():
        rows.append((layer, False, _values(values)))
        if layer in errors["prompt"]:
            rows.append(("prompt tokens", True, _values(errors["prompt"][layer])))
    return "Error of each layer", note, ["layer", *(f"t = {t:.0f}" for t in errors["timesteps"]), "mean"], rows


def _values(values: list[float]) -> list[str]:
    return [f"{value:.3f}" for value in [*values, sum(values) / len(values)]]


def _latency(times: Mapping[str, Any]) -> tuple[str, str, list[str], Table]:
    note = (
        f"One call of the network on latents {' x '.join(map(str, times['latents']))}, both in turn in one process, "
        f"median of {times['rounds']} rounds. Teacher's time / student's: {times['speedup']:.2f}."
    )
    headings = ["network", "ms", "fastest round", "slowest", "parameters"]
    memory = "peak_memory_mib" in times["student"]
    rows: Table = []
    for name in ("student", "teacher"):
        own = times[name]
        cells = [f"{own[key]:.4g}" for key in ("ms", "ms_low", "ms_high")] + [f"{own['parameters']:,}"]
        rows.append((name, False, cells + ([f"{own['peak_memory_mib']:.4g}"] if memory else [])))
    return "Latency", note, headings + ["peak MiB beyond the weights"] * memory, rows
