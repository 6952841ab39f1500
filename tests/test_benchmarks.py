"""The benchmarks: what they count, how they time, and what they write."""

from __future__ import annotations

import functools
import json
import re
import socket
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common, emmdit_forward
from benchmarks.emmdit_forward import CONFIGS, COUNTS, Case, Networks, benchmark, count, with_speedup
from emmdit import provenance as machine

TINY = dict(num_attention_heads=2, attention_head_dim=16, block_groups=(1, 1, 1), caption_channels=24)


# -------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(("name", "config", "published"), COUNTS, ids=[name for name, _, _ in COUNTS])
def test_flops_are_those_of_the_paper(name: str, config: dict, published: float):
    """papers.md B13, within 3%; parameters are the released network's unless a part is taken out."""
    parameters, flops = count(config)
    assert flops / 1e12 == pytest.approx(published, rel=0.03)
    if config.get("compression_ratios") is None:
        assert parameters == 302_449_952
    else:  # compressor and reconstructor: 12.98M + 3.73M
        assert 302_449_952 - parameters == pytest.approx(16.71e6, rel=0.01)


def test_a_training_step_costs_three_forward_passes():
    with torch.device("meta"):
        network = emmdit_forward.EMMDiTTransformer2DModel(block_groups=(1, 1, 1))
        with FlopCounterMode(display=False) as counter:
            network(**emmdit_forward.inputs(network, 1)).sample.sum().backward()
    assert counter.get_total_flops() / count({"block_groups": (1, 1, 1)})[1] == pytest.approx(3, rel=0.01)


def test_configurations_are_the_released_ones():
    with torch.device("meta"):
        small, large = (emmdit_forward.EMMDiTTransformer2DModel(**CONFIGS[px]) for px in (512, 1024))
    assert (small.config.sample_size, large.config.sample_size) == (16, 32)
    assert {block.attn.subregions.kind for block in large.blocks} == {"full"}


# -------------------------------------------------------------------------------- time and memory


def test_cases_take_turns_forwards_and_backwards():
    order: list[str] = []
    durations = {"a": iter([1.0, 3.0, 1.0, 2.0]), "b": iter([0.2, 8.0, 6.0, 7.0])}

    def clock(run, device, calls):
        name = run()
        order.append(f"{name}{calls}")
        return next(durations[name])

    timings = common.interleaved({"a": lambda: "a", "b": lambda: "b"}, rounds=3, min_seconds=0.5, clock=clock)
    assert order == [
        "a1",
        "b1",
        "a1",
        "b3",
        "b3",
        "a1",
        "a1",
        "b3",
    ]  # 0.2 s a call: three calls for half a second
    assert timings["a"] == common.Timing(2.0, 1.0, 3.0, 3) and timings["b"] == common.Timing(7.0, 6.0, 8.0, 3)


def test_seconds_are_of_one_call():
    calls = []
    seconds = common.seconds_of(lambda: calls.append(torch.randn(64, 64) @ torch.randn(64, 64)), torch.device("cpu"), 4)
    assert len(calls) == 4 and 0 < seconds < 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak of the resident set: Linux")
