"""`emmdit inspect-data`: it judges rows as precompute does, counts as by hand, and shows what training sees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from emmdit.data.buckets import Buckets, one_bucket
from emmdit.data.images import fit, open_image
from emmdit.data.inspect import bucket_table, caption_table
from emmdit.data.precompute.precompute import Settings, precompute
from emmdit.data.readers.open import open_source
from emmdit.encoders import DCTCodec
from emmdit.files import read_settings
from lightning_modules.commands.main import main
from tests.command_line import EXPERIMENTS, change, files
from tests.command_line import elsewhere as elsewhere
from tests.test_precompute import folder, jpeg, noise


def report(out: str = "out") -> dict:
    return json.loads(Path(out, "report.json").read_text())


# -- counting ----------------------------------------------------------------------------------------


def test_captions_by_hand() -> None:
    letters = ("letters", lambda captions: [len(caption) for caption in captions], 3)
    table = caption_table(["a", "abc", "abcd", "abcd"], [letters])
    assert table["captions"] == 4 and table["repeated"] == 1
    row = table["in"][0]
    assert (row["cut"], row["max_length"], row["lengths"]["max"], row["lengths"]["median"]) == (2, 3, 4, 3.5)


def test_buckets_by_hand() -> None:
    sizes = np.array([[512, 512], [512, 512], [1024, 512], [300, 900]])  # height and width
    buckets = Buckets(128, 2.0)
    table = bucket_table(sizes, buckets.sizes(512), buckets.assign(sizes, 512), 512)
    rows = {(row["height"], row["width"]): row for row in table["rows"]}
    assert {size: row["images"] for size, row in rows.items()} == {(640, 384): 1, (512, 512): 2, (384, 640): 1}
    assert rows[640, 384]["cropped"] == pytest.approx(1 - (640 / 384) / 2)  # 1:2 into 384 x 640
    assert rows[384, 640]["cropped"] == pytest.approx(1 - (640 / 384) / 3)
    assert table["cropped_square"] == pytest.approx((0 + 0 + 1 / 2 + 2 / 3) / 4)
    assert table["cropped"] == pytest.approx((1 / 6 + 4 / 9) / 4)
    assert sum(row["share"] for row in table["rows"]) == 1
    made = bucket_table(sizes, *one_bucket((512, 512), 4), 512)
    assert made["rows"] == [{"height": 512, "width": 512, "images": 4, "share": 1.0, "cropped": pytest.approx(7 / 24)}]


# -- the command -------------------------------------------------------------------------------------


def test_a_report_and_its_contact_sheet(capsys: pytest.CaptureFixture) -> None:
    """Rejects: tests/test_data_faults.py."""
    folder(Path("source"), 14)
    Path("source/005.jpg").write_bytes(jpeg(noise(0, 20)))
    main(["inspect-data", "--source", "source", "--resolution", "32", "--bucket_step", "8", "--out", "out"])
    found = report()
    assert (found["rows"], found["inspected"], found["good"]) == (14, 14, 13)
    assert found["captions"]["captions"] == 13 and found["captions"]["in"][0]["lengths"]["mean"] == 2
    assert found["sizes"]["width"]["max"] == 53 and found["sizes"]["height"]["min"] == 20
    assert sum(row["images"] for row in found["buckets"]["rows"]) == 13
    printed = yaml.safe_load(capsys.readouterr().out.rpartition("written: out")[0])
    assert {key: printed[key] for key in ("kind", "rows", "good")} == {"kind": "FolderRows", "rows": 14, "good": 13}
    assert printed["rejected"] == found["rejected"] == {"too small": 1} and printed["rejects"] == found["rejects"]

    sheet = Image.open("out/sheet.png")
    assert sheet.width == 6 * 168 + 8 and read_settings("out/sheet.png")["shown"] == list(range(14))
    first = np.asarray(sheet.convert("RGB"))[8:168, 8:168]  # row 0: its 32 px as training sees them, enlarged
    assert (first == fit(open_image(Path("source/000.jpg")), 32, 32).repeat(5, 0).repeat(5, 1)).all()


def test_a_sample_is_the_same_again_and_with_processes() -> None:
    folder(Path("source"), 23)
    common = ["inspect-data", "--source", "source", "--resolution", "32", "--sample", "7"]
    for out, more in (("a", []), ("b", ["--num_workers", "2"]), ("c", ["--seed", "1"]), ("d", ["--limit", "9"])):
        main([*common, *more, "--out", out, "--images", "3"])
    assert report("a") == report("b") and Path("a/sheet.png").read_bytes() == Path("b/sheet.png").read_bytes()
    rows = {out: read_settings(f"{out}/sheet.png")["shown"] for out in "abcd"}
    assert rows["a"] != rows["c"] and max(rows["d"]) < 9 and len(rows["a"]) == 3
    assert report("d")["inspected"] == 7 and report("a")["captions"]["captions"] == 7


def test_an_experiments_tokenizer_counts(capsys: pytest.CaptureFixture) -> None:
    folder(Path("source"), 4)
    Path("source/002.txt").write_text("a red circle and a blue square and a green star and a yellow cross " * 3)
    text = change("""
