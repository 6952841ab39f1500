"""FID, KID and CMMD against clean-fid, closed forms and the plain formulas."""

from __future__ import annotations

import copy
import io
import time
import zipfile
from pathlib import Path

import cleanfid.fid
import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from emmdit.encoders.loading import MissingModelError
from emmdit.evaluation.metrics import features as features_module
from emmdit.evaluation.metrics.clip import CLIP
from emmdit.evaluation.metrics.cmmd import CMMD, cmmd
from emmdit.evaluation.metrics.features import INCEPTION, CleanInception, CLIPFeatures
from emmdit.evaluation.metrics.fid import FID, FeatureStatistics, frechet_distance
from emmdit.evaluation.metrics.kid import KID, kernel_distance
from emmdit.evaluation.metrics.reference import write_reference
from emmdit.files import sha256_of
from tests.tiny_features import TinyFeatures, random_images, samples, write_folder

METRICS = {"fid": FID, "kid": KID, "cmmd": CMMD}


def moments(vectors: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return vectors.double().mean(0).numpy(), np.cov(vectors.double().numpy(), rowvar=False)


def reference_of(images: Tensor, path: Path, features: TinyFeatures | None = None) -> str:
    """Mean, covariance and features in one file, made by numpy."""
    features = features or TinyFeatures()
    vectors = features(images)
    mu, sigma = moments(vectors)
    write_reference(path, {"mu": mu, "sigma": sigma, "feats": vectors.numpy()}, {"features": features.identity()})
    return str(path)


def scored(metric, images: Tensor, batch: int = 10) -> float:
    metric.prepare("cpu")
    for first in range(0, len(images), batch):
        chunk = images[first : first + batch]
        metric.update(chunk, samples(len(chunk), first))
    return metric.compute()[""]


def test_two_gaussians_have_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    a, b = rng.uniform(0.1, 3, 6), rng.uniform(0.1, 3, 6)
    first, second = rng.normal(size=6), rng.normal(size=6)
    expected = ((first - second) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()  # they commute
    found = frechet_distance(first, basis * a @ basis.T, second, basis * b @ basis.T)
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "m", "d"), [(200, 150, 24), (20, 150, 24), (150, 20, 24), (12, 10, 24), (2, 90, 24)])
def test_any_number_of_images_gives_the_general_formula(n: int, m: int, d: int) -> None:
    generator = torch.Generator().manual_seed(n)
    mix = torch.randn(d, d, generator=generator) * torch.logspace(0, -2, d)
    x, y = (torch.randn(k, d, generator=generator) @ mix + 3 for k in (n, m))
    (mu1, s1), (mu2, s2) = moments(x), moments(y)
    root = np.linalg.eigvals(s1 @ s2).astype(complex)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2) - 2 * np.sqrt(root).real.sum()
    assert frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-5)
    if min(n, m) > d:
        exact = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
        assert frechet_distance(mu1, s1, mu2, s2) == pytest.approx(exact, rel=1e-9)


def test_300_images_of_2048_features_take_a_second() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(300, 2048, generator=generator).double() ** k for k in (1, 2))
    y_mu, y_sigma = moments(y)
    started = time.process_time()  # of all threads: not less than what a clock shows on a free machine
    statistics = FeatureStatistics.zeros(2048)
    statistics.add(x)
    found = frechet_distance(*statistics.moments(), y_mu, y_sigma)
    assert time.process_time() - started < 2
    # The nuclear norm of the product of the centered factors is the same trace, with no square root of a matrix.
    a, b = ((v - v.mean(0)) / len(v[1:]) ** 0.5 for v in (x, y))
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()
    expected -= 2 * torch.linalg.matrix_norm(a @ b.T, "nuc")
    assert found == pytest.approx(float(expected), rel=1e-7)


