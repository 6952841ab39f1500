"""How far a student is from its teacher: output of each attention layer, prediction, time and memory on equal inputs.

The inputs are the calls that the teacher's own sampling makes: the same noisy latents, timestep, text and, under
guidance, unconditional rows go to both networks. The student runs as a whole, so that a layer's error holds the errors
of those before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emmdit.networks import attention_layers, attention_outputs
from emmdit.timing import interleaved, peak_memory

PARTS = ("image", "prompt")  # what a joint attention layer gives out; another one gives the first alone
WIDTHS = {
    "latent channels": ("in_channels",),
    "text features": ("caption_channels", "joint_attention_dim"),
    "pooled text features": ("pooled_projection_dim",),
}


# -- do they belong together -------------------------------------------------------------------------


def check_pair(student: nn.Module, teacher: nn.Module) -> None:
    """Raise a ValueError with one sentence unless both take the same inputs and share attention layers."""
    names = {"student": type(student).__name__, "teacher": type(teacher).__name__}
    if not common_layers(student, teacher):
        raise ValueError(
            f"The student ({names['student']}) and the teacher ({names['teacher']}) have no attention layers in "
            "common: name the teacher that the student was made from."
        )
    for what, keys in WIDTHS.items():
        widths = [
            next((network.config[key] for key in keys if network.config.get(key) is not None), None)
            for network in (student, teacher)
        ]
        if widths[0] != widths[1]:
            raise ValueError(
                f"The student takes {widths[0]} {what} and the teacher {widths[1]}: a pair needs the same "
                f"{'image codec' if what.startswith('latent') else 'text conditioning'}."
            )
    widths = [n.config.num_attention_heads * n.config.attention_head_dim for n in (student, teacher)]
    if widths[0] != widths[1]:
        raise ValueError(
            f"The student's attention is {widths[0]} wide and the teacher's {widths[1]}: name the teacher that the "
            "student was made from."
        )


def common_layers(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Names of the attention layers to compare, in their order."""
    own = attention_layers(student)
    return [name for name in attention_layers(teacher) if name in own]


# -- errors ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a network."""

    args: tuple
    kwargs: dict[str, Any]

    @property
    def timestep(self) -> float:
        return float(torch.as_tensor(self.kwargs["timestep"]).flatten()[0])

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> Tensor:
        """The prediction, without the variance that some networks put behind it."""
        latents = self.args[0] if self.args else self.kwargs["hidden_states"]
        return network(*self.args, **self.kwargs)[0][:, : latents.shape[1]]


@contextmanager
def recorded_calls(network: nn.Module) -> Iterator[list[Call]]:
    """All calls of `network` inside a `with`, in order."""
    calls: list[Call] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append(Call(args, kwargs))

    handle = network.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def spread_over(calls: Sequence[Call], n: int) -> list[Call]:
    """`n` of a trajectory's calls, in the middles of n equal parts; not the last, which is nearly idle (t = 1)."""
    n = min(n, len(calls))
    return [calls[math.ceil((i + 0.5) * len(calls) / n) - 1] for i in range(n)]


def feature_errors(student: nn.Module, teacher: nn.Module, trajectories: Iterable[Sequence[Call]]) -> dict[str, Any]:
    """Relative L2 errors ||student - teacher|| / ||teacher||, over tokens, channels and all pictures, by timestep.

    Args:
        trajectories: for each picture (or batch of them) the calls to compare at; all at the same timesteps.

    Returns:
        "timesteps" [...], "image" and "prompt" {layer: [error at each timestep]}, "prediction" [...], and "mean" of
        each over layers and timesteps. Layers without prompt tokens are missing in "prompt".
    """
    sums: dict[tuple[str, str], list[Tensor]] = {}  # (part, layer) -> a pair of sums of squares for each timestep
    timesteps: list[float] = []
    for calls in trajectories:
        timesteps = timesteps or [call.timestep for call in calls]
        if [call.timestep for call in calls] != timesteps:
            raise ValueError("The trajectories of the pictures were recorded at different timesteps.")
        for step, call in enumerate(calls):
            for key, pair in _squares(student, teacher, call).items():
                found = sums.setdefault(key, [torch.zeros(2, dtype=torch.float64) for _ in timesteps])
                found[step] += pair
    errors: dict[str, Any] = {"timesteps": timesteps, **{part: {} for part in PARTS}}
    for (part, layer), pairs in sums.items():
        values = [math.sqrt(d / max(t, 1e-30)) for d, t in (pair.tolist() for pair in pairs)]
        if part == "prediction":
            errors[part] = values
        else:
            errors[part][layer] = values
    errors["mean"] = {part: _mean(errors[part].values()) for part in PARTS if errors[part]}
    errors["mean"]["prediction"] = _mean([errors["prediction"]])
    return errors


def _squares(student: nn.Module, teacher: nn.Module, call: Call) -> dict[tuple[str, str], Tensor]:
    """(part, layer) -> sum of squares of the difference, and of the teacher's."""
    with attention_outputs(teacher) as expected:
        prediction = call(teacher)
    with attention_outputs(student) as got:
        found = {("prediction", ""): _two_sums(call(student), prediction)}
    for layer in common_layers(student, teacher):
        # One of both may lack the prompt: nothing reads it behind the last block.
        for part, own, other in zip(PARTS, got[layer], expected[layer], strict=False):
            found[part, layer] = _two_sums(own, other)
    return found


def _two_sums(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = student.float(), teacher.float()
    return torch.stack([(student - teacher).square().sum(), teacher.square().sum()]).double().cpu()


def _mean(rows: Iterable[Sequence[float]]) -> float:
    values = [value for row in rows for value in row]
    return sum(values) / len(values)


# -- time and memory ---------------------------------------------------------------------------------


def latency(
    student: nn.Module, teacher: nn.Module, call: Call, device: torch.device, rounds: int = 9
) -> dict[str, Any]:
    """Both networks on the same inputs in turn, warmed up: medians in ms, and the teacher's over the student's.

    On a GPU also the peak memory of a call beyond what lay there before it (the weights of both).
    """
    networks = {"student": student, "teacher": teacher}
    runs = {name: (lambda network=network: call(network)) for name, network in networks.items()}
    for run in runs.values():
        run()
    timings = interleaved(runs, device, rounds)
    latents = call.args[0] if call.args else call.kwargs["hidden_states"]
    found: dict[str, Any] = {"latents": list(latents.shape), "rounds": rounds}
    for name, timing in timings.items():
        found[name] = {
            "ms": timing.median * 1e3,
            "ms_low": timing.low * 1e3,
            "ms_high": timing.high * 1e3,
            "parameters": sum(p.numel() for p in networks[name].parameters()),
        }
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            found[name]["peak_memory_mib"] = (peak_memory(runs[name], device) - before) / 2**20
    found["speedup"] = timings["teacher"].median / timings["student"].median
    return found


# -- metrics -----------------------------------------------------------------------------------------


def compared(student: Mapping[str, float], teacher: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Student minus teacher, and student over teacher where that is not zero, of each metric both have."""
    both = [name for name in student if name in teacher]
    return {
        "difference": {name: student[name] - teacher[name] for name in both},
        "ratio": {name: student[name] / teacher[name] for name in both if teacher[name]},
    }
