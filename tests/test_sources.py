"""Tars, MDS shards and captioned folders: the same samples as elsewhere, and a name for everything that is wrong."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from emmdit.data import MDSDataset
from emmdit.data.dataset import CaptionedDataset
from emmdit.data.images import InvalidSample, load_image, open_image
from emmdit.data.readers import tars
from emmdit.data.readers.open import open_source, select_columns
from emmdit.data.readers.protocol import Rows
from emmdit.data.readers.tars import TarRows
from tests.command_line import elsewhere as elsewhere

MDS = Path(__file__).parent / "data/mds"


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def sample(number: int) -> list[tuple[str, bytes]]:
    about = json.dumps({"prompt": f"prompt {number}"}).encode()
    return [
        (f"{number:03d}.png", png(number)),
        (f"{number:03d}.txt", b"text %d" % number),
        (f"{number:03d}.json", about),
    ]


def reason(rows: Rows, number: int, image_column: str = "image") -> str:
    with pytest.raises(InvalidSample) as caught:
        open_image(rows[number][image_column])
    return caught.value.reason


# -- every kind gives the same -----------------------------------------------------------------------


def test_every_kind_of_source_gives_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    for part in range(3):
        tar(tmp_path / f"tars/{part}.tar", [m for i in range(3 * part, 3 * part + 3) for m in sample(i)])
    (tmp_path / "folder/sub").mkdir(parents=True)
    (tmp_path / "json").mkdir()
    for i in range(9):
        where = tmp_path / "folder" / ("sub" if i > 4 else "") / f"{i:03d}"
        for folder in (where, tmp_path / f"json/{i:03d}"):
            folder.with_suffix(".png").write_bytes(png(i))
        where.with_suffix(".txt").write_text(f"text {i}")
        (tmp_path / f"json/{i:03d}.json").write_text(json.dumps({"caption": f"text {i}"}))
    columns = {"image": [{"bytes": png(i), "path": None} for i in range(9)], "caption": [f"text {i}" for i in range(9)]}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "disk")
    datasets.DatasetDict({"train": table, "rest": table.select([0])}).save_to_disk(tmp_path / "splits")
    for part in range(3):
        table.select(range(3 * part, 3 * part + 3)).to_parquet(tmp_path / "many" / f"{part}.parquet")
    shutil.copytree(tmp_path / "json", tmp_path / "csv", ignore=shutil.ignore_patterns("*.json"))
    lines = [f"{i:03d}.png,text {i}" for i in range(9)]
    (tmp_path / "csv/metadata.csv").write_text("\n".join(["file_name,caption", *lines]))

    sources = ["tars", "tars/*.tar", "folder", "json", "csv", "rows.parquet", "many", "many/*.parquet", "splits"]
    sources += ["disk", "disk/*.arrow"]
    for name in sources:
        rows = select_columns(open_source(str(tmp_path / name)), {"image": "image", "caption": "caption"}, name)
        samples = CaptionedDataset(rows, name, {"image": "image", "caption": "caption"}, 16)
        assert len(samples) == 9, name
        for i in (0, 4, 8):
            assert samples[i]["caption"] == f"text {i}", name
            assert (samples[i]["image"] == load_image(png(i), 16)).all(), name
        again = open_source(str(tmp_path / name)).select_columns(rows.column_names)
        assert len(rows.fingerprint) == 16 and rows.fingerprint == again.fingerprint
        copy = pickle.loads(pickle.dumps(rows))  # as loader processes get them
        assert copy.__getitems__([8, 0]) == [rows[8], rows[0]] and copy.origin(3) == rows.origin(3)
    tars = open_source(str(tmp_path / "tars"))
    assert tars.column_names == ["__key__", "json", "png", "txt", "image", "caption"]
    assert tars[4]["__key__"] == "004" and tars[4]["json"] == {"prompt": "prompt 4"}
    assert tars.origin(4) == "1.tar, sample '004'"
    prompts = CaptionedDataset(tars, "tars", {"image": "png", "caption": "json.prompt"}, 16)
    assert prompts[7]["caption"] == "prompt 7"
    with pytest.raises(ValueError, match="'tars'.*'text'.*caption_column.*__key__"):
        select_columns(tars, {"caption": "text"}, "tars")


def test_a_tars_index_is_kept_until_the_tar_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tar(tmp_path / "a.tar", sample(0) + [("../evil.txt", b"x")])
    first = TarRows([file])
    with monkeypatch.context() as blocked:
        blocked.setattr(tarfile, "open", None)
        again = TarRows([file])
    assert len(again) == len(first) == 2 and again[0]["caption"] == "text 0"
    assert reason(again, 1) == "unsafe path"
    tar(file, sample(0) + sample(1) + sample(2))
    assert len(TarRows([file])) == 3


def test_processes_that_start_together_scan_each_tar_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tar(tmp_path / f"{i}.tar", sample(i)) for i in range(6)]
    scan = tars._scan

    def slow(file: Path, size: int) -> dict:
        with open(tmp_path / "scans", "a") as log:
            log.write(f"{file.name} {os.getpid()}\n")
        time.sleep(0.2)
        return scan(file, size)

    monkeypatch.setattr(tars, "_scan", slow)
    children = []
    for _ in range(3):
        if (child := os.fork()) == 0:
            rows = TarRows(files)
            os._exit(0 if [rows[i]["caption"] for i in range(6)] == [f"text {i}" for i in range(6)] else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    scans = [line.split() for line in (tmp_path / "scans").read_text().splitlines()]
    assert sorted(name for name, _ in scans) == [f"{i}.tar" for i in range(6)]  # none twice
    assert len({process for _, process in scans}) > 1  # and not all by one


# -- MDS ---------------------------------------------------------------------------------------------


def test_mds_shards_are_read_as_the_original_reader_does() -> None:
    expected = json.loads((MDS / "expected.json").read_text())
    rows = MDSDataset(MDS)
    assert len(rows) == len(expected) and rows.column_names == ["caption", "jpg", "latents_512"]
    for i, wanted in enumerate(expected):
        row = rows[i]
        assert row["caption"] == wanted["caption"] and list(row["jpg"].size) == wanted["size"]
        assert hashlib.sha256(row["latents_512"]).hexdigest() == wanted["latents_sha256"]
        assert hashlib.sha256(np.asarray(row["jpg"]).tobytes()).hexdigest() == wanted["pixels_sha256"]
    assert rows.raw(3)["caption"].decode() == expected[3]["caption"]
    assert rows[-1]["caption"] == expected[-1]["caption"] and rows.origin(14) == "shard.00001.mds, sample 0"
    with pytest.raises(IndexError):
        rows[len(rows)]

    columns = {"image": "jpg", "caption": "caption", "latents": "latents_512"}
    opened = select_columns(open_source(str(MDS)), columns, "mds")
    one = CaptionedDataset(opened, "mds", columns, 32, (32, 16, 16), 0.5)[5]
    stored = np.frombuffer(rows[5]["latents_512"], np.float16).reshape(32, 16, 16).astype(np.float32)
    assert one["image"].shape == (3, 32, 32) and (one["latents"].numpy() == stored * 0.5).all()


def write_mds(
    folder: Path, encodings: dict[str, str], sizes: dict[str, int | None], rows: list[dict[str, bytes]]
) -> Path:
    """By the layout's description, for encodings that the goldens do not have."""
    folder.mkdir(exist_ok=True)
    samples = []
    for row in rows:
        lengths = [len(row[name]) for name in encodings if sizes[name] is None]
        samples.append(np.array(lengths, "<u4").tobytes() + b"".join(row[name] for name in encodings))
    head = json.dumps({"any": "thing"}).encode()
    begin = 4 * (len(samples) + 2) + len(head)
    offsets = np.array([begin, *(begin + n for n in np.cumsum([len(s) for s in samples]))], "<u4")
    data = np.uint32(len(samples)).tobytes() + offsets.tobytes() + head + b"".join(samples)
    (folder / "shard.00000.mds").write_bytes(data)
    entry = {"format": "mds", "samples": len(samples), "column_names": list(encodings), "zip_data": None}
    entry |= {"column_encodings": list(encodings.values()), "column_sizes": [sizes[name] for name in encodings]}
    entry["raw_data"] = {"basename": "shard.00000.mds", "bytes": len(data)}
    (folder / "index.json").write_text(json.dumps({"shards": [entry], "version": 2}))
    return folder


