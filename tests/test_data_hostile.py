"""Hostile sources: what a file claims is checked before memory is taken, nothing outside the source is read or written,
and every fault is a reject or one sentence."""

from __future__ import annotations

import json
import os
import struct
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from emmdit.data.buckets import Buckets, image_sizes
from emmdit.data.captions import check_weights
from emmdit.data.images import open_image
from emmdit.data.precompute.latents import LatentsDataset
from emmdit.data.precompute.precompute import Items, Settings, precompute
from emmdit.data.readers import huggingface
from emmdit.data.readers.open import open_source
from emmdit.encoders import DCTCodec
from tests.command_line import elsewhere as elsewhere
from tests.test_precompute import folder, jpeg, noise
from tests.test_sources import png, sample, tar, write_mds


def reasons(source: str, image: str = "image", caption: str = "caption", **settings) -> list[str]:
    items = Items(open_source(source), Settings(16, image_column=image, caption_columns=(caption,), **settings))
    return [items[number].reason for number in range(len(items))]


def test_a_long_thin_image_is_not_enlarged_to_gigabytes() -> None:
    folder(Path("source"), 1)
    Image.new("L", (1, 65_000)).save("source/000.jpg", "PNG")
    items = Items(open_source("source"), Settings(64, min_side=1, image_column="image", caption_columns=("caption",)))
    assert items[0].reason == "too long"
    Image.new("L", (1, 400_000)).save("source/000.jpg", "PNG")
    assert reasons("source", min_side=1) == ["decompression bomb"]


# -- links, pipes and paths --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tars", "parquet", "images", "metadata"])
def test_links_to_folders_neither_loop_nor_multiply(kind: str) -> None:
    Path("source").mkdir()
    if kind == "tars":
        tar(Path("source/a.tar"), sample(0))
    elif kind == "parquet":
        pq.write_table(pa.table({"image": [png(0)], "caption": ["x"]}), "source/a.parquet")
    else:
        Path("source/a.png").write_bytes(png(0))
        Path("source/a.txt").write_text("x")
    if kind == "metadata":
        Path("source/metadata.csv").write_text("file_name,caption\na.png,x\n")
    for name in "xyz":
        os.symlink(".", f"source/{name}")
    for number in range(40):  # 2^40 ways down, and no loop
        Path(f"source/d{number}").mkdir()
        for name in "xy":
            os.symlink(f"../d{number + 1}", f"source/d{number}/{name}")
    os.symlink("self", "source/self")
    assert reasons("source") == [""]
    if kind == "tars":
        assert len(open_source("source/**/*.tar")) == 1


@pytest.mark.parametrize("where", ["../shards", "/"])
def test_a_link_to_a_folder_elsewhere_is_named_and_read_if_asked_for(where: str) -> None:
    Path("shards").mkdir()
    tar(Path("shards/a.tar"), sample(0))
    Path("source").mkdir()
    os.symlink(where, "source/part")
    with pytest.raises(ValueError, match="source/part"):
        open_source("source")
    if where != "/":
        assert len(open_source("source/part/*.tar")) == 1


def test_patterns_of_many_stars_are_matched_at_once() -> None:
    folder = Path("source", *"abcdefghijklmnopqrstuvwxyz")
    folder.mkdir(parents=True)
    tar(folder / "a.tar", sample(0))
    stars = "**/*/" * 12
    assert len(open_source(f"source/{stars}*.tar")) == 1
    with pytest.raises((ValueError, OSError)):
        open_source(f"source/{stars}b.tar")


def test_a_folder_reads_nothing_outside_itself() -> None:
    Path("secret.txt").write_text("secret")
    Path("secret.png").write_bytes(png(0))
    source = folder(Path("source"), 5)
    for name in ("000.txt", "001.txt", "002.txt"):
        (source / name).unlink()
    (source / "000.txt").symlink_to("../secret.txt")
    (source / "001.txt").symlink_to("/dev/zero")
    os.mkfifo(source / "002.txt")
    os.mkfifo(source / "x.jpg")
    (source / "003.txt").unlink()
    (source / "003.txt").symlink_to("004.txt")  # inside: followed
    assert reasons("source") == ["unsafe path", "unsafe path", "unsafe path", "", "", "unsafe path"]

    lines = ["000.jpg,a", "../secret.png,b", f"{Path('secret.png').absolute()},c", "gone.jpg,d", '001.jpg,"e, f"']
    (source / "metadata.csv").write_text("\n".join(["file_name,caption", *lines]))
    assert reasons("source") == ["", "unsafe path", "unsafe path", "missing", ""]
    assert open_source("source")[4]["caption"] == "e, f"


