"""Every fault of a source ends in a reject with file, row and reason, or in one sentence; nothing else is lost."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import LatentsDataModule
from emmdit.data.images import load_image
from emmdit.data.precompute.latents import LatentsRows
from emmdit.data.precompute.manifest import read_manifest, verify
from emmdit.data.precompute.precompute import Settings, precompute
from emmdit.data.readers.open import open_source
from emmdit.encoders import DCTCodec
from lightning_modules.commands.main import main
from tests.command_line import change, files
from tests.command_line import elsewhere as elsewhere
from tests.test_precompute import jpeg, picture
from tests.test_sources import write_mds


def run(source: str, **columns: str) -> tuple[dict, list[tuple[int, str, str]]]:
    """`emmdit precompute` of a source into `out`: the manifest, and (row, key, reason) of the rejects."""
    settings = Settings(resolution=32, batch_size=3, rows_per_shard=4, **columns)
    manifest = precompute(open_source(source), {"source": source}, DCTCodec(), "out", settings)
    rejects = [json.loads(line) for line in Path("out/rejects.jsonl").read_text().splitlines()]
    assert all(reject["detail"] for reject in rejects)
    return manifest, [(reject["row"], reject["key"], reject["reason"]) for reject in rejects]


def is_there(pictures: dict[int, int]) -> None:
    """Row of the source -> number of the picture: these samples and no others, their latents the picture's."""
    table, samples, codec = datasets.load_from_disk("out"), LatentsRows("out"), DCTCodec()
    assert table["sample_id"][:] == list(pictures)
    for sample, number in zip(map(samples.__getitem__, range(len(samples))), pictures.values(), strict=True):
        assert sample["caption"] == f"picture {number}"
        expected = codec.encode(load_image(jpeg(picture(number)), 32)[None])[0]
        assert torch.equal(sample["latents"], expected.half().float())


def megapixels() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_001)).save(buffer, "PNG")
    return buffer.getvalue()