def edit(folder: Path, **changes) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0] |= changes
    (folder / "index.json").write_text(json.dumps(index))


def test_mds_encodings(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float16).reshape(2, 3)
    pil = np.array([3, 2, 1], "<u4").tobytes() + b"L" + bytes(range(6))
    columns = {
        "fixed": ("int64", 8, np.int64(-7).tobytes(), -7),
        "int": ("int", 8, np.int64(9).tobytes(), 9),
        "half": ("float16", 2, np.float16(0.5).tobytes(), 0.5),
        "digits": ("str_int", None, b"12345678901234567890", 12345678901234567890),
        "real": ("str_float", None, b"0.25", 0.25),
        "json": ("json", None, b'{"a": [1]}', {"a": [1]}),
        "array": ("ndarray", None, bytes([18, 2 << 2, 2, 3]) + values.tobytes(), values),
        "shaped": ("ndarray:float16:2,3", 12, values.tobytes(), values),
        "typed": ("ndarray:float16", None, bytes([2 << 2 | 1, 2, 0, 3, 0]) + values.tobytes(), values),
        "pil": ("pil", None, pil, np.arange(6).reshape(2, 3)),
    }
    encodings = {name: column[0] for name, column in columns.items()}
    row = {name: column[2] for name, column in columns.items()}
    write_mds(tmp_path / "mds", encodings, {name: column[1] for name, column in columns.items()}, [row, row])
    found = MDSDataset(tmp_path / "mds")[1]
    for name, column in columns.items():
        assert np.array_equal(np.asarray(found[name]), np.asarray(column[3])), name