def test_all_rows_of_a_metadata_file_are_there_whatever_they_are_called() -> None:
    source = Path("source")
    source.mkdir()
    names = ["noto_train.png", "noto_test-tube.png", "validation.png", "cat.png"]
    for number, name in enumerate(names):
        (source / name).write_bytes(png(number))
    rows = [{"file_name": name, "caption": name, "n": i} for i, name in enumerate(names)]
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = open_source("source")
    assert [found[i]["caption"] for i in range(4)] == names and found.column_names == [
        "image",
        "file_name",
        "caption",
        "n",
    ]
    assert (np.asarray(open_image(found[3]["image"])) == np.asarray(open_image(png(3)))).all()


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_opens_no_file_that_a_row_names(nested: bool) -> None:
    Path("secret.png").write_bytes(png(0))
    image = {"bytes": None, "path": str(Path("secret.png").absolute())}
    feature = datasets.List(datasets.Image()) if nested else datasets.Image()
    schema = datasets.Features({"image": feature, "caption": datasets.Value("string")}).arrow_schema
    pq.write_table(pa.table({"image": [[image] if nested else image], "caption": ["x"]}, schema), "rows.parquet")
    assert reasons("rows.parquet") == ["corrupt" if nested else "unsafe path"]
    assert open_source("rows.parquet").fingerprint


# -- claims ------------------------------------------------------------------------------------------


def test_parquet_and_arrow_that_would_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"image": [bytes(1 << 20)] * 4, "caption": ["x"] * 4})
    pq.write_table(table, "rows.parquet", compression="zstd", use_dictionary=False)
    monkeypatch.setattr(huggingface, "PLAIN_GROUP_BYTES", 1 << 21)
    with pytest.raises(ValueError, match=r"rows.parquet has a row group of 4 rows and 4,\d{3},\d{3} bytes"):
        open_source("rows.parquet")
    for packed in (None, "zstd"):
        options = pa.ipc.IpcWriteOptions(compression=packed)
        with pa.OSFile("rows.arrow", "wb") as file, pa.ipc.new_stream(file, table.schema, options=options) as writer:
            writer.write_table(table)
        if packed is None:
            assert len(open_source("rows.arrow")) == 4
    with pytest.raises(ValueError, match="rows.arrow is compressed"):
        open_source("rows.arrow")


