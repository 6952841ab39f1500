"""The speed benchmark: FLOPs, fits, predictions, and the rows it writes."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import speed
from benchmarks.networks import COUNTS, NETWORKS, Network, counts
from benchmarks.speed import Built, Case, Guard, exponent, exponents, finished, measure, parts_of

CPU = torch.device("cpu")
SD35 = dict(
    num_layers=3, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=12
)
SD35 |= dict(pooled_projection_dim=10, pos_embed_max_size=8, dual_attention_layers=(0,))
EMMDIT = dict(num_attention_heads=2, attention_head_dim=16, block_groups=(1, 1, 1), caption_channels=24)


def tiny(name: str, **config) -> Network:
    return replace(NETWORKS[name], config=NETWORKS[name].config | config)


def on_meta(name: str, who: str, px: int) -> torch.nn.Module:
    with torch.device("meta"):
        return NETWORKS[name].build(who, px, **NETWORKS[name].one_block)


def flops(name: str, who: str, part: str, px: int) -> int:
    network = on_meta(name, who, px)
    with torch.device("meta"):
        return parts_of(NETWORKS[name], network, px)[part].flops(network)


# -- FLOPs -------------------------------------------------------------------------------------------


def test_flops_are_those_of_the_original_code():
    """docs/papers.md, B13, within 3%; parameters are the released network's unless a part is taken out."""
    rows = counts()
    assert [row["network"] for row in rows] == list(COUNTS)
    for row in rows:
        assert row["tflop"] == pytest.approx(row["tflop_original_code"], rel=0.03)
        removed = 302_449_952 - row["parameters"]  # compressor and reconstructor: 12.98M + 3.73M
        compressed = "released" in row["network"] or "subregions" in row["network"]
        assert removed == 0 if compressed else removed == pytest.approx(16.71e6, rel=0.01)


