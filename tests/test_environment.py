"""The lists of packages agree with each other and with what is installed; no file names a machine of ours."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Left to torch's own metadata (see `make lock`), and what an environment is made with.
UNPINNED = re.compile(r"(nvidia-|cuda-|(pytorch-)?triton|rocm|amd-|pip$|wheel$)")
# torchvision's minor version per minor version of torch 2 (its README has the table).
TORCHVISION = {9: 24, 10: 25, 11: 26, 12: 27, 13: 28, 14: 29}
MALICIOUS = ("2.6.2", "2.6.3")  # lightning, advisory GHSA-w37p-236h-pfx3

distributions = cache(metadata.packages_distributions)  # top-level module -> the packages that have it


def direct_requirements() -> list[Requirement]:
    lines = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    return [Requirement(line) for line in lines]


def pins() -> dict[str, str]:
    """Name -> version of requirements.txt, which may hold nothing but `name==version` lines and comments."""
    pinned = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)
        assert match, f"requirements.txt: {line!r} is not name==version"
        name = canonicalize_name(match[1])
        assert name not in pinned, f"requirements.txt pins {name} twice"
        pinned[name] = match[2]
    return pinned


def closure(requirements: list[Requirement]) -> set[str]:
    """Names of all packages that `requirements` bring on this platform, by the installed metadata."""
    todo, seen = list(requirements), set()
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for line in metadata.requires(name) or []:
            child = Requirement(line)
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in extras or {""}):
                todo.append(child)
    return {name for name, _ in seen}


def undeclared_imports(folder: str) -> dict[str, str]:
    """file:line of an import in `folder` -> its module, of those that no declared package has."""
    declared = {canonicalize_name(r.name) for r in direct_requirements()} | {PROJECT["name"]}
    found = {}
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for module in modules:
                names = {canonicalize_name(name) for name in distributions().get(module.split(".")[0], ())}
                if names and not names & declared:
                    found[f"{file.relative_to(ROOT)}:{node.lineno}"] = module
    return found


def conda(file: str) -> tuple[list[str], list[str]]:
    """(conda's packages, pip's lines) of an environment file."""
    entries = yaml.safe_load((ROOT / file).read_text())["dependencies"]
    return [e for e in entries if isinstance(e, str)], next(e["pip"] for e in entries if isinstance(e, dict))


def project_files() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        files = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:  # an unpacked archive
        files = [f for f in ROOT.rglob("*") if not f.relative_to(ROOT).parts[0].startswith(".venv")]
    return [f for f in files if f.is_file()]


@pytest.mark.parametrize("requirement", direct_requirements(), ids=lambda r: r.name)
def test_pin_lies_in_the_range_of_pyproject(requirement: Requirement):
    pinned = pins().get(canonicalize_name(requirement.name))
    assert pinned, f"requirements.txt does not pin {requirement.name}: run `make lock`"
    assert pinned in requirement.specifier


def test_pins_are_the_whole_set_and_nothing_else():
    needed = {name for name in closure(direct_requirements()) if not UNPINNED.match(name)}
    assert set(pins()) == needed, "pyproject.toml and requirements.txt drifted apart: run `make lock`"


@pytest.mark.parametrize("folder", ["emmdit", "lightning_modules", "datamodules", "benchmarks", "assets", "tests"])
def test_what_is_imported_is_declared(folder: str):
    assert not undeclared_imports(folder), "imported, but not in pyproject.toml with its reason"


def test_installed_versions_are_the_pinned_ones():
    installed = {name: Version(metadata.version(name)).public for name in pins()}
    assert installed == pins(), "this environment is not the tested one: run `make setup`"


def test_conda_environments_install_the_pins():
    cpu_packages, cpu_pip = conda("environment.yml")
    rocm_packages, rocm_pip = conda("environment.rocm.yml")
    assert cpu_pip == ["-r requirements.txt", "-e ."]
    assert rocm_pip == ["--extra-index-url ${ROCM_WHEEL_INDEX}", *cpu_pip]
    assert cpu_packages == rocm_packages
    python, pip = cpu_packages
    assert pip == "pip"
    assert python.removeprefix("python=") + ".0" in SpecifierSet(PROJECT["requires-python"])


def test_torch_and_torchvision_are_partners():
    torch, torchvision = Version(pins()["torch"]), Version(pins()["torchvision"])
    assert (torch.major, torchvision.major) == (2, 0)
    assert torch.minor in TORCHVISION, f"add torchvision's partner of torch {torch} to the table"
    assert TORCHVISION[torch.minor] == torchvision.minor
    ranges = {r.name: r.specifier for r in direct_requirements()}
    lowest = min(minor for minor in TORCHVISION if f"2.{minor}.0" in ranges["torch"])
    assert f"0.{TORCHVISION[lowest]}.0" in ranges["torchvision"]
    assert f"0.{TORCHVISION[lowest] - 1}.0" not in ranges["torchvision"]


def test_torch_and_torchvision_are_builds_for_the_same_device():
    import torch
    import torchvision

    # A CPU torch beside a CUDA torchvision installs, but then lightning and diffusers do not import.
    assert Version(torch.__version__).local == Version(torchvision.__version__).local


def test_malicious_lightning_is_shut_out():
    lightning = next(r for r in direct_requirements() if r.name == "lightning")
    for version in MALICIOUS:
        assert f"!={version}" in str(lightning.specifier) and version not in lightning.specifier
        assert version not in (pins()["lightning"], pins()["pytorch-lightning"])


def test_project_files_name_no_machine_and_no_package_index():
    machine = re.compile(r"(?<![\w.}])/(work|root|farm|tmp|home|Users|opt/pypi|opt/wheels)/[A-Za-z0-9_]")
    index = re.compile(r"https?://[^\s\"')>]*/(simple|whl)\b|(?<![\w])file:/+[a-z]")
    found = []
    for file in project_files():
        content = file.read_bytes()
        if b"\0" in content[:8192]:
            continue
        for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
            if hit := machine.search(line) or index.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {hit[0]}")
    assert not found, "\n".join(found)


def test_setup_without_a_fitting_python_ends_with_one_sentence(tmp_path: Path):
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    command = ["make", "setup", "PYTHON=no-such-python"]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode != 0
    message, *rest = run.stderr.strip().splitlines()
    assert all(word in message for word in ("3.11", "3.12", "venv", "PYTHON="))
    assert all(line.startswith("make: ***") for line in rest)
    assert not (tmp_path / ".venv").exists()