def test_offsets_outside_an_arrow_file_reject_their_row_and_do_not_end_the_process() -> None:
    Path("rows").mkdir()
    table = pa.table({"image": [png(0), png(1)], "caption": ["abc", "defg"]})
    with pa.OSFile("rows/a.arrow", "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    whole, offsets = Path("rows/a.arrow").read_bytes(), np.array([0, 3, 7], np.int32)
    assert whole.count(offsets.tobytes()) == 1
    offsets[1] = 10**9
    Path("rows/a.arrow").write_bytes(whole.replace(np.array([0, 3, 7], np.int32).tobytes(), offsets.tobytes()))
    assert reasons("rows") == ["corrupt", "corrupt"]
    offsets[2] = 2 * 10**9
    Path("rows/a.arrow").write_bytes(whole.replace(np.array([0, 3, 7], np.int32).tobytes(), offsets.tobytes()))
    with pytest.raises(ValueError, match="'rows' cannot be opened"):
        open_source("rows")


def test_a_saved_dataset_names_no_file_elsewhere() -> None:
    table = datasets.Dataset.from_dict({"image": [png(0)], "caption": ["x"]})
    table.save_to_disk("other")
    table.save_to_disk("rows")
    for state in ('{"_data_files": [{"filename": "../other/data-00000-of-00001.arrow"}]}', "{", "[" * 100_000, "[]"):
        Path("rows/state.json").write_text(state)
        with pytest.raises(ValueError, match="'rows' cannot be opened") as caught:
            open_source("rows")
        assert "\n" not in str(caught.value)


def mds(image: bytes) -> None:
    encodings = {"caption": "str", "image": "pil"}
    write_mds(Path("mds"), encodings, dict.fromkeys(encodings), [{"caption": b"c", "image": image}])


@pytest.mark.parametrize(
    ("size", "mode", "count", "why"),
    [
        ((60_000, 60_000), b"RGB", 100, "decompression bomb"),
        ((9_000, 9_000), b"RGB", 100, "corrupt"),
        ((32, 32), b"RGB", 32 * 32 * 3, ""),
        ((20, 20), b"1", 60, ""),
        ((20, 20), b"I;16", 800, ""),
        ((20, 20), b"XXX", 1200, "corrupt"),
    ],
)
def test_raw_pixels_of_mds_are_as_many_as_they_claim(size: tuple, mode: bytes, count: int, why: str) -> None:
    mds(struct.pack("<3I", *size, len(mode)) + mode + bytes(count))
    assert reasons("mds") == [why]


def test_an_index_of_mds_claims_no_more_than_its_files_hold() -> None:
    mds(b"")
    index = Path("mds/index.json")
    whole = json.loads(index.read_text())
    entry = whole["shards"][0]
    raw = entry["raw_data"]
    for change, message in (
        ({"samples": 10**12}, "1,000,000,000,000 samples"),
        ({"samples": 10**8, "raw_data": raw | {"bytes": 4 * 10**8 + 100}}, "100,000,000 samples"),
        ({"raw_data": raw | {"bytes": 10**15}}, "1,000,000,000,000,000 bytes"),
        *(({"samples": wrong}, "is not a number") for wrong in (-1, 1.5, float("nan"), float("inf"), "9", None, True)),
        ({"column_sizes": [-5, None]}, "-5"),
        ({"column_names": [["a"], "b"]}, "column_names"),
        ({"column_encodings": [7, "str"]}, "index.json"),
    ):
        index.write_text(json.dumps(whole | {"shards": [entry | change]}))
        with pytest.raises(ValueError, match=message) as caught:
            open_source("mds")
        assert "index.json" in str(caught.value) and "\n" not in str(caught.value)
    for text in ("[" * 100_000, '{"shards": 3}', "[1]", "{}", "\x00", ""):
        index.write_text(text)
        with pytest.raises(ValueError, match="index.json"):
            open_source("mds")


def test_a_packed_shard_unpacks_to_what_it_should_and_where_it_lies() -> None:
    mds(b"")
    index = Path("mds/index.json")
    whole = json.loads(index.read_text())
    entry = whole["shards"][0]
    name = entry["raw_data"]["basename"]
    Path("mds", name).unlink()
    with pa.OSFile(f"mds/{name}.zstd", "wb") as file, pa.CompressedOutputStream(file, "zstd") as packed:
        packed.write(bytes(64 << 20))
    entry["zip_data"] = {"basename": f"{name}.zstd", "bytes": 1}
    index.write_text(json.dumps(whole))
    assert reasons("mds") == ["too large"]
    assert sorted(path.name for path in Path("mds").iterdir()) == ["index.json", f"{name}.zstd"]

    Path("victim").mkdir()
    os.symlink("../victim", "mds/sub")
    entry["raw_data"]["basename"] = "sub/evil.sh"
    index.write_text(json.dumps(whole))
    assert reasons("mds") == ["unsafe path"] and not list(Path("victim").iterdir())


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT)[:512])
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


NONE = b"%011o\0" % 0
LARGE = b"\x80" + bytes(5) + b"\1" + bytes(5)  # a terabyte
TARS = {
    "negative size": (
        header("a.png", NONE) + header("a.txt", b"\xff" * 10 + b"\xfe\0"),
        1024,
        ["empty caption", "corrupt"],
    ),
    "a name of a terabyte": (header("././@LongLink", LARGE, b"L"), 1 << 41, ["corrupt"]),
    "a member of a terabyte": (header("a.txt", LARGE), 1 << 41, ["too large"]),
    "more than the file has": (header("a.txt", b"\x80" + b"\x7f" * 11), 1024, ["corrupt"]),
    "a sparse member": (header("a.txt", NONE, b"S"), 2048, ["unsafe path"]),
}


@pytest.mark.parametrize("name", TARS)
def test_what_the_headers_of_a_tar_claim(name: str) -> None:
    blocks, size, expected = TARS[name]
    Path("a.tar").write_bytes(blocks)
    os.truncate("a.tar", size)  # a hole: it takes no disk
    items = Items(open_source("a.tar"), Settings(16, image_column="__key__", caption_columns=("txt",)))
    if "txt" not in items.rows.column_names:
        items = Items(items.rows, Settings(16, image_column="__key__", caption_columns=("missing",)))
    assert [items[number].reason for number in range(len(items))] == expected


def test_a_chain_of_headers_and_a_damaged_index_of_tars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Path("a.tar").write_bytes(header("p", NONE, b"x") * 5000 + bytes(1024))
    with pytest.raises(ValueError, match="a.tar"):
        open_source("a.tar")
    monkeypatch.setenv("EMMDIT_CACHE", str(tmp_path / "kept"))
    tar(Path("b.tar"), sample(0))
    expected = open_source("b.tar")[0]
    for kept in (tmp_path / "kept/tars").glob("*.npz"):
        kept.write_bytes(kept.read_bytes()[:100])
    assert open_source("b.tar")[0] == expected