def test_faults_in_a_truncated_tar() -> None:
    Path("tars").mkdir()
    with tarfile.open("tars/a.tar", "w") as tar:

        def add(name: str, data: bytes, **more) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in more.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(data))

        def both(name: str, image: bytes, caption: bytes, suffix: str = "jpg") -> None:
            add(f"{name}.{suffix}", image)
            add(f"{name}.txt", caption)

        both("good", jpeg(picture(0)), b"picture 0")
        both("bad_jpeg", jpeg(picture(1))[:300], b"picture 1")
        both("not_a_jpeg", b"<html>404</html>", b"picture 2")
        both("zero_byte_caption", jpeg(picture(3)), b"")
        both("empty_picture", b"", b"picture 3")
        add("no_caption.jpg", jpeg(picture(4)))
        add("../../../evil.jpg", jpeg(picture(5)))
        add("/etc/evil.jpg", jpeg(picture(5)))
        add("link.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        both("huge", megapixels(), b"a hundred megapixels", "png")
        both("small", jpeg(picture(0, 20)), b"small")
        both("latin", jpeg(picture(6)), b"caf\xe9")
        both("also_good", jpeg(picture(7)), b"picture 7")
        both("cut", jpeg(picture(8)), b"picture 8")
    data = Path("tars/a.tar").read_bytes()
    Path("tars/a.tar").write_bytes(data[: data.index(b"picture 8") + 4])
    with tarfile.open("tars/b.tar", "w") as tar:
        add("next.jpg", jpeg(picture(9)))
        add("next.txt", b"picture 9")
    manifest, rejects = run("tars")
    assert rejects == [
        (1, "a.tar, sample 'bad_jpeg'", "corrupt"),
        (2, "a.tar, sample 'not_a_jpeg'", "corrupt"),
        (3, "a.tar, sample 'zero_byte_caption'", "empty caption"),
        (4, "a.tar, sample 'empty_picture'", "corrupt"),
        (5, "a.tar, sample 'no_caption'", "empty caption"),
        (6, "a.tar, sample '../../../evil'", "unsafe path"),
        (7, "a.tar, sample '/etc/evil'", "unsafe path"),
        (8, "a.tar, sample 'link'", "unsafe path"),
        (9, "a.tar, sample 'huge'", "decompression bomb"),
        (10, "a.tar, sample 'small'", "too small"),
        (11, "a.tar, sample 'latin'", "corrupt"),
        (13, "a.tar, sample 'cut'", "corrupt"),
    ]
    is_there({0: 0, 12: 7, 14: 9})
    assert manifest["counts"]["rejected"]["unsafe path"] == 3
    assert not list(Path.cwd().parent.rglob("evil*"))


def test_mds_shards_that_are_truncated_and_missing() -> None:
    encodings = {"caption": "str", "jpg": "jpeg"}
    folders = []
    for part in range(3):
        rows = [{"caption": b"picture %d" % i, "jpg": jpeg(picture(i))} for i in range(4 * part, 4 * part + 4)]
        Path("mds").mkdir(exist_ok=True)
        folders.append(write_mds(Path(f"mds/{part}"), encodings, dict.fromkeys(encodings), rows))
    shard = folders[0] / "shard.00000.mds"
    os.truncate(shard, shard.stat().st_size - 20)
    (folders[1] / "shard.00000.mds").unlink()
    _, rejects = run("mds", image_column="jpg")
    assert rejects == [
        (3, "0/shard.00000.mds, sample 3", "corrupt"),
        *[(4 + i, f"1/shard.00000.mds, sample {i}", "missing") for i in range(4)],
    ]
    is_there({row: row for row in (0, 1, 2, 8, 9, 10, 11)})


def test_rows_of_parquet_without_picture_or_caption() -> None:
    images = [jpeg(picture(0)), None, b"", jpeg(picture(3)), jpeg(picture(4)), jpeg(picture(5))]
    columns = {
        "image": [{"bytes": data, "path": None} for data in images],
        "caption": ["picture 0", "none", "no bytes", None, "", "picture 5"],
    }
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.to_parquet("rows.parquet")
    _, rejects = run("rows.parquet")
    assert [(row, reason) for row, _, reason in rejects] == [
        (1, "missing"),
        (2, "corrupt"),
        (3, "empty caption"),
        (4, "empty caption"),
    ]
    is_there({0: 0, 5: 5})


CODEC = "{codec: {class_path: emmdit.encoders.DCTCodec}, resolution: 32, trainer: {accelerator: cpu}}"


def test_a_wrong_column_or_file_is_one_sentence(capsys: pytest.CaptureFixture) -> None:
    table = datasets.Dataset.from_dict({"img": [b"x"], "words": ["a"]})
    table.to_parquet("rows.parquet")
    Path("cut.parquet").write_bytes(Path("rows.parquet").read_bytes()[:-30])
    data = [*files("data/pd12m.yaml"), "--data.init_args.data_files=null"]
    for source, more, words in (
        ("rows.parquet", [], ("'rows.parquet'", "'image'", "image_column", "img, words")),
        (
            "rows.parquet",
            ["--data.init_args.image_column=img"],
            ("'rows.parquet'", "'caption'", "caption_column", "img, words"),
        ),
        ("cut.parquet", [], ("cut.parquet", "truncated")),
        ("./gone.parquet", [], ("'./gone.parquet'",)),
    ):
        with pytest.raises(SystemExit) as ended:
            command = [*data, f"--data.init_args.source={source}", *more, *change(CODEC), "--out", "out"]
            main(["precompute", *command])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and all(word in error for word in words) and "Traceback" not in error
        assert len(error.strip().splitlines()) == 2 and not Path("out").exists()


def test_a_wrong_manifest_and_latents_that_do_not_fit_it() -> None:
    Path("source").mkdir()
    for i in range(6):
        Path(f"source/{i}.jpg").write_bytes(jpeg(picture(i)))
        Path(f"source/{i}.txt").write_text(f"picture {i}")
    run("source")
    text = Path("out/manifest.json").read_text()
    whole = json.loads(text)
    for wrong, message in (
        ("{", r"out/manifest\.json.*line 1 column 2"),
        (json.dumps(whole | {"kind": "thesis"}), "'thesis'.*'emmdit latents'"),
        (json.dumps(whole | {"version": 9}), r"'emmdit latents'.*\b9\b"),
        (json.dumps({"kind": whole["kind"], "version": 1}), "out/manifest.json.*'shards'"),
    ):
        Path("out/manifest.json").write_text(wrong)
        with pytest.raises(ValueError, match=message) as caught:
            LatentsDataModule("out", validation_samples=1).setup("fit")
        assert "\n" not in str(caught.value)

    other = json.loads(text)
    other["columns"]["latents"]["dtype"] = "float32"
    Path("out/manifest.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"Row 2\b.*'out'.*latents.*4,096.*\(32, 8, 8\)"):
        LatentsRows("out", first=1)[1]

    Path("out/manifest.json").write_text(text)
    verify("out")
    with open("out/data-000001.arrow", "r+b") as file:  # a flipped bit keeps the size
        file.seek(-600, os.SEEK_END)
        byte = file.read(1)
        file.seek(-600, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ValueError, match="data-000001.arrow.*hash"):
        verify("out")
    os.truncate("out/data-000001.arrow", 500)
    with pytest.raises(ValueError, match=r"data-000001\.arrow.*\b500\b.*\b[\d,]+\b"):
        read_manifest("out")


def test_reading_in_batches_is_reading_one_by_one() -> None:
    """Of latents of several sizes, features and text, in any order and more than once."""
    Path("source").mkdir()
    for i in range(9):
        Path(f"source/{i}.jpg").write_bytes(jpeg(picture(0).resize((48 + 24 * (i % 3), 72))))
        Path(f"source/{i}.txt").write_text(f"picture {i}")

    class Vision:
        feature_dim, dtype = 3, torch.float32

        def to(self, device):
            return self

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(2)[:, :, : images.shape[-1]].movedim(1, 2)

    from emmdit.data.buckets import Buckets

    settings = Settings(resolution=32, batch_size=4, rows_per_shard=4, buckets=Buckets(8), min_side=1)
    precompute(open_source("source"), {"source": "source"}, DCTCodec(), "out", settings, vision=Vision())
    rows = LatentsRows("out")
    order = [8, 0, 3, 3, 7, 1, 2, 6, 5, 4]
    batch = rows.__getitems__(order)
    assert len({tuple(sample["latents"].shape) for sample in batch}) == 3
    for index, sample in zip(order, batch, strict=True):
        alone = rows[index]
        assert sample.keys() == alone.keys() and sample["sample_id"] == index
        assert sample["caption"] == alone["caption"] == f"picture {index}"
        for name in ("latents", "features"):
            assert torch.equal(sample[name], alone[name]) and sample[name].dtype == torch.float32
        stored = rows.table[index]
        assert (
            sample["latents"].numpy().tobytes() == np.frombuffer(stored["latents"], np.float16).astype("f4").tobytes()
        )