@pytest.mark.parametrize("kind", ["zstd", "gz"])
def test_packed_mds_shards_are_unpacked_once(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "mds"
    shutil.copytree(MDS, folder)
    index = json.loads((folder / "index.json").read_text())
    for entry in index["shards"]:
        file = folder / entry["raw_data"]["basename"]
        packed = file.with_name(f"{file.name}.{kind}")
        with pa.CompressedOutputStream(str(packed), {"gz": "gzip"}.get(kind, kind)) as stream:
            stream.write(file.read_bytes())
        entry |= {"compression": kind, "zip_data": {"basename": packed.name, "bytes": packed.stat().st_size}}
        file.unlink()
    (folder / "index.json").write_text(json.dumps(index))
    plain, rows = MDSDataset(MDS), MDSDataset(folder)
    assert all(rows.raw(i) == plain.raw(i) for i in range(len(plain)))
    for file in folder.glob(f"*.{kind}"):
        file.unlink()
    assert MDSDataset(folder).raw(20) == plain.raw(20)


def test_mds_that_cannot_be_read(tmp_path: Path) -> None:
    encodings, sizes = {"caption": "str"}, {"caption": None}
    folder = write_mds(tmp_path / "mds", encodings, sizes, [{"caption": b"row %d" % i} for i in range(9)])
    for changes, message in (
        ({"column_encodings": ["pkl"]}, r"'caption'.*\bpkl\b"),
        ({"column_encodings": ["avif"]}, "'avif'.*'caption'"),
        ({"format": "json"}, r"'json'.*\bmds\b"),
        ({"raw_data": {"basename": "../../etc/passwd", "bytes": 1}}, r"'\.\./\.\./etc/passwd'"),
        ({"raw_data": {"bytes": 1}}, "'basename'"),
    ):
        shutil.copytree(folder, tmp_path / "bad", dirs_exist_ok=True)
        edit(tmp_path / "bad", **changes)
        with pytest.raises(ValueError, match=message) as caught:
            MDSDataset(tmp_path / "bad")
        assert "\n" not in str(caught.value) and "bad/index.json" in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"index\.json.*/nothing"):
        MDSDataset(tmp_path / "nothing")
    with pytest.raises(ValueError, match="'image'.*caption"):
        MDSDataset(folder, ["image"])


# -- tars --------------------------------------------------------------------------------------------


def test_what_is_no_tar_and_what_data_files_choose(tmp_path: Path) -> None:
    (tmp_path / "junk.tar").write_bytes(b"junk" * 500)
    for i in range(3):
        tar(tmp_path / f"{i}.tar", sample(i))
    with pytest.raises(InvalidSample, match="byte 0"):
        TarRows([tmp_path / "junk.tar"])[0]
    with pytest.raises(FileNotFoundError, match=r"gone.tar'"):
        TarRows([tmp_path / "gone.tar"])
    rows = open_source(str(tmp_path), data_files=["2.tar", "0.tar"])
    assert [rows[i]["caption"] for i in range(len(rows))] == ["text 0", "text 2"]


def test_columns_that_are_not_asked_for_are_not_read(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", [("json.png", png(2)), ("json.json", b"{")])
    rows = TarRows([tmp_path / "a.tar"])
    assert rows.select_columns(["image"])[0]["image"]["bytes"] == png(2)  # its broken JSON was not asked for
    assert reason(rows, 0) == "corrupt"
