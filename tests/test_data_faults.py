"""Every fault of a source is one reject with file, row and reason, or one sentence; nothing else is lost."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from datamodules import CaptionedImagesDataModule, LatentsDataModule
from emmdit.data.dataset import CaptionedDataset
from emmdit.data.images import load_image
from emmdit.data.precompute.latents import LatentsDataset
from emmdit.data.precompute.manifest import read_manifest
from emmdit.data.precompute.precompute import Settings, precompute
from emmdit.data.readers.open import open_source
from emmdit.encoders import DCTCodec
from lightning_modules.commands.main import main
from tests.command_line import change, files
from tests.command_line import elsewhere as elsewhere
from tests.test_precompute import folder, jpeg, noise
from tests.test_sources import png, reason, write_mds


def megapixels() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_001)).save(buffer, "PNG")
    return buffer.getvalue()


def petapixels() -> bytes:
    """Pillow itself refuses this one."""
    huge = bytearray(png(0))
    huge[16:24] = (60_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    return bytes(huge)


# name, image, caption, reason to reject the row; "" for a good one
ROWS = [
    ("00_good", jpeg(noise(0)), b"image 0", ""),
    ("01_cut_jpeg", jpeg(noise(1))[:300], b"image 1", "corrupt"),
    ("02_html", b"<html>404</html>", b"image 2", "corrupt"),
    ("03_no_bytes", b"", b"image 3", "corrupt"),
    ("04_no_caption", jpeg(noise(4)), None, "empty caption"),
    ("05_blank_caption", jpeg(noise(5)), b" \n", "empty caption"),
    ("06_huge", megapixels(), b"a hundred megapixels", "decompression bomb"),
    ("06_huger", petapixels(), b"more than that", "decompression bomb"),
    ("07_small", jpeg(noise(0, 20)), b"small", "too small"),
    ("08_not_utf8", jpeg(noise(8)), b"caf\xe9", "corrupt"),
    ("09_good", jpeg(noise(9)), b"image 9", ""),
]


@dataclass
class Faulty:
    """A source: its place, the expected rejects (row, key, reason), and the rows that are good: number -> image."""

    source: str
    rejects: list[tuple[int, str, str]] = field(default_factory=list)
    good: dict[int, int] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)

    def add(self, key: str, reason: str, number: int = 0) -> None:
        row = len(self.rejects) + len(self.good)
        if reason:
            self.rejects.append((row, key, reason))
        else:
            self.good[row] = number


def tars() -> Faulty:
    found = Faulty("tars")
    Path("tars").mkdir()
    with tarfile.open("tars/a.tar", "w") as tar:

        def add(name: str, data: bytes, **more) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in more.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(data))

        for name, image, caption, why in ROWS:
            add(f"{name}.jpg", image)
            if caption is not None:
                add(f"{name}.txt", caption)
            found.add(f"a.tar, sample '{name}'", why, int(name[:2]))
        for name, more in (
            ("../../../escaped_member", {}),
            ("/etc/escaped_member", {}),
            ("link", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ):
            add(f"{name}.jpg", b"" if more else jpeg(noise(1)), **more)
            found.add(f"a.tar, sample '{name}'", "unsafe path")
        add("cut.jpg", jpeg(noise(2)))
        add("cut.txt", b"the end")
        found.add("a.tar, sample 'cut'", "corrupt")
    data = Path("tars/a.tar").read_bytes()
    Path("tars/a.tar").write_bytes(data[: data.index(b"the end") + 4])
    with tarfile.open("tars/b.tar", "w") as tar:  # what follows a truncated tar is not lost
        add("next.jpg", jpeg(noise(7)))
        add("next.txt", b"image 7")
        found.add("", "", 7)
    data = Path("tars/b.tar").read_bytes()
    Path("tars/c.tar").write_bytes(data[:512] + data[512:].replace(b"next.txt", b"\x99" * 8, 1))
    found.add("c.tar, sample 'next'", "empty caption")
    found.add(f"c.tar, sample 'at byte {512 + len(jpeg(noise(7)))}'", "corrupt")
    return found


def image_folder() -> Faulty:
    found = Faulty("folder")
    Path("folder").mkdir()
    Path("outside.jpg").write_bytes(jpeg(noise(0)))
    for name, image, caption, why in ROWS:
        Path(f"folder/{name}.jpg").write_bytes(image)
        if caption is not None:
            Path(f"folder/{name}.txt").write_bytes(caption)
        found.add(f"{name}.jpg", why, int(name[:2]))
    Path("folder/10_json.jpg").write_bytes(jpeg(noise(0)))
    Path("folder/10_json.json").write_text("{")
    Path("folder/11_out.jpg").symlink_to("../outside.jpg")
    Path("folder/12_gone.jpg").symlink_to("nowhere.jpg")
    Path("folder/12_gone.txt").write_text("image")
    for name, why in (("10_json", "corrupt"), ("11_out", "unsafe path"), ("12_gone", "missing")):
        found.add(f"{name}.jpg", why)
    return found


def parquet() -> Faulty:
    found = Faulty("rows.parquet")
    images, captions = [], []
    for name, image, caption, why in [*ROWS, ("10_none", None, b"image", "missing")]:
        if name != "08_not_utf8":  # parquet checks it when it is written
            images.append({"bytes": image, "path": None})
            captions.append(None if caption is None else caption.decode())
            found.add("", why, int(name[:2]))
    table = datasets.Dataset.from_dict({"image": images, "caption": captions})
    table.cast_column("image", datasets.Image()).to_parquet("rows.parquet")
    return found


def mds() -> Faulty:
    found = Faulty("mds", columns={"image_column": "jpg"})
    Path("mds").mkdir()
    encodings = {"caption": "str", "jpg": "jpeg"}
    rows = [{"caption": caption or b"", "jpg": image} for _, image, caption, _ in ROWS]
    write_mds(Path("mds/0"), encodings, dict.fromkeys(encodings), rows)
    for i, (name, _, _, why) in enumerate(ROWS):
        found.add(f"0/shard.00000.mds, sample {i}", why, int(name[:2]))
    for part in (1, 2):
        rows = [{"caption": b"image %d" % i, "jpg": jpeg(noise(i))} for i in range(2)]
        shard = write_mds(Path(f"mds/{part}"), encodings, dict.fromkeys(encodings), rows) / "shard.00000.mds"
        if part == 1:
            os.truncate(shard, shard.stat().st_size - 20)
            found.add("", "", 0)
            found.add("1/shard.00000.mds, sample 1", "corrupt")
        else:
            shard.unlink()
            found.add("2/shard.00000.mds, sample 0", "missing")
            found.add("2/shard.00000.mds, sample 1", "missing")
    return found


@pytest.mark.parametrize("make", [tars, image_folder, parquet, mds])
def test_each_bad_row_is_named_and_nothing_else_is_lost(make, capsys: pytest.CaptureFixture) -> None:
    faulty = make()
    image_column = faulty.columns.get("image_column", "image")

    # the reader: what it cannot read it names, and the sample of a dataset names its row
    rows = open_source(faulty.source)
    assert len(rows) == len(faulty.rejects) + len(faulty.good)
    columns = {"image": image_column, "caption": "caption"}
    samples = CaptionedDataset(rows.select_columns([image_column, "caption"]), "the source", columns, 32)
    for row, key, why in faulty.rejects:
        if why not in ("empty caption", "too small"):
            assert reason(rows, row, image_column) == why, (key, why)
            with pytest.raises(ValueError, match=f"Row {row} of 'the source'") as caught:
                samples[row]
            assert key in str(caught.value) and "\n" not in str(caught.value)

    # precompute: all the others, and their latents
    settings = Settings(resolution=32, batch_size=3, rows_per_shard=4, **faulty.columns)
    manifest = precompute(rows, {"source": faulty.source}, DCTCodec(), "out", settings, num_workers=int(make is tars))
    rejects = [json.loads(line) for line in Path("out/rejects.jsonl").read_text().splitlines()]
    assert [(reject["row"], reject["key"], reject["reason"]) for reject in rejects] == faulty.rejects
    assert all(reject["detail"] for reject in rejects)
    assert manifest["counts"]["samples"] == len(faulty.good)
    table, latents, codec = datasets.load_from_disk("out"), LatentsDataset("out"), DCTCodec()
    assert table["sample_id"][:] == list(faulty.good)
    for sample, number in zip(map(latents.__getitem__, range(len(latents))), faulty.good.values(), strict=True):
        assert sample["caption"] == f"image {number}"
        expected = codec.encode(load_image(jpeg(noise(number)), 32)[None])[0]
        assert torch.equal(sample["latents"], expected.half().float())

    # the command: the same rejects
    main(["inspect-data", "--source", faulty.source, "--resolution", "32", "--out", "inspected"])
    assert json.loads(Path("inspected/report.json").read_text())["rejects"] == rejects
    lines = capsys.readouterr().out.replace("''", "'").splitlines()  # YAML doubles quotes
    for row, key, why in faulty.rejects:
        assert any(f"row: {row}," in line and key in line and why in line for line in lines)
    assert not list(Path.cwd().parent.rglob("escaped_member*"))


def test_non_finite_latents_are_rejected_and_a_source_of_rejects_alone_says_so() -> None:
    folder(Path("source"), 3)
    Path("source/001.jpg").write_bytes(jpeg(Image.new("RGB", (40, 40), "white")))

    class Overflow(DCTCodec):
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            latents = super().encode(images)
            return torch.where((images.mean((1, 2, 3)) > 0.9).view(-1, 1, 1, 1), latents.new_tensor(1e9), latents)

    manifest = precompute(open_source("source"), {}, Overflow(), "out", Settings(32))
    assert manifest["counts"] == {"rows": 3, "samples": 2, "rejected": {"non-finite latents": 1}}
    manifest = precompute(open_source("source"), {}, DCTCodec(), "none", Settings(64))
    assert manifest["counts"] == {"rows": 3, "samples": 0, "rejected": {"too small": 3}}
    with pytest.raises(ValueError, match="rejects.jsonl"):
        LatentsDataset("none")


CODEC = "{codec: {class_path: emmdit.encoders.DCTCodec}, resolution: 32, trainer: {accelerator: cpu}}"


def test_a_source_that_cannot_be_opened_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Cases: source, arguments of the data section, what the sentence names."""
    table = datasets.Dataset.from_dict({"image": [b"x"] * 10, "words": ["a"] * 10})
    table.to_parquet("rows.parquet")
    Path("cut.parquet").write_bytes(Path("rows.parquet").read_bytes()[:-30])
    table.save_to_disk("disk", num_shards=2)
    os.truncate("disk/data-00001-of-00002.arrow", 200)
    datasets.DatasetDict({"rest": table}).save_to_disk("splits")
    Path("list.tsv").write_text("")
    Path("empty").mkdir()
    cases = [
        ("rows.parquet", {}, r"'rows.parquet'.*caption_column.*image, words"),
        ("rows.parquet", {"image_column": "jpg", "caption_column": "words"}, r"image_column.*image, words"),
        ("rows.parquet", {"caption_column": "words", "validation_samples": 10}, r"\b10 rows.*validation_samples"),
        ("rows.parquet", {"split": "test"}, '"test"'),
        ("cut.parquet", {}, "cut.parquet is truncated or damaged"),
        ("disk", {}, "data-00001-of-00002.arrow is truncated or damaged"),
        ("splits", {}, "'train'.*rest"),
        ("list.tsv", {}, "'list.tsv'"),
        ("empty", {}, "'empty'"),
        ("./gone.parquet", {}, r"'\./gone.parquet'"),
        ("no*.tar", {}, r"'no\*.tar'"),
        ("nothing", {}, "'nothing'"),
        (str(tmp_path / "nothing"), {}, "nothing'"),
        ("someone/nothing", {}, "'someone/nothing'.*HF_HUB_OFFLINE"),
        ("rows.parquet", {"image_column": None}, "image_column, latents_column"),
        ("rows.parquet", {"resolution": 0}, r"resolution.*\b0\b.*\b1\b"),
    ]
    for source, arguments, message in cases:
        with pytest.raises((ValueError, OSError), match=message) as caught:
            CaptionedImagesDataModule(source, **({"validation_samples": 3} | arguments)).setup("fit")
        assert "\n" not in str(caught.value)
    for source in ("cut.parquet", "rows.parquet"):
        with pytest.raises(SystemExit) as ended:
            data = [*files("data/pd12m.yaml"), "--data.init_args.data_files=null", f"--data.init_args.source={source}"]
            main(["precompute", *data, *change(CODEC), "--out", "out"])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and source in error and "Traceback" not in error
        assert len(error.strip().splitlines()) == 2 and not Path("out").exists()


