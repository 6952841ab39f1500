"""Damaged and hostile folders of pipelines and runs: one sentence, soon, and nothing written."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_run import CONFIG, MODEL, SMALL, arguments, configure, make_run, told


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


INDEX, NETWORK, WEIGHTS = (
    "model_index.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
)
HUGE = {"num_attention_heads": 5000, "attention_head_dim": 512}


@pytest.mark.parametrize(
    ("file", "change"),
    [
        *((INDEX, content) for content in (b"[]", b"\xff", b"[" * 100_000)),
        *((INDEX, {"codec": part}) for part in ("emmdit.encoders.DCTCodec", {"class_path": 3})),
        (INDEX, {"codec": {"class_path": "emmdit.encoders.DCTCodec", "init_args": {"foo": 1}}}),
        (INDEX, {"text": {"class_path": "emmdit.shapes.ShapesText", "init_args": {"max_length": 10**9}}}),
        *((INDEX, {"sampling": part}) for part in ("x", {"foo": 1}, {"steps": 10**9}, {"height": 0})),
        *((INDEX, {"transformer": part}) for part in ("x", [1, 2], ["emmdit.files", "os"], ["subprocess", "Popen"])),
        *((NETWORK, change) for change in (b"", HUGE, {"pos_embed_max_size": 10**6}, {"block_groups": [1, 10**7, 1]})),
        *((WEIGHTS, content) for content in ((2**62).to_bytes(8, "little") + b"{}", None)),
        *(("tokenizer/tokenizer.json", content) for content in (b"[1]", None)),
        *(("text_encoder/config.json", change) for change in (b"[]", {"vocab_size": 10**9})),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_a_hostile_pipeline_folder_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture, file: str, change: bytes | dict[str, Any] | None
) -> None:
    folder = shutil.copytree(MODEL, tmp_path / "model")
    if change is None:
        (folder / file).unlink()
    else:
        content = change if isinstance(change, bytes) else None
        (folder / file).write_bytes(content or b"" if content is not None else edited(folder / file, change))
    began = time.perf_counter()
    said = told(capsys, "sample", "--ckpt", folder, "--out", tmp_path / "out", *SMALL)
    assert str(folder) in said and time.perf_counter() - began < 20
    assert not (tmp_path / "out").exists()


def edited(file: Path, change: dict[str, Any]) -> bytes:
    return json.dumps(json.loads(file.read_text()) | change).encode()


NETWORK_ARGUMENTS = CONFIG["model"]["init_args"]["denoiser"]["init_args"]


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        *(
            ({"model": value}, "model")
            for value in (None, "some.module.Class", "lightning_modules.TextToImage", [1], 3)
        ),
        ({"model": {"class_path": 3}}, "model"),
        ({"model": {"class_path": "lightning_modules.TextToImage"}}, "denoiser"),
        *(
            ({"model": arguments(denoiser=value)}, "denoiser")
            for value in (None, "emmdit.networks.X", {"class_path": 1})
        ),
        ({"model": arguments(codec="emmdit.encoders.DCTCodec")}, "codec"),
        ({"model": arguments(codec={"class_path": "torch.nn.Linear"})}, "codec"),
        ({"model": arguments(text={"class_path": "emmdit.shapes.ShapesText", "init_args": "x"})}, "text"),
        *(({"model": arguments(components=value)}, "components") for value in ("x", ["a"])),
        ({"model": arguments(unknown={"long": "x" * 10_000})}, "unknown"),
        ({"model": arguments(sampling={"height": 0})}, "height"),
        ({"model": arguments(path="emmdit.flow.Nope")}, "path"),
        ({"seed_everything": "x"}, "seed_everything"),
        *(({name: 3}, name) for name in ("data", "trainer", "checkpoint")),
        (
            {
                "model": arguments(
                    denoiser=CONFIG["model"]["init_args"]["denoiser"] | {"init_args": NETWORK_ARGUMENTS | HUGE}
                )
            },
            "larger than its weights",
        ),
    ],
    ids=lambda value: repr(value)[-50:],
)
def test_a_run_whose_config_is_damaged_is_a_sentence_with_file_and_key(
    run: Path, capsys: pytest.CaptureFixture, sections: dict[str, Any], key: str
) -> None:
    configure(run, **sections)
    said = told(capsys, "sample", "--ckpt", run, "--out", run / "out", *SMALL)
    assert str(run) in said and key in said and "xxxx" not in said


BOMB = "\n".join([f"k{i}: [{', '.join(9 * [f'${{k{i + 1}}}'])}]" for i in range(12)] + ["k12: 1"]).encode()


@pytest.mark.parametrize(
    "content",
    [b"", b"a: [1", b"- 1", b"\xff\xfe", b"a: &a [*a]", b"[" * 10_000, b"a: ${a}", b"a: ${b}", BOMB],
    ids=range(9),
)
def test_a_config_that_is_no_yaml_is_named(run: Path, capsys: pytest.CaptureFixture, content: bytes) -> None:
    (run / "config.yaml").write_bytes(content)
    said = told(capsys, "sample", "--ckpt", run, "--out", run / "out", *SMALL)
    assert str(run / "config.yaml") in said