model:
  init_args:
    text: {init_args: {source: "standin:llama?caption_channels=64", caption_channels: 64, max_length: 16}}
    denoiser: {init_args: {num_attention_heads: 2, attention_head_dim: 16, caption_channels: 64}}
    init_from: null
data: {init_args: {source: source, data_files: null, resolution: 32}}
""")
    main(["inspect-data", *files("emmdit/512_stage2.yaml", "data/pd12m.yaml", "trainer/ddp_8gpu.yaml"), *text,
          "--out", "out"])  # fmt: skip
    row = report()["captions"]["in"][0]
    assert row["unit"] == "tokens of standin:llama?caption_channels=64" and row["max_length"] == 16
    assert row["cut"] == 1 and row["lengths"]["max"] > 40
    output = capsys.readouterr()
    assert "max_length: 16" in output.out and "cut: 1" in output.out and "Seed set" not in output.err


def test_the_shapes_world_and_a_latents_folder(capsys: pytest.CaptureFixture) -> None:
    main(["inspect-data", "-c", str(EXPERIMENTS / "quickstart.yaml"), "--out", "shapes", "--sample", "30"])
    found = report("shapes")
    assert found["good"] == 30 and found["sizes"]["width"]["max"] == 32 and found["captions"]["in"][0]["cut"] == 0
    assert Path("shapes/sheet.png").is_file() and found["buckets"] is None

    folder(Path("source"), 12)
    for name in ("001.txt", "009.txt"):
        Path("source", name).unlink()
    settings = Settings(32, rows_per_shard=5, keep_images=90, buckets=Buckets(8), min_side=1)
    precompute(open_source("source"), {"source": "source", "license": "mine"}, DCTCodec(), "latents", settings)
    main(["inspect-data", "--source", "latents", "--out", "kept"])
    found = report("kept")
    assert found["license"] == "mine" and "DCTCodec" in found["encoder"]
    assert (found["rows"], found["good"], found["rejected"]["empty caption"]) == (10, 10, 2)
    assert sum(row["images"] for row in found["buckets"]["rows"]) == 10
    assert found["latents"]["samples"] == 10 and 0.1 < found["latents"]["std"] < 10
    assert Path("kept/sheet.png").is_file()
    precompute(open_source("source"), {"source": "source"}, DCTCodec(), "bare", Settings(32))
    capsys.readouterr()
    main(["inspect-data", "--source", "bare", "--out", "none"])
    assert "--decode" in capsys.readouterr().out
    change("{data: {class_path: datamodules.LatentsDataModule, init_args: {source: bare}}}", "bare.yaml")
    decoded = change("model: {init_args: {codec: {class_path: emmdit.encoders.DCTCodec}}}", "codec.yaml")
    main(["inspect-data", *files("quickstart.yaml"), "-c", "bare.yaml", *decoded, "--decode", "--out", "decoded"])
    assert Image.open("decoded/sheet.png").width > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "./nowhere"], "'./nowhere'"),
        (["--source", "source", "--caption_column", "words"], "'words'"),
        (["--source", "source", "--limit", "0"], "--limit"),
        (["-c", "gone.yaml"], "gone.yaml"),
        ([], "--source or -c"),
        (["--source", "source", "--data.init_args.seed=1"], "--data.init_args.seed=1"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    folder(Path("source"), 2)
    with pytest.raises(SystemExit) as ended:
        main(["inspect-data", *arguments, "--out", "out"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and "Traceback" not in error