def test_peak_memory_sees_what_is_freed_again():
    def allocate(mebibytes: int) -> None:
        torch.ones(mebibytes * 2**20 // 4).sum()

    little, much = (common.peak_memory(functools.partial(allocate, n)) for n in (1, 400))
    assert 350 * 2**20 < much - little < 450 * 2**20
    assert abs(common.peak_memory(functools.partial(allocate, 1)) - little) < 100 * 2**20  # the peak starts again


def test_shared_tensors_count_once():
    one = torch.nn.Linear(10, 10, bias=False)
    other = torch.nn.Sequential(one, torch.nn.Linear(5, 4, bias=False))
    assert common.tensor_bytes(one, other) == 4 * (100 + 20)


# -------------------------------------------------------------------------------- networks


@pytest.fixture
def networks() -> Networks:
    return Networks(torch.device("cpu"), TINY)


def test_variants_share_weights_and_compute_the_same(networks: Networks):
    base, large = networks.get(512, "eager"), networks.get(1024, "eager")
    fused = networks.get(512, "fused")
    assert large.config.sample_size == 32 and fused.blocks[0].attn.to_qkv is not None
    assert base.blocks[0].attn.to_qkv is None
    for other in (large, fused):
        theirs = dict(other.named_parameters())
        assert all(theirs[name] is p for name, p in base.named_parameters())
        assert not any(t.is_meta for t in (*other.parameters(), *other.buffers()))
    given = emmdit_forward.inputs(base, 2)
    with torch.no_grad():
        torch.testing.assert_close(base(**given).sample, fused(**given).sample, rtol=1e-4, atol=1e-5)
    fused_bytes = sum(block.attn.to_qkv.weight.nbytes * 2 + block.attn.to_qkv.bias.nbytes * 2 for block in fused.blocks)
    assert networks.bytes_beside(base) == fused_bytes and networks.bytes_beside(fused) == 0
    networks.forget("fused")
    assert networks.bytes_beside(base) == 0


def test_rows(networks: Networks):
    cases = [
        Case(512, "forward", 1),
        Case(512, "forward", 2, "bf16"),
        Case(512, "forward", 1, variant="fused"),
    ]
    rows = with_speedup(list(benchmark(cases, networks, rounds=2, min_seconds=0.0)))
    assert [(row["batch"], row["dtype"], row["variant"]) for row in rows] == [
        (1, "fp32", "eager"),
        (2, "bf16", "eager"),
        (1, "fp32", "fused"),
    ]
    for row in rows:
        assert row["images_per_s"] == pytest.approx(row["batch"] / (row["ms"] / 1e3))
        assert row["ms_low"] <= row["ms"] <= row["ms_high"] and row["rounds"] == 2 and row["note"] is None
    assert rows[0]["speedup"] == 1.0 and rows[1]["speedup"] is None  # nothing of batch 2 in float32
    assert rows[2]["speedup"] == rows[2]["images_per_s"] / rows[0]["images_per_s"]


def test_a_training_step_moves_the_weights_and_keeps_no_gradients(networks: Networks):
    before = {name: p.clone() for name, p in networks.base.named_parameters()}
    emmdit_forward.runner(Case(1024, "train", 1, "bf16"), networks)()
    assert any(not torch.equal(p, before[name]) for name, p in networks.base.named_parameters())
    assert all(p.grad is None for p in networks.base.parameters())
    assert len(networks.optimizer().state) == len(before)


def test_out_of_memory_is_a_row(networks: Networks, monkeypatch: pytest.MonkeyPatch):
    run = emmdit_forward.runner

    def runner(case: Case, networks: Networks):
        if case.batch > 1:
            raise torch.OutOfMemoryError("too large")
        return run(case, networks)

    monkeypatch.setattr(emmdit_forward, "runner", runner)
    cases = [Case(512, "forward", 1), Case(512, "forward", 64)]
    rows = with_speedup(list(benchmark(cases, networks, rounds=1, min_seconds=0.0)))
    assert rows[0]["images_per_s"] and rows[1]["images_per_s"] is None and rows[1]["note"] == "out of memory"


# -------------------------------------------------------------------------------- what is written


def test_the_script_prints_and_writes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(emmdit_forward, "Networks", functools.partial(Networks, config=TINY))
    quick = [case for case in emmdit_forward.QUICK if case.variant != "compiled"]
    assert len(quick) == len(emmdit_forward.QUICK) - 1
    monkeypatch.setattr(emmdit_forward, "QUICK", quick)
    monkeypatch.setattr(emmdit_forward, "COUNTS", COUNTS[:2])
    emmdit_forward.main(["--quick", "--device", "cpu", "--rounds", "1", "--json", str(tmp_path / "new" / "out.json")])
    printed = capsys.readouterr()
    written = json.loads((tmp_path / "new" / "out.json").read_text())
    assert written["benchmark"] == "emmdit_forward" and written["settings"]["quick"] is True
    assert len(written["rows"]) == len(quick) and len(written["counts"]) == 2
    for row in written["rows"]:
        assert f"{row['images_per_s']:.3g}" in printed.out
    assert "302,449,952" in printed.out and "warm-up" in printed.err and "warm-up" not in printed.out
    tables = [line for line in printed.out.splitlines() if line.startswith("|")]
    assert len(tables) == len(quick) + 2 + 4
    assert written["machine"]["torch"] == torch.__version__ and written["machine"]["torch"] in printed.out


def test_the_full_table_leaves_out_what_makes_no_sense():
    class Arguments:
        modes, resolutions, batch_sizes = ["forward", "train"], [512, 1024], [1, 8]
        dtypes, variants = ["fp32", "bf16"], ["eager", "compiled", "fused"]

    cases = emmdit_forward.full_table(Arguments)
    assert len(cases) == len(set(cases)) == 2 * 2 * 2 * 3 + 2 * 2 * 2 * 2
    assert not any(case.mode == "train" and case.variant == "fused" for case in cases)


def test_machine_says_what_matters_and_nothing_private():
    found = machine.machine()
    assert {"cpu", "cpu_cores", "ram_gib", "gpu", "torch", "commit", "date", "torch_threads"} <= found.keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*\+00:00", found["date"])
    text = json.dumps(found)
    assert socket.gethostname() not in text and str(Path.home()) not in text and str(machine.ROOT) not in text
    assert found["torch"] in machine.machine_line(found) and "\n" not in machine.machine_line(found)


def test_commit_of_a_checkout_and_of_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.git_commit() is None
    monkeypatch.setenv("PATH", "")
    assert machine.git_commit() is None


def test_table():
    rows = [{"a": "x", "b": 0.123456, "c": None}, {"a": "long", "b": 1234.5, "c": 12345}]
    assert common.markdown_table(rows, {"a": "A", "b": "B", "c": "C"}).splitlines() == [
        "| A | B | C |",
        "|---|---:|---:|",
        "| x | 0.123 |  |",
        "| long | 1234 | 12,345 |",
    ]
