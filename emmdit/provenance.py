"""Description of the machine and the source tree behind a measurement."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).parents[1]
COUNT = ("--", ".", ":!benchmarks/results", ":!docs")  # files that a measurement may depend on


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Everything a measurement depends on, and nothing that names its owner."""
    device = torch.device(device)
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "device": device.type,
        "cpu": cpu_name(),
        "cpu_cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "cpu_threads": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),  # other work on the machine, in busy cores
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": None,
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "gpus_visible": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return found


def hardware(device: torch.device | str = "cpu") -> str:
    """The GPU, or the CPU with its threads, in a few words."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_state() -> tuple[str, bool] | None:
    """The checked-out commit and whether tracked files differ from it; None outside a git checkout.

    Results and the documents that show them do not count: writing one must not make the next one look dirty.
    """
    try:
        return _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain", "-uno", *COUNT))
    except (OSError, subprocess.SubprocessError):
        return None


def source_id() -> str:
    """Name of the tracked files as they are: the commit's first letters, and a hash of what differs from it."""
    state = git_state()
    if state is None:
        return "unknown"
    commit = state[0][:8]
    return f"{commit}-{hashlib.sha256(_git('diff', 'HEAD', *COUNT).encode()).hexdigest()[:8]}" if state[1] else commit


def _git(*arguments: str) -> str:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    options = {"capture_output": True, "text": True, "check": True, "timeout": 20, "env": environment}
    return subprocess.run(["git", *arguments], cwd=ROOT, **options).stdout.strip()


def git_commit() -> str | None:
    """The commit, with "-dirty" where tracked files differ; None outside a git checkout."""
    found = git_state()
    return None if found is None else found[0] + "-dirty" * found[1]


def machine_line(found: dict[str, Any]) -> str:
    """The description in one line, for the head of a table."""
    where = f"{found['gpu']}, {found['gpu_memory_gib']} GiB" if found["gpu"] else found["cpu"]
    where += f", {found['cpu_cores']} cores, {found['torch_threads']} threads, {found['ram_gib']} GiB RAM"
    commit = (found["commit"] or "unknown commit").replace("-dirty", " and uncommitted changes")
    load = f"load average {found['load_average']} at the start"
    return f"{where}; {load}; torch {found['torch']}; {found['date'][:10]}; {commit}."
