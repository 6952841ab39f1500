"""The benchmark of attention against picture size: what it counts, fits, leaves out and writes; the memory plan."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from benchmarks import attention_scaling, attention_shares, distillation_memory
from benchmarks.attention_scaling import Guard, exponent, exponents, parts_of
from benchmarks.teachers import TEACHERS, build

TINY = {
    "PixArt-Sigma": dict(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, cross_attention_dim=16, caption_channels=12
    ),
    "SD3.5-Medium": dict(
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
    ),
}


def flops(name: str, who: str, part: str, px: int) -> int:
    teacher = TEACHERS[name]
    with torch.device("meta"):
        network = build(teacher, who, px, **teacher.one_block)
        return parts_of(teacher, network, teacher.inputs(network, px))[part].flops(network)


# -------------------------------------------------------------------------------- FLOPs


def test_flops_of_pixarts_attention_are_the_closed_forms():
    """D 1152, heads of 72, ConvFusion's middle 144, keys and values 2 x 2 compressed."""
    for px in (512, 1024):
        n, m, d, head, middle = (px // 16) ** 2, (px // 16) ** 2 // 4, 1152, 72, 1152 // 8
        projections = 4 * 2 * n * d**2
        assert flops("PixArt-Sigma", "teacher", "image", px) == projections + 2 * 2 * n**2 * d
        fusion = 2 * n * (9 * d * middle + middle * d)
        compressor = 2 * 2 * m * 9 * d
        product = 2 * m * d * head + 2 * n * d * head + 2 * n * d  # k v, q (k v), and the normaliser
        assert flops("PixArt-Sigma", "student", "image", px) == projections + fusion + compressor + product


@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_is_linear_and_its_teacher_becomes_quadratic(name: str):
    sizes = [1024, 2048, 4096, 8192]
    tokens = [TEACHERS[name].tokens(build_one(name), px) for px in sizes]
    student = [flops(name, "student", "image", px) for px in sizes]
    assert exponent(list(zip(tokens, student, strict=True))) <= 1.05
    teacher = [flops(name, "teacher", "image", px) for px in sizes]
    steps = [exponent(list(zip(tokens, teacher, strict=True))[i : i + 2]) for i in range(3)]
    assert steps == sorted(steps) and steps[-1] > 1.85 and all(slope < 2 for slope in steps)


def build_one(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return build(TEACHERS[name], "teacher", 512, **TEACHERS[name].one_block)


def test_released_sizes():
    """Parameters in millions: 0.6B PixArt-Sigma, 2.24B SD3.5-Medium (diffusers' count), 302M E-MMDiT."""
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in build(t, "teacher").parameters()) for name, t in TEACHERS.items()}
    assert counts == {"PixArt-Sigma": 610_856_096, "SD3.5-Medium": 2_243_171_520, "E-MMDiT": 302_449_952}


# -------------------------------------------------------------------------------- fits and limits


def test_exponents_are_fitted_over_the_larger_sizes():
    assert exponent([(n, 3.0 * n**1.5) for n in (10, 100, 1000)]) == pytest.approx(1.5)
    assert exponent([(10, 1.0)]) is None
    kind = dict(network="a", part="image", mode="forward")
    rows = [
        kind | dict(px=px, tokens=px**2, seconds_teacher=s, seconds_student=None, tflop_teacher=1.0, tflop_student=px)
        for px, s in ((1, 100.0), (2, 4.0**2), (4, 16.0**2))
    ]
    (fit,) = exponents(rows, smallest=2)
    assert fit["seconds_teacher"] == pytest.approx(2) and fit["seconds_student"] is None
    assert fit["tflop_teacher"] == pytest.approx(0) and fit["tflop_student"] == pytest.approx(0.5)
    assert fit["px_teacher"] == 4 and fit["px_student"] is None


def test_what_would_take_too_long_is_left_out():
    guard = Guard(torch.device("cpu"), limit=10)
    assert guard.refuses(("a",), work=1e30, tokens=1) is None  # nothing known yet
    guard.saw(("a",), work=1e9, tokens=100, seconds=1.0, memory=2**20)
    assert guard.refuses(("a",), work=9e9, tokens=400) is None
    assert guard.refuses(("a",), work=11e9, tokens=400).startswith("11 s")
    assert guard.refuses(("b",), work=11e9, tokens=400).startswith("11 s")  # by the speed of another kind
    assert guard.refuses(("a",), work=1e9, tokens=100, weights=10**15).endswith("GiB")
    assert guard.refuses(("a",), work=1e9, tokens=100 * 2**30).endswith("GiB")
    assert Guard(torch.device("cuda"), 10).refuses(("a",), 1e9, 1, weights=10**15) is None  # the allocator will tell