def test_a_wrong_manifest_and_latents_that_do_not_fit_it() -> None:
    folder(Path("source"), 6)
    precompute(open_source("source"), {"license": "mine"}, DCTCodec(), "out", Settings(32, rows_per_shard=4))
    text = Path("out/manifest.json").read_text()
    whole = json.loads(text)
    for wrong, message in (
        ("{", r"out/manifest.json"),
        (json.dumps(whole | {"kind": "thesis"}), "'thesis'.*'emmdit latents' 1"),
        (json.dumps(whole | {"version": 9}), "'emmdit latents'.*9"),
        (json.dumps({"kind": whole["kind"], "version": 1}), "out/manifest.json.*'shards'"),
    ):
        Path("out/manifest.json").write_text(wrong)
        with pytest.raises(ValueError, match=message) as caught:
            LatentsDataModule("out", validation_samples=1).setup("fit")
        assert "\n" not in str(caught.value)

    Path("out/manifest.json").write_text(text.replace('"license"', '"licence"'))  # as it was spelled once
    assert LatentsDataModule("out").provenance()["license"] == "mine"
    other = json.loads(text)
    other["columns"]["latents"]["dtype"] = "float32"
    Path("out/manifest.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"Row 2 of 'out'.*latents of 4,096 bytes"):
        LatentsDataset("out", first=1)[1]

    Path("out/manifest.json").write_text(text)
    os.truncate("out/data-000001.arrow", 500)
    with pytest.raises(ValueError, match=r"data-000001.arrow.*\b500\b"):
        read_manifest("out")
