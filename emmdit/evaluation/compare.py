"""Student beside teacher: errors of attention layers and prediction, time and memory, on equal inputs.

The inputs are the network calls of the teacher's own sampling: both networks get the same noisy latents, timestep, text
and, under guidance, unconditional rows. The student runs as a whole, so a layer's error contains the errors of those
before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from emmdit.generate import generate_trajectory, predictor
from emmdit.networks import OutputRecorder, attention_layers
from emmdit.pipeline import TextToImagePipeline
from emmdit.timing import interleaved, peak_memory
from emmdit.types import Condition

PARTS = ("image", "prompt")  # outputs of a joint attention layer; any other has the first alone


def check_pair(student: nn.Module, teacher: nn.Module) -> None:
    """Raise a ValueError with one sentence unless both take the same inputs and share attention layers."""
    if not (isinstance(student, nn.Module) and isinstance(teacher, nn.Module)):
        raise ValueError("A comparison needs two transformers, and a pipeline without one was given: omit --teacher.")
    if not common_layers(student, teacher):
        raise ValueError(
            f"The student ({type(student).__name__}) and the teacher ({type(teacher).__name__}) have no attention "
            "layers in common: name the teacher that the student was made from."
        )
    own, other = _widths(student), _widths(teacher)
    for what in own:
        if own[what] != other[what]:
            raise ValueError(
                f"The student has {own[what]} {what} and the teacher {other[what]}: name the teacher that the student "
                "was made from."
            )


def _widths(network: nn.Module) -> dict[str, int | None]:
    config = network.config
    return {
        "latent channels": config.get("in_channels"),
        "text features": config.get("caption_channels") or config.get("joint_attention_dim"),
        "pooled text features": config.get("pooled_projection_dim"),
        "attention channels": config.num_attention_heads * config.attention_head_dim,
    }


def common_layers(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Names of the attention layers to compare, in their order."""
    own = attention_layers(student)
    return [name for name in attention_layers(teacher) if name in own]


# -- inputs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One call of a denoiser: latents (B, C, h, w) and all other arguments."""

    latents: Tensor
    arguments: dict[str, Any]

    @property
    def timestep(self) -> float:
        return float(torch.as_tensor(self.arguments["timestep"]).flatten()[0])

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> Tensor:
        """The prediction of `network`, without the variance that some networks put behind it."""
        return network(self.latents, **self.arguments)[0][:, : self.latents.shape[1]]


@torch.no_grad()
def trajectory_calls(network: nn.Module, pipeline: TextToImagePipeline, prompt: str, seed: int) -> list[Call]:
    """The calls of `network` that guidance makes at each state of the sampler, with all else from `pipeline`."""
    device, dtype = (parameter := next(network.parameters())).device, parameter.dtype
    calls: list[Call] = []

    def keep(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        calls.append(Call(x.to(dtype), {"timestep": t, **condition}))
        return x

    ask = predictor(keep, pipeline.text, [prompt], pipeline.sampling, device, dtype)
    parts = pipeline.codec, pipeline.text, [prompt], [seed], pipeline.path, pipeline.sampling
    for _, t, x, prediction in generate_trajectory(network, *parts, device):
        if prediction is not None:
            ask(x, torch.tensor(t))
    return calls


def spread_over(calls: Sequence[Call], n: int) -> list[Call]:
    """`n` of a trajectory's calls, in the middles of n equal parts; not the last, which is nearly idle (t = 1)."""
    n = min(n, len(calls))
    return [calls[math.ceil((i + 0.5) * len(calls) / n) - 1] for i in range(n)]


# -- errors ------------------------------------------------------------------------------------------


def feature_errors(student: nn.Module, teacher: nn.Module, trajectories: Iterable[Sequence[Call]]) -> dict[str, Any]:
    """Relative L2 errors ||student - teacher|| / ||teacher||, over tokens, channels and all images, by timestep.

    Args:
        trajectories: for each image (or batch of them) the calls to compare at; all at the same timesteps.

    Returns:
        "timesteps" [...], "image" and "prompt" {layer: [error at each timestep]}, "prediction" [...], and "mean" of
        each over layers and timesteps. Layers without prompt tokens are not in "prompt".
    """
    sums: dict[tuple[str, str], list[Tensor]] = {}  # (part, layer) -> a pair of sums of squares for each timestep
    timesteps: list[float] = []
    for calls in trajectories:
        timesteps = timesteps or [call.timestep for call in calls]
        if [call.timestep for call in calls] != timesteps:
            raise ValueError("The trajectories of the images have different timesteps.")
        for step, call in enumerate(calls):
            for key, pair in _squares(student, teacher, call).items():
                found = sums.setdefault(key, [torch.zeros(2, dtype=torch.float64) for _ in timesteps])
                found[step] += pair
    errors: dict[str, dict[str, list[float]]] = {part: {} for part in (*PARTS, "prediction")}
    for (part, layer), pairs in sums.items():
        errors[part][layer] = [math.sqrt(d / max(t, 1e-30)) for d, t in (pair.tolist() for pair in pairs)]
    means = {part: fmean(chain(*of_layer.values())) for part, of_layer in errors.items() if of_layer}
    return {"timesteps": timesteps, **errors, "prediction": errors["prediction"][""], "mean": means}


def _squares(student: nn.Module, teacher: nn.Module, call: Call) -> dict[tuple[str, str], Tensor]:
    """(part, layer) -> sum of squares of the difference, and of the teacher's."""
    with OutputRecorder(attention_layers(student), when="always") as recorder:
        prediction, outputs = call(student), recorder.take()
    with OutputRecorder(attention_layers(teacher), when="always") as recorder:
        expected, teacher_outputs = call(teacher), recorder.take()
    found = {("prediction", ""): _two_sums(prediction, expected)}
    for layer in common_layers(student, teacher):
        # One of both may lack the prompt: nothing reads it after the last block.
        for part, own, other in zip(PARTS, outputs[layer], teacher_outputs[layer], strict=False):
            found[part, layer] = _two_sums(own, other)
    return found


def _two_sums(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = student.float(), teacher.float()
    return torch.stack([(student - teacher).square().sum(), teacher.square().sum()]).double().cpu()


# -- time and memory ---------------------------------------------------------------------------------


def latency(
    student: nn.Module, teacher: nn.Module, call: Call, device: torch.device, rounds: int = 9
) -> dict[str, Any]:
    """Both networks on the same inputs in turn, warmed up: medians in ms, and the teacher's over the student's.

    On a GPU also the peak memory of a call beyond what was allocated before it (the weights of both).
    """
    networks = {"student": student, "teacher": teacher}
    runs = {name: (lambda network=network: call(network)) for name, network in networks.items()}
    for run in runs.values():
        run()
    timings = interleaved(runs, device, rounds)
    found: dict[str, Any] = {"latents": list(call.latents.shape), "rounds": rounds}
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