def test_identical_sets_are_zero_apart_and_one_repeated_image_is_not(tmp_path: Path) -> None:
    images = random_images(30, seed=1)
    reference = reference_of(images, tmp_path / "a.npz")
    scale = np.trace(np.load(reference)["sigma"])
    assert scored(FID(TinyFeatures(), reference), images) < 1e-6 * scale
    assert abs(scored(CMMD(TinyFeatures(), reference), images)) < 1e-6
    repeated = images[:1].repeat(30, 1, 1, 1)
    assert scored(FID(TinyFeatures(), reference), repeated) > 0.9 * scale


def test_fid_is_clean_fids(tmp_path: Path) -> None:
    real, drawn = random_images(40, seed=1), random_images(30, seed=2)
    folders = [str(write_folder(tmp_path / name, images)) for name, images in (("real", real), ("drawn", drawn))]
    for features in (TinyFeatures(), TinyFeatures(dim=64)):  # more images than features, and fewer
        options = dict(device=torch.device("cpu"), num_workers=0, verbose=False, use_dataparallel=False)
        expected = cleanfid.fid.compute_fid(folders[1], folders[0], custom_feat_extractor=features.resized, **options)
        found = scored(FID(features, reference_of(real, tmp_path / "real.npz", features)), drawn)
        assert expected > 1e-4 and found == pytest.approx(expected, rel=1e-3)


def test_kid_is_clean_fids(tmp_path: Path) -> None:
    real, drawn, features = random_images(40, seed=1), random_images(30, seed=2), TinyFeatures()
    reference = reference_of(real, tmp_path / "real_kid.npz")
    for size in (1000, 17):
        np.random.seed(5)
        x, y = features(drawn).double(), features(real).double()
        expected = cleanfid.fid.kernel_distance(y.numpy(), x.numpy(), num_subsets=20, max_subset_size=size)
        metric = KID(features, reference, subsets=20, subset_size=size, seed=5)
        assert scored(metric, drawn) == pytest.approx(expected, rel=1e-9)
    one = kernel_distance(x, y[:30], subsets=7)
    assert one == pytest.approx(kernel_distance(x, y[:30], subsets=1), rel=1e-12)
    assert abs(one) > 1e-6


def test_cmmd_is_the_plain_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emmdit.evaluation.metrics.cmmd.ROWS", 7)
    real, drawn, features = random_images(20, seed=1), random_images(16, seed=2), TinyFeatures()

    def unit(images: Tensor) -> list[Tensor]:
        return [v / v.norm() for v in features(images).double()]

    def mean_kernel(x: list[Tensor], y: list[Tensor]) -> Tensor:
        return torch.stack([torch.exp(-(a - b).square().sum() / 200) for a in x for b in y]).mean()

    x, y = unit(drawn), unit(real)
    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert scored(CMMD(features, reference_of(real, tmp_path / "real.npz")), drawn) == pytest.approx(float(expected))
    assert cmmd(features(drawn), features(real)) == pytest.approx(float(expected))


@pytest.mark.parametrize("family", METRICS)
def test_a_metric_starts_anew_and_holds_no_weights(family: str, tmp_path: Path) -> None:
    images = random_images(24, seed=2)
    metric = METRICS[family](TinyFeatures(), reference_of(random_images(30, seed=1), tmp_path / "a.npz"))
    value = scored(metric, images)
    assert (metric.name, metric.kind, metric.label(5000)) == (f"{family}_tiny", family, f"{family}_tiny_5k")
    assert metric.settings()["reference"]["made_with"]["features"]["resize"] == TinyFeatures.resize
    assert not metric.state_dict() and not list(metric.parameters())
    metric.reset()
    shuffled = torch.randperm(24).tolist()
    metric.update(images[shuffled], [samples(24)[i] for i in shuffled])
    assert metric.compute()[""] == pytest.approx(value, rel=1e-6)
    metric.prepare("cpu")  # the next evaluation of a training
    with pytest.raises(ValueError, match=rf"{family}_tiny.*\b2\b.*\b0\b"):
        metric.compute()
    metric.update(images[:1], samples(1))
    with pytest.raises(ValueError, match=rf"{family}_tiny.*\b2\b.*\b1\b"):
        metric.compute()


