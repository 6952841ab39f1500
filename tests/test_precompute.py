"""Source -> latents on disk: exact, resumable after kill -9 on any number of ranks, every bad row named."""

from __future__ import annotations

import hashlib
import io
import os
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import CaptionedImagesDataModule, LatentsDataModule
from emmdit.data.images import load_image
from emmdit.data.precompute.job import ResumableJob
from emmdit.data.precompute.latents import LatentsDataset
from emmdit.data.precompute.manifest import check, read_manifest
from emmdit.data.precompute.precompute import Settings, precompute
from emmdit.data.readers.open import open_source
from emmdit.encoders import DCAE, SD3VAE, DCTCodec
from tests.command_line import elsewhere as elsewhere

COUNT = 23


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def noise(number: int, side: int = 40) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + number, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def folder(root: Path, count: int = COUNT) -> Path:
    """Images with a text file beside each."""
    root.mkdir()
    for i in range(count):
        (root / f"{i:03d}.jpg").write_bytes(jpeg(noise(i)))
        (root / f"{i:03d}.txt").write_text(f"image {i}\n")
    return root


def run(source: Path, out: Path, codec=None, **changes) -> dict | None:
    names = ("rank", "world", "text", "vision", "num_workers")
    others = {name: changes.pop(name) for name in names if name in changes}
    settings = Settings(**{"resolution": 32, "batch_size": 3, "rows_per_shard": 4, **changes})
    return precompute(open_source(str(source)), {"source": str(source)}, codec or DCTCodec(), out, settings, **others)