def test_flops_of_pixarts_attention_are_the_closed_forms():
    """D 1152, heads of 72, ConvFusion's middle 144, keys and values 2 x 2 compressed."""
    for px in (512, 1024):
        n, m, d, head, middle = (px // 16) ** 2, (px // 16) ** 2 // 4, 1152, 72, 1152 // 8
        projections = 4 * 2 * n * d**2
        assert flops("PixArt-Sigma", "original", "image", px) == projections + 2 * 2 * n**2 * d
        fusion = 2 * n * (9 * d * middle + middle * d)
        compressor = 2 * 2 * m * 9 * d
        product = 2 * m * d * head + 2 * n * d * head + 2 * n * d  # k v, q (k v), and the normalizer
        assert flops("PixArt-Sigma", "student", "image", px) == projections + fusion + compressor + product


@pytest.mark.parametrize("name", NETWORKS)
def test_a_student_is_linear_and_its_original_becomes_quadratic(name: str):
    sizes = [1024, 2048, 4096, 8192]
    tokens = [NETWORKS[name].tokens(on_meta(name, "original", 512), px) for px in sizes]
    student = [flops(name, "student", "image", px) for px in sizes]
    assert exponent(list(zip(tokens, student, strict=True))) <= 1.05
    original = [flops(name, "original", "image", px) for px in sizes]
    steps = [exponent(list(zip(tokens, original, strict=True))[i : i + 2]) for i in range(3)]
    assert steps == sorted(steps) and steps[-1] > 1.85 and all(slope < 2 for slope in steps)


def test_released_sizes():
    """Parameters: 0.6B PixArt-Sigma, 2.24B SD3.5-Medium (diffusers' count), 302M E-MMDiT."""
    with torch.device("meta"):
        found = {name: sum(p.numel() for p in spec.build("original").parameters()) for name, spec in NETWORKS.items()}
    assert found == {"PixArt-Sigma": 610_856_096, "SD3.5-Medium": 2_243_171_520, "E-MMDiT": 302_449_952}


# -- fits and predictions ----------------------------------------------------------------------------


def test_exponents_are_fitted_over_the_larger_sizes():
    assert exponent([(n, 3.0 * n**1.5) for n in (10, 100, 1000)]) == pytest.approx(1.5)
    assert exponent([(10, 1.0)]) is None
    rows = [
        row | {"tokens": px**2, "seconds": seconds, "tflop": px}
        for px, seconds in ((1, 100.0), (2, 4.0**2), (4, 16.0**2), (8, None))
        for row in finished({Case("a", "original", "image", "forward", px): {}})
    ]
    (fit,) = exponents(rows, smallest=2)
    assert fit["time"] == pytest.approx(2) and fit["flops"] == pytest.approx(0.5) and fit["px"] == 4


def test_what_would_take_too_long_is_left_out():
    guard = Guard(CPU, limit=10)
    assert guard.refuses(("a",), work=10**30) is None  # nothing known yet
    guard.pace[("a",)] = 1e-9
    assert guard.refuses(("a",), work=9 * 10**9) is None
    assert guard.refuses(("a",), work=11 * 10**9) == "11 s a call"
    assert guard.refuses(("b",), work=11 * 10**9) == "11 s a call"  # by the pace of another kind
    assert guard.refuses(("a",), work=1, weights=10**15).endswith("GiB")
    assert Guard(torch.device("cuda"), 10).refuses(("a",), 1, weights=10**15) is None  # the allocator will tell


# -- networks and rows -------------------------------------------------------------------------------


def test_variants_share_weights_and_compute_the_same():
    spec = tiny("E-MMDiT", **EMMDIT)
    built, case = Built(spec, 512, CPU), Case("E-MMDiT", "original", "network", "forward", 512)
    (base, _), (fused, _) = built.get(case), built.get(replace(case, variant="fused"))
    theirs = dict(fused.named_parameters())
    assert fused.blocks[0].attn.to_qkv is not None and base.blocks[0].attn.to_qkv is None
    assert all(theirs[name] is p for name, p in base.named_parameters())
    given = spec.inputs(base, 512, 2)
    with torch.no_grad():
        torch.testing.assert_close(base(**given).sample, fused(**given).sample, rtol=1e-4, atol=1e-5)


def test_a_training_step_moves_the_weights_and_keeps_no_gradients():
    spec = tiny("E-MMDiT", **EMMDIT)
    built, case = Built(spec, 512, CPU), Case("E-MMDiT", "student", "network", "train", 512, 1, "autocast")
    network, optimizer = built.get(case)
    before = {name: p.clone() for name, p in network.named_parameters()}
    with torch.device("meta"):
        part = parts_of(spec, spec.build("student", 512), 512)["network"]
    part.runner(network, optimizer, case)()
    assert any(not torch.equal(p, before[name]) for name, p in network.named_parameters())
    assert all(p.grad is None for p in network.parameters())


def test_out_of_memory_is_a_note():
    def fails() -> None:
        raise torch.OutOfMemoryError("too large")

    large, small = (Case("a", "original", "image", "forward", 512, batch) for batch in (64, 1))
    found = measure({large: fails, small: lambda: None}, CPU, 1, 0.0)
    assert found[large] == {"note": "out of memory"} and found[small]["seconds"] >= 0


def test_ratios_are_to_the_original_of_the_same_size():
    original, student = (Case("PixArt-Sigma", who, "network", "forward", 2048) for who in speed.WHO)

    def ratios(rows: dict) -> list[float | None]:
        return [row["ratio_to_original"] for row in finished(rows)]

    rows = list(finished({original: {"seconds": 3.0}, student: {"seconds": 1.5}}))
    assert [(row["ratio_to_original"], row["reported_ratio"]) for row in rows] == [(1, None), (2, 3.2)]
    assert rows[1]["images_per_second"] == pytest.approx(1 / 1.5) and rows[1]["case"] == str(student)
    assert ratios({original: {"note": "a"}, student: {"seconds": 1.5}}) == [None, None]
    assert ratios({student: {"seconds": 1.5}}) == [None]
    assert next(finished({replace(student, part="block"): {}}))["reported_ratio"] is None


def test_the_script_prints_and_writes_the_same(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    used = iter(itertools.count(step=2**20))  # the real one collects garbage each time; tests/test_benchmarks.py has it
    monkeypatch.setattr(speed, "peak_memory", lambda run, device: (run(), next(used))[1])
    monkeypatch.setitem(NETWORKS, "SD3.5-Medium", tiny("SD3.5-Medium", **SD35))
    out, options = tmp_path / "new" / "out.json", ["--resolutions", "128", "64", "--fit-from", "64", "--rounds", "1"]
    speed.main(["--quick", "--device", "cpu", "--networks", "SD3.5-Medium", *options, "--json", str(out)])
    printed, written = capsys.readouterr().out, json.loads(out.read_text())
    assert written["benchmark"] == "speed" and written["machine"]["torch"] in printed
    rows = written["rows"]
    kinds = {(row["who"], row["part"], row["mode"], row["px"]) for row in rows}
    assert len(rows) == len(kinds) == 2 * 4 * 2 * 2 and {row["part"] for row in rows} == set(speed.PARTS)
    for row in rows:
        assert row["tokens"] == (row["px"] // 16) ** 2 and row["note"] is None and row["memory"] == 2**20
        assert row["images_per_second"] == pytest.approx(1 / row["seconds"])
        assert f"{row['ratio_to_original']:.3g}" in printed and (
            row["who"] == "student" or row["ratio_to_original"] == 1
        )
    assert len(written["exponents"]) == 16 and {fit["px"] for fit in written["exponents"]} == {128}


def test_the_full_table_leaves_out_what_makes_no_sense():
    options = {"networks": "E-MMDiT", "parts": "block network", "modes": "forward train", "variants": "eager fused"}
    options |= {"device": "cpu", "rounds": "1", "resolutions": "512", "quick": ""}
    args = speed.arguments(
        ["--quick", *(word for key, value in options.items() for word in f"--{key} {value}".split())]
    )
    rows = list(speed.benchmark("E-MMDiT", tiny("E-MMDiT", **EMMDIT), args, Guard(CPU, 60)))
    found = [(row["part"], row["mode"], row["who"], row["variant"]) for row in rows]
    assert len(found) == len(set(found)) == 2 * 3 + 2  # block and network forward, the network's training step
    assert not [row for row in found if row[3] == "fused" and (row[1] == "train" or row[2] == "student")]
    assert not [row for row in found if row[:2] == ("block", "train")]