def test_out_of_memory_is_a_note():
    def fails() -> None:
        raise torch.OutOfMemoryError("too large")

    found = attention_scaling.measure(dict(teacher=fails, student=lambda: None), torch.device("cpu"), 1, 0.0)
    assert found["teacher"] == {"note": "out of memory"} and found["student"]["seconds"] >= 0


# -------------------------------------------------------------------------------- what is written


def test_the_script_prints_and_writes_the_same(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    used = iter(itertools.count(step=2**20))  # the real one collects garbage each time; tests/test_benchmarks.py has it
    monkeypatch.setattr(attention_scaling, "peak_memory", lambda run, device: (run(), next(used))[1])
    name = "SD3.5-Medium"
    out = tmp_path / "out.json"
    sizes = ["--resolutions", "128", "64", "--fit-from", "64"]
    attention_scaling.main(
        ["--quick", "--device", "cpu", "--networks", name, *sizes, "--rounds", "1", "--json", str(out)], TINY
    )
    printed, written = capsys.readouterr().out, json.loads(out.read_text())
    assert written["benchmark"] == "attention_scaling" and written["settings"]["dtype"] == "float32"
    kinds = {(row["part"], row["mode"], row["px"]) for row in written["rows"]}
    modes = attention_scaling.MODES
    assert kinds == {(part, mode, px) for part in attention_scaling.PARTS for mode in modes for px in (64, 128)}
    for row in written["rows"]:
        assert row["tokens"] == (row["px"] // 16) ** 2 and row["note"] is None
        assert row["seconds_ratio"] == pytest.approx(row["seconds_teacher"] / row["seconds_student"])
        assert row["tflop_ratio"] == pytest.approx(row["tflop_teacher"] / row["tflop_student"])
        assert f"{row['seconds_ratio']:.3g}" in printed
        assert row["memory_teacher"] == row["memory_student"] == 2**20
    assert len(written["exponents"]) == 8 and {fit["px_student"] for fit in written["exponents"]} == {128}
    assert written["machine"]["torch"] in printed


def test_published_ratios_stand_beside_whole_forward_passes():
    row = dict(network="PixArt-Sigma", part="network", mode="forward", px=2048, notes=["a", "b"])
    done = attention_scaling.finished(row | dict(seconds_teacher=3.0, seconds_student=1.5))
    assert done["published"] == 3.2 and done["seconds_ratio"] == 2 and done["memory_ratio"] is None
    assert done["note"] == "a; b"
    for change in (dict(part="block"), dict(mode="forward + backward"), dict(px=512), dict(network="E-MMDiT")):
        assert attention_scaling.finished(row | change | dict(notes=[]))["published"] is None


def test_shares_of_the_parts_add_up(capsys):
    attention_shares.main(["--networks", "SD3.5-Medium", "--px", "64", "--device", "cpu", "--quick"], TINY)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| SD3.5")]
    assert len(rows) == 8 and {row[2].strip() for row in rows} >= {
        "ConvFusion",
        "image-to-prompt softmax",
        "prompt rows",
    }
    for column in (4, 6):  # per cent of time and of FLOPs
        assert sum(float(row[column]) for row in rows) == pytest.approx(100, abs=1)
    assert float(rows[-1][5]) == 0  # all FLOPs are in the named parts


# -------------------------------------------------------------------------------- memory plan


def test_kept_bytes_of_a_linear_layer():
    """relu keeps its output, which the second layer reads; inputs and weights do not count."""
    with torch.device("meta"):
        net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        x = torch.randn(5, 8, requires_grad=True)
        assert distillation_memory.kept_bytes(net, (x,), {}) == 5 * 32 * 4
        assert distillation_memory.kept_bytes(net[0], (x,), {}) == 0


def test_memory_plan_adds_up(tmp_path: Path, capsys):
    name, out = "SD3.5-Medium", tmp_path / "plan.json"
    arguments = ["--networks", name, "--resolutions", "64", "128", "--gpus", "4", "--json", str(out)]
    distillation_memory.main(arguments, TINY)
    plan = json.loads(out.read_text())
    with torch.device("meta"):
        student = build(TEACHERS[name].changed(TINY[name]), "student")
    total = sum(p.numel() for p in student.parameters())
    new, attention, everything = plan["weights"]
    assert new["m_trained"] < attention["m_trained"] < everything["m_trained"] == total / 1e6
    assert everything["adam"] == pytest.approx(8 * total / 4 / 1e9)
    parts = ("teacher", "student", "average", "gradients", "adam", "gathered", "positions")
    for row in plan["weights"]:
        assert row["total"] == pytest.approx(sum(row[key] for key in parts))
        assert row["positions"] == pytest.approx(10 * 8 * 8 * 16 / 1e9)  # 8 x 8 positions of width 16
    small, large = plan["activations"]
    assert small["px"] == 64 and small["inputs"] < large["inputs"] and small["checkpointed"] < small["plain"]
    assert f"{large['plain']:.3g}" in capsys.readouterr().out