def test_a_reference_that_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    images = random_images(12, seed=1)
    path = reference_of(images, tmp_path / "tiny.npz")
    arrays = dict(np.load(path))

    def refused(message: str, metric: type = FID, features: TinyFeatures | None = None, reference: str = path) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            metric(features or TinyFeatures(), reference).prepare()
        assert "reference-stats" in str(error.value)

    refused(r"none\.npz", reference=str(tmp_path / "none.npz"))
    refused(r"\(16,\).*'tiny'.*\b8\b", features=TinyFeatures(dim=8))
    refused(r"\(12, 16\).*'tiny'.*\b8\b", KID, features=TinyFeatures(dim=8))
    refused("features.*'tiny'.*'other'", features=TinyFeatures(name="other"))
    bilinear = TinyFeatures()
    bilinear.resize = "bilinear"
    refused("resize.*'clean-fid 'clean''.*'bilinear'", features=bilinear)
    bad = str(tmp_path / "bad.npz")
    for name, kept in (("sigma", KID), ("feats", FID)):
        np.savez(bad, **{key: array for key, array in arrays.items() if key not in (name, "mu")})
        refused(r"bad\.npz.*(\bmu\b.*\bsigma\b|\bfeats\b)", FID if kept is KID else KID, reference=bad)
    np.savez(bad, mu=arrays["mu"], sigma=arrays["sigma"] * np.nan)
    refused("sigma.*finite", reference=bad)
    np.savez(bad, feats=arrays["feats"][:1])
    refused(r"bad\.npz.*\b2\b", CMMD, reference=bad)
    np.savez_compressed(bad, mu=np.zeros(10**6), sigma=arrays["sigma"])  # a bomb
    refused(r"bad\.npz(?!.*(sigma|feats)).*\bnpz\b", reference=bad)
    lie = io.BytesIO()
    np.lib.format.write_array_header_1_0(lie, {"descr": "<f8", "fortran_order": False, "shape": (10**13,)})
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("mu.npy", lie.getvalue())
    refused(r"bad\.npz", reference=bad)
    for made_with in ("[]", "3", '{"features": []}', "{", "[" * 100_000):
        np.savez(bad, mu=arrays["mu"], sigma=arrays["sigma"], made_with=np.array(made_with))
        refused(r"bad\.npz", reference=bad)
    for content in (b"PK\x03\x04 cut off", b"no zip"):
        Path(bad).write_bytes(content)
        refused(r"bad\.npz(?!.*(sigma|feats)).*\bnpz\b", reference=bad)
    np.savez(bad, mu=arrays["mu"], sigma=arrays["sigma"])  # clean-fid's own files say nothing of how they were made
    assert scored(FID(TinyFeatures(), bad), images) < 1e-6


def test_images_that_would_spoil_the_sums_are_refused(tmp_path: Path) -> None:
    metric = FID(TinyFeatures(), reference_of(random_images(12, seed=1), tmp_path / "a.npz"))
    with pytest.raises(RuntimeError, match=r"fid_tiny.*prepare\("):
        metric.update(random_images(2, seed=0), samples(2))
    metric.prepare()
    for wrong in (torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"uint8.*\(N, 3, H, W\).*\(2, (3, 8, 8|8, 8, 3)\)"):
            metric.update(wrong, samples(2))
    with torch.no_grad():
        metric.features.network.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="'tiny'.*float32"):
        metric.update(random_images(2, seed=0), samples(2))
    with pytest.raises(ValueError, match=r"subset_size.*\b2\b.*\b1\b"):
        KID(TinyFeatures(), "a.npz", subset_size=1)