def assert_hashes(out: Path) -> None:
    for shard in read_manifest(out)["shards"]:
        assert hashlib.sha256((out / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("made")
    source = folder(root / "source")
    run(source, root / "latents")
    return source, root / "latents"


# -- what is written ---------------------------------------------------------------------------------


def test_latents_are_the_codecs_and_the_folder_is_a_dataset(made: tuple[Path, Path]) -> None:
    source, out = made
    manifest = read_manifest(out)
    assert_hashes(out)
    assert manifest["counts"] == {"rows": COUNT, "samples": COUNT, "rejected": {}}
    assert len(manifest["shards"]) == 6 and manifest["columns"]["latents"] == {"dtype": "float16", "shape": [32, 8, 8]}
    assert manifest["codec"]["class_path"].endswith(".DCTCodec") and manifest["resolution"] == 32

    rows = datasets.load_from_disk(str(out))
    assert rows["sample_id"][:] == list(range(COUNT)) and rows[5]["key"] == "005.jpg"
    assert (rows[5]["original_width"], rows[5]["original_height"], rows[5]["captions"]) == (45, 40, [])
    samples = LatentsDataset(out)
    codec = DCTCodec()
    for i in (0, 7, 22):
        expected = codec.encode(load_image(source / f"{i:03d}.jpg", 32)[None])[0]
        assert samples[i]["caption"] == f"image {i}"
        assert torch.equal(samples[i]["latents"], expected.half().float())
    with pytest.raises(IndexError):
        LatentsDataset(out, 3)[COUNT - 3]

    plain = CaptionedImagesDataModule(
        str(out), image_column=None, latents_column="latents", latents_shape=(32, 8, 8), resolution=32
    )
    assert torch.equal(plain._part(0, None)[4]["latents"], samples[4]["latents"])  # read as any source, too


class Vision:
    feature_dim, dtype = 3, torch.float32

    def to(self, device):
        return self

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(2)[:, :, : images.shape[-1]].movedim(1, 2)


def test_features_kept_images_and_several_captions(tmp_path: Path) -> None:
    columns = {
        "photo": [{"bytes": jpeg(noise(i)), "path": None} for i in range(3)],
        "long": ["a long one", "", "long 2"],
        "short": [["one", "two"], ["three", "four"], []],
    }
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "rows.parquet")

    class Text(Vision):
        def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
            return {"encoder_hidden_states": torch.tensor([[[len(c)]] for c in captions], dtype=torch.bfloat16)}

    options = dict(image_column="photo", caption_columns=("long", "short"), keep_images=90, dtype="bfloat16")
    run(tmp_path / "rows.parquet", tmp_path / "out", vision=Vision(), text=Text(), **options)
    rows = datasets.load_from_disk(str(tmp_path / "out"))
    assert rows["caption"][:] == ["a long one", "three", "long 2"]
    assert rows["captions"][:] == [["a long one", "one", "two"], ["", "three", "four"], []]
    sample = LatentsDataset(tmp_path / "out")[1]
    assert sample["features"].shape == (32, 3) and sample["image"].shape == (3, 32, 32)
    assert sample["latents"].dtype == torch.float32 and sample["latents"].shape == (32, 8, 8)
    spec = read_manifest(tmp_path / "out")["columns"]["text.encoder_hidden_states"]
    assert spec == {"dtype": "bfloat16", "shape": [1, 1]}
    length = torch.frombuffer(bytearray(rows[0]["text.encoder_hidden_states"]), dtype=torch.bfloat16)
    assert length.tolist() == [10.0]


# -- kill and resume ----------------------------------------------------------------------------------


def killed(source: Path, out: Path, rank: int, world: int, after: int, where: str) -> None:
    """A process that dies of SIGKILL at its call number `after`."""
    child = os.fork()
    if child == 0:
        try:
            calls = iter(range(after + 1))
            encode, commit = DCTCodec.encode, ResumableJob.commit

            def dying_encode(codec, images):
                if next(calls) == after:
                    os.kill(os.getpid(), signal.SIGKILL)
                return encode(codec, images)

            def dying_commit(job, unit, write, *arguments, **more):
                last = next(calls) == after
                if last and where == "write":
                    (job.folder / f".data-{unit:06d}-1.arrow").write_bytes(b"half a file")
                    os.kill(os.getpid(), signal.SIGKILL)
                commit(job, unit, write, *arguments, **more)
                if last:  # in the middle of the journal's line
                    os.truncate(job.journal, job.journal.stat().st_size - 9)
                    os.kill(os.getpid(), signal.SIGKILL)

            if where == "encode":
                DCTCodec.encode = dying_encode
            else:
                ResumableJob.commit = dying_commit
            run(source, out, rank=rank, world=world)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_a_resume_after_kill_9_on_other_ranks_is_the_unbroken_run(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, whole = made
    out = tmp_path / "out"
    killed(source, out, 0, 2, 3, "encode")  # dies within its second unit
    killed(source, out, 1, 2, 1, "journal")  # a file without its line
    with pytest.raises(ValueError, match="emmdit precompute"):
        read_manifest(out)
    killed(source, out, 0, 1, 1, "write")  # an unfinished file
    assert list(out.glob(".data-*"))
    assert [run(source, out, rank=rank, world=3) is None for rank in (2, 0)] == [True, True]
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("data-*")}
    assert run(source, out, rank=1, world=3)["counts"]["samples"] == COUNT
    assert len(before) < 6 and all((out / name).stat().st_mtime_ns == time for name, time in before.items())

    for name in [f"data-{i:06d}.arrow" for i in range(6)] + ["manifest.json", "plan.json", "state.json"]:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(out.glob(".data-*"))
    again = run(source, out)  # nothing left to do
    assert again == read_manifest(out)


def test_a_shard_that_got_lost_is_made_again(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, whole = made
    out = tmp_path / "out"
    run(source, out)
    (out / "data-000002.arrow").unlink()
    os.truncate(out / "data-000004.arrow", 100)
    with pytest.raises(FileNotFoundError, match=r"data-000002\.arrow"):
        read_manifest(out)
    run(source, out)
    assert_hashes(out)
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


# -- the manifest against the experiment -------------------------------------------------------------


def test_training_refuses_latents_of_another_codec(tmp_path: Path, made: tuple[Path, Path]) -> None:
    source = folder(tmp_path / "source", 3)
    small = dict(latent_channels=4, downsample=8)
    codec = DCAE("standin:dc_ae?latent_channels=4&downsample=8", **small)
    run(source, tmp_path / "out", codec)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["codec"]["scaling_factor"] == 0.41407

    check(manifest, "out", codec, 32)
    check(manifest | {"codec": manifest["codec"] | {"class_path": "older.place.DCAE"}}, "out", codec)
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
        CaptionedImagesDataModule(str(made[1]), None, latents_column="latents", latents_shape=(32, 8, 8), resolution=32,
                      validation_samples=3),
    ):  # fmt: skip
        data.trainer = Trainer
        with pytest.raises(ValueError, match="weights.*DCTCodec"):
            data.setup("fit")
    data.trainer = None
    with pytest.raises(ValueError, match=r"\b23\b.*\b256\b.*validation_samples"):
        LatentsDataModule(str(made[1])).setup("fit")
