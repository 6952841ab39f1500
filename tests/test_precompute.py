"""Source -> latents on disk: exact, resumable after kill -9 on any number of ranks, every bad row named."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import HubDataModule, LatentsDataModule
from emmdit.data.images import load_image
from emmdit.data.precompute.job import ShardedJob
from emmdit.data.precompute.latents import LatentsRows
from emmdit.data.precompute.manifest import check, read_manifest, verify
from emmdit.data.precompute.precompute import Settings, precompute
from emmdit.data.readers.open import open_source
from emmdit.encoders import DCAE, SD3VAE, DCTCodec

COUNT = 23


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def picture(number: int, side: int = 40) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + number, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def folder(root: Path, count: int = COUNT) -> Path:
    """Pictures with a text file beside each."""
    root.mkdir()
    for i in range(count):
        (root / f"{i:03d}.jpg").write_bytes(jpeg(picture(i)))
        (root / f"{i:03d}.txt").write_text(f"picture {i}\n")
    return root


def run(source: Path, out: Path, codec=None, **changes) -> dict | None:
    names = ("rank", "world", "text", "vision", "num_workers")
    others = {name: changes.pop(name) for name in names if name in changes}
    settings = Settings(**{"resolution": 32, "batch_size": 3, "rows_per_shard": 4, **changes})
    return precompute(open_source(str(source)), {"source": str(source)}, codec or DCTCodec(), out, settings, **others)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("made")
    source = folder(root / "source")
    run(source, root / "latents")
    return source, root / "latents"


# -- what is written ---------------------------------------------------------------------------------


def test_latents_are_the_codecs_and_the_folder_is_a_data_set(made: tuple[Path, Path]) -> None:
    source, out = made
    manifest = read_manifest(out)
    verify(out)
    assert manifest["counts"] == {"rows": COUNT, "samples": COUNT, "rejected": {}}
    assert len(manifest["shards"]) == 6 and manifest["columns"]["latents"] == {"dtype": "float16", "shape": [32, 8, 8]}
    assert manifest["codec"]["class_path"] == "emmdit.encoders.dct.DCTCodec" and manifest["resolution"] == 32

    rows = datasets.load_from_disk(str(out))
    assert rows["sample_id"][:] == list(range(COUNT)) and rows[5]["key"] == "005.jpg"
    assert (rows[5]["original_width"], rows[5]["original_height"], rows[5]["captions"]) == (45, 40, [])
    samples = LatentsRows(out)
    codec = DCTCodec()
    for i in (0, 7, 22):
        expected = codec.encode(load_image(str(source / f"{i:03d}.jpg"), 32)[None])[0]
        assert samples[i]["caption"] == f"picture {i}"
        assert torch.equal(samples[i]["latents"], expected.half().float())
    assert torch.equal(samples.__getitems__([3, 9])[1]["latents"], samples[9]["latents"])
    with pytest.raises(IndexError):
        LatentsRows(out, 3)[COUNT - 3]

    plain = HubDataModule(
        str(out), image_column=None, latents_column="latents", latents_shape=(32, 8, 8), resolution=32
    )
    assert torch.equal(plain._part(0, None)[4]["latents"], samples[4]["latents"])  # and HubDataModule reads it, too


def test_features_kept_pictures_and_several_captions(tmp_path: Path) -> None:
    columns = {
        "picture": [{"bytes": jpeg(picture(i)), "path": None} for i in range(3)],
        "long": ["a long one", "", "long 2"],
        "short": [["one", "two"], ["three", "four"], []],
    }
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "rows.parquet")

    class Vision:
        feature_dim, dtype = 5, torch.float32

        def to(self, device):
            return self

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((1, 2, 3)).view(-1, 1, 1).expand(-1, 4, 5)

    class Text(Vision):
        def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
            return {"encoder_hidden_states": torch.tensor([[[len(c)]] for c in captions], dtype=torch.bfloat16)}

    options = dict(image_column="picture", caption_columns=("long", "short"), keep_images=90, dtype="bfloat16")
    run(tmp_path / "rows.parquet", tmp_path / "out", vision=Vision(), text=Text(), **options)
    rows = datasets.load_from_disk(str(tmp_path / "out"))
    assert rows["caption"][:] == ["a long one", "three", "long 2"]
    assert rows["captions"][:] == [["a long one", "one", "two"], ["", "three", "four"], []]
    sample = LatentsRows(tmp_path / "out")[1]
    assert sample["features"].shape == (4, 5) and sample["image"].shape == (3, 32, 32)
    assert sample["latents"].dtype == torch.float32 and sample["latents"].shape == (32, 8, 8)
    spec = read_manifest(tmp_path / "out")["columns"]["text.encoder_hidden_states"]
    assert spec == {"dtype": "bfloat16", "shape": [1, 1]}
    length = torch.frombuffer(bytearray(rows[0]["text.encoder_hidden_states"]), dtype=torch.bfloat16)
    assert length.tolist() == [10.0]


# -- kill and go on ----------------------------------------------------------------------------------


def killed(source: Path, out: Path, rank: int, world: int, after: int, where: str) -> None:
    """A process that dies of SIGKILL at its call number `after`."""
    child = os.fork()
    if child == 0:
        try:
            calls = iter(range(after + 1))
            encode, commit = DCTCodec.encode, ShardedJob.commit

            def dying_encode(codec, images):
                if next(calls) == after:
                    os.kill(os.getpid(), signal.SIGKILL)
                return encode(codec, images)

            def dying_commit(job, unit, write, *arguments, **more):
                last = next(calls) == after
                if last and where == "write":
                    (job.folder / f".rank-{rank:05d}-data-{unit:06d}.arrow").write_bytes(b"half a file")
                    os.kill(os.getpid(), signal.SIGKILL)
                commit(job, unit, write, *arguments, **more)
                if last:  # in the middle of the journal's line
                    os.truncate(job._journal_file(), job._journal_file().stat().st_size - 9)
                    os.kill(os.getpid(), signal.SIGKILL)

            if where == "encode":
                DCTCodec.encode = dying_encode
            else:
                ShardedJob.commit = dying_commit
            run(source, out, rank=rank, world=world)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_kill_9_and_go_on_with_another_number_of_ranks_is_the_unbroken_run(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    source, whole = made
    out = tmp_path / "out"
    killed(source, out, 0, 2, 3, "encode")  # dies within its second unit
    killed(source, out, 1, 2, 1, "journal")  # a file without its line
    with pytest.raises(ValueError, match="emmdit precompute"):
        read_manifest(out)
    killed(source, out, 0, 1, 1, "write")  # an unfinished file
    assert list(out.glob(".rank-00000-*"))
    assert [run(source, out, rank=rank, world=3) is None for rank in (2, 0)] == [True, True]
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("data-*")}
    assert run(source, out, rank=1, world=3)["counts"]["samples"] == COUNT
    assert len(before) < 6 and all((out / name).stat().st_mtime_ns == time for name, time in before.items())

    for name in [f"data-{i:06d}.arrow" for i in range(6)] + ["manifest.json", "plan.json", "state.json"]:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(out.glob(".rank-*"))
    again = run(source, out)  # nothing left to do
    assert again == read_manifest(out)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_union_over_ranks_is_the_data_set_and_no_row_is_in_two(
    made: tuple[Path, Path], tmp_path: Path, world: int
) -> None:
    source, whole = made
    for rank in range(world):
        run(source, tmp_path / "out", rank=rank, world=world)
    units = [
        {json.loads(line)["unit"] for line in file.read_text().splitlines()}
        for file in sorted((tmp_path / "out/journal").glob("*.jsonl"))
    ]
    assert sum(map(len, units)) == len(set().union(*units)) == 6
    rows = datasets.load_from_disk(str(tmp_path / "out"))
    assert rows["sample_id"][:] == list(range(COUNT))
    assert read_manifest(tmp_path / "out")["sha256"] == read_manifest(whole)["sha256"]


def test_a_shard_that_got_lost_is_made_again(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, whole = made
    out = tmp_path / "out"
    run(source, out)
    (out / "data-000002.arrow").unlink()
    os.truncate(out / "data-000004.arrow", 100)
    with pytest.raises(FileNotFoundError, match=r"data-000002\.arrow"):
        read_manifest(out)
    run(source, out)
    verify(out)
    assert read_manifest(out) == read_manifest(whole) | {"source": read_manifest(out)["source"]}


def test_a_folder_of_other_settings_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    with pytest.raises(ValueError, match="dtype.*'float16'.*'float32'"):
        run(source, out, dtype="float32")
    with pytest.raises(ValueError, match=r"codec\.weights_sha256"):
        run(source, out, codec=DCTCodec(whitening=0.5))
    with pytest.raises(ValueError, match=r"\brows\b.*\b23\b.*\b2\b"):
        run(folder(tmp_path / "small", 2), out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        run(source, tmp_path / "full")
    with pytest.raises(ValueError, match=r"resolution.*\b33\b.*DCTCodec.*\b4\b"):
        run(source, tmp_path / "new", resolution=33)
    assert not (tmp_path / "new").exists()


# -- rejects -----------------------------------------------------------------------------------------


def test_each_bad_row_is_named_and_nothing_else_is_lost(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", 12)
    (source / "001.jpg").write_bytes(jpeg(picture(1))[:300])  # truncated
    (source / "002.jpg").write_bytes(b"<html>404</html>")
    (source / "003.txt").write_text(" \n")
    (source / "004.txt").unlink()
    Image.new("1", (10_000, 10_001)).save(source / "005.jpg", "PNG")  # 100 megapixels in 13 kB
    (source / "006.jpg").write_bytes(jpeg(picture(0, 20)))
    (source / "007.txt").write_bytes(b"\xff\xfe")
    (source / "008.jpg").unlink()
    (source / "008.jpg").symlink_to("nowhere.jpg")

    class Overflow(DCTCodec):
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            latents = super().encode(images)
            return torch.where((images.mean((1, 2, 3)) > 0.9).view(-1, 1, 1, 1), latents.new_tensor(1e9), latents)

    (source / "009.jpg").write_bytes(jpeg(Image.new("RGB", (40, 40), "white")))
    manifest = run(source, tmp_path / "out", Overflow(), num_workers=1)
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [(r["row"], r["key"], r["reason"]) for r in rejects] == [
        (1, "001.jpg", "corrupt"),
        (2, "002.jpg", "corrupt"),
        (3, "003.jpg", "empty caption"),
        (4, "004.jpg", "empty caption"),
        (5, "005.jpg", "decompression bomb"),
        (6, "006.jpg", "too small"),
        (7, "007.jpg", "corrupt"),
        (8, "008.jpg", "missing"),
        (9, "009.jpg", "non-finite latents"),
    ]
    assert all(reject["detail"] for reject in rejects)
    assert manifest["counts"]["rejected"]["corrupt"] == 3
    assert datasets.load_from_disk(str(tmp_path / "out"))["sample_id"][:] == [0, 10, 11]


def test_a_source_of_bad_rows_alone_says_so(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", 3)
    manifest = run(source, tmp_path / "out", resolution=64)
    assert manifest["counts"] == {"rows": 3, "samples": 0, "rejected": {"too small": 3}}
    with pytest.raises(ValueError, match=r"rejects\.jsonl"):
        LatentsRows(tmp_path / "out")


# -- the manifest against the experiment -------------------------------------------------------------


def test_training_refuses_latents_of_another_codec(tmp_path: Path, made: tuple[Path, Path]) -> None:
    source = folder(tmp_path / "source", 3)
    small = dict(latent_channels=4, downsample=8)
    codec = DCAE("standin:dc_ae?latent_channels=4&downsample=8", **small)
    run(source, tmp_path / "out", codec)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["codec"]["scaling_factor"] == 0.41407

    check(manifest, "out", codec, 32)
    check(manifest, "out", DCAE("standin:dc_ae?latent_channels=4&downsample=8", dtype="bfloat16", **small))
    other = DCAE("standin:dc_ae?latent_channels=4&downsample=8&seed=1", **small)
    scaled = DCAE("standin:dc_ae?latent_channels=4&downsample=8", scaling_factor=1.0, **small)
    for wrong, resolution, message in (
        (codec, 64, r"\b32\b.*\b64\b.*resolution"),
        (SD3VAE("standin:sd3_vae"), None, "class_path.*DCAE.*SD3VAE"),
        (scaled, None, r"scaling_factor.*\b0\.41407\b.*\b1\.0\b"),
        (other, None, "weights.*DCAE.*&seed=1"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            check(manifest, "out", wrong, resolution)
        assert "\n" not in str(caught.value)

    class Trainer:
        class lightning_module:
            codec = DCTCodec(whitening=0.5)

    for data in (
        LatentsDataModule(str(made[1]), validation_samples=3),
        HubDataModule(str(made[1]), None, latents_column="latents", latents_shape=(32, 8, 8), resolution=32,
                      validation_samples=3),
    ):  # fmt: skip
        data.trainer = Trainer
        with pytest.raises(ValueError, match="weights.*DCTCodec"):
            data.setup("fit")
    data.trainer = None
    with pytest.raises(ValueError, match=r"\b23\b.*\b256\b.*validation_samples"):
        LatentsDataModule(str(made[1])).setup("fit")