class FakeInception(torch.nn.Module):
    """The parts of NVIDIA's TorchScript file that clean-fid uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.AvgPool2d(16, 16), torch.nn.Flatten(), torch.nn.Linear(3 * 18 * 18, 2048), torch.nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.fixture
def inception(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    file = tmp_path / "weights" / INCEPTION
    file.parent.mkdir()
    torch.jit.script(FakeInception()).save(file)
    return file


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_inception_is_clean_fids_own(inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "INCEPTION_SHA256", sha256_of([inception]))
    monkeypatch.setenv("EMMDIT_CACHE", str(tmp_path / "cache"))
    real, drawn = random_images(12, seed=1), random_images(9, seed=2)
    folder = str(write_folder(tmp_path / "drawn", drawn))
    network = cleanfid.features.InceptionV3W(str(inception.parent), download=False)
    options = dict(num_workers=0, device=torch.device("cpu"), verbose=False)
    expected = cleanfid.fid.get_folder_features(folder, network, **options)
    copied = inception.rename(inception.with_name("copy.pt"))
    features = CleanInception(str(copied))
    np.testing.assert_allclose(features.extract(drawn).numpy(), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setenv("EMMDIT_INCEPTION", str(copied))
    metric = FID(CleanInception(), str(tmp_path / "real.npz"))
    write_reference(tmp_path / "real.npz", dict(zip(("mu", "sigma"), moments(features(real)), strict=True)), {})
    assert scored(metric, drawn) > 0.1 and metric.name == "fid_clean" and metric.label(30_000) == "fid_clean_30k"
    assert metric.settings()["features"]["sha256"] == features.settings()["sha256"] != ""
    assert copy.deepcopy(metric).state_dict() == {}
    monkeypatch.delenv("EMMDIT_INCEPTION")
    (tmp_path / "cache/inception").mkdir(parents=True)
    (tmp_path / "cache/inception" / INCEPTION).symlink_to(copied)
    CleanInception().prepare()


def test_inception_that_is_missing_or_damaged_is_one_sentence(
    inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMMDIT_CACHE", str(tmp_path / "my cache"))
    with pytest.raises(
        MissingModelError, match=f"curl .*'{tmp_path}/my cache/inception/{INCEPTION}'.*EMMDIT_INCEPTION"
    ):
        CleanInception().prepare()  # and not what anyone may have put into the system's temporary folder
    loaded = []
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: loaded.append(args))
    cut_off = inception.read_bytes()[:1000]
    for damage in (lambda: inception.write_bytes(cut_off), lambda: torch.jit.script(torch.nn.ReLU()).save(inception)):
        damage()
        with pytest.raises(MissingModelError, match=f"{INCEPTION}(?!.*EMMDIT_INCEPTION)"):
            CleanInception(str(inception.parent)).prepare()
    assert not loaded  # a TorchScript file runs its code when it is loaded
    assert len(features_module.INCEPTION_SHA256) == 64


def test_clip_features_name_the_metric_and_are_not_normalized(tmp_path: Path) -> None:
    images, features = random_images(12, seed=1), CLIPFeatures(CLIP("standin:clip_model", name="tiny"))
    vectors = features.extract(images)
    assert vectors.norm(dim=1).std() > 1e-3
    mu, sigma = moments(vectors)
    arrays = {"mu": mu, "sigma": sigma, "feats": vectors.numpy()}
    write_reference(tmp_path / "a.npz", arrays, {"features": features.identity()})
    names = {}
    for family, kind in METRICS.items():
        metric = kind(features, str(tmp_path / "a.npz"))
        names[family] = (metric.kind, metric.name)
        assert abs(scored(metric, random_images(12, seed=2))) > 1e-5
    clip = {"fid": ("fid_clip", "fid_clip_tiny"), "kid": ("kid_clip", "kid_clip_tiny"), "cmmd": ("cmmd", "cmmd_tiny")}
    assert names == clip
    with pytest.raises(ValueError, match="weights.*model.safetensors"):
        FID(CLIPFeatures(CLIP("standin:clip_model?seed=1", name="tiny")), str(tmp_path / "a.npz")).prepare()