# -- texts and numbers -------------------------------------------------------------------------------


def test_texts_and_json_are_bounded() -> None:
    source = folder(Path("source"), 3)
    os.truncate(source / "000.txt", 1 << 40)
    (source / "001.txt").unlink()
    (source / "001.json").write_text("[" * 100_000)
    (source / "002.txt").unlink()
    (source / "002.json").write_text('{"caption": "\\ud800"}')
    assert reasons("source") == ["too large", "corrupt", "corrupt"]
    for name, text, message in (
        ("a.txt", "x" * (2 << 20), "line 1"),
        ("b.txt", b"\xff\xfe", "not UTF-8"),
        ("c/metadata.csv", "name\na.png\n", "file_name"),
        ("c/metadata.csv", "file_name,caption\na.png\n", "line 2"),
        ("c/metadata.csv", 'file_name,caption\na.png,"' + "x" * 200_000 + '"\n', "line 2"),
        ("c/metadata.csv", "x" * (2 << 20), "line 1"),
        ("c/metadata.csv", "file_name\n", "no images"),
    ):
        Path("c").mkdir(exist_ok=True)
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=message) as caught:
            open_source(name.partition("/")[0])
        assert "\n" not in str(caught.value)
    with open("d.txt", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="d.txt has more than"):
        open_source("d.txt")


def test_names_that_are_not_unicode_do_not_stop_a_job() -> None:
    source = folder(Path("source"), 2)
    bad = os.fsdecode(b"source/\xff\xfe.jpg")
    Path(bad).write_bytes(b"no image")
    Path(bad).with_suffix(".txt").write_text("x")
    tar(Path("a.tar"), [(os.fsdecode(b"\xff.jpg"), b"no image"), (os.fsdecode(b"\xff.txt"), b"x"), *sample(1)])
    assert source.is_dir()
    for name, total in (("source", 3), ("a.tar", 2)):
        manifest = precompute(open_source(name), {}, DCTCodec(), f"out-{total}", Settings(16))
        assert manifest["counts"] == {"rows": total, "samples": total - 1, "rejected": {"corrupt": 1}}
        assert "\\udcff" in json.loads(Path(f"out-{total}/rejects.jsonl").read_text())["key"]


def test_sizes_and_weights_that_are_no_numbers() -> None:
    sides = [30, -5, 0, float("nan"), float("inf"), 1e300, None, 2**40]
    table = datasets.Dataset.from_dict({"image": [png(0)] * 8, "height": sides, "width": [20.0] * 8})
    table.to_parquet("rows.parquet")
    found = image_sizes(open_source("rows.parquet"), "image", ("height", "width")).tolist()
    assert found == [[30, 20]] + [[0, 0]] * 7
    for weights in ([float("nan")], [float("inf")], [-1.0, 2.0], [0.0], []):
        with pytest.raises(ValueError, match="caption_weights"):
            check_weights(weights)
    with pytest.raises(ValueError, match="max_ratio"):
        Buckets(8, float("nan"))
    for wrong in ({"resolution": 0}, {"min_side": 0}, {"resolution": 100_000}, {"max_pixels": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Settings(**wrong)


def test_a_hostile_manifest_is_one_sentence() -> None:
    folder(Path("source"), 2)
    precompute(open_source("source"), {}, DCTCodec(), "out", Settings(32))
    file = Path("out/manifest.json")
    whole = json.loads(file.read_text())
    shard, codec = whole["shards"][0], whole["codec"]
    for change in (
        {"shards": [shard | {"file": "../../etc/passwd.arrow"}]},
        {"shards": [shard | {"bytes": -1}]},
        {"shards": [shard | {"samples": 10**9}]},
        {"shards": 3},
        {"codec": codec | {"downsample": 0}},
        {"codec": []},
        {"resolution": float("nan")},
        {"columns": {"latents": {"dtype": "load", "shape": [1]}}},
        {"columns": {"latents": {"dtype": "float16", "shape": [-1]}}},
        {"source": "x"},
        {"counts": {"samples": 9, "rejected": {}}},
    ):
        file.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=r"out/manifest.json cannot be used") as caught:
            LatentsDataset("out")
        assert "\n" not in str(caught.value)
    for text in ("", "[" * 100_000, "[]", "\x00"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"out/manifest.json"):
            LatentsDataset("out")
    file.write_text(json.dumps(whole))
    assert len(LatentsDataset("out")) == 2 and jpeg(noise(0))
