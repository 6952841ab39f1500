"""Teachers into students: which weights go where, how near a student starts, files, pipelines, gradients."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn

from emmdit.encoders import SD3TextEncoders
from emmdit.encoders.standins import standin
from emmdit.networks import (
    BASELINES,
    EDiTTransformer2DModel,
    EMMDiTTransformer2DModel,
    HybridEMMDiTTransformer2DModel,
    MMEDiTTransformer2DModel,
    attention_layers,
    linearize,
    parameter_names,
    save_nitro_e,
    teacher_class,
    teacher_of,
    train_only,
)
from emmdit.networks.edit.attention import LinearAttention
from emmdit.networks.edit.hybrid import HybridAttention
from tests.test_linear_attention import OLD


def pixart(**config) -> PixArtTransformer2DModel:
    sizes = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, cross_attention_dim=16, caption_channels=12)
    return PixArtTransformer2DModel(**sizes | dict(sample_size=8) | config).eval()


def sd3(**config) -> SD3Transformer2DModel:
    """Of the SD3.5-Medium kind: norms of queries and keys, a second attention in the first block."""
    sizes = dict(num_layers=3, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16)
    sizes |= dict(sample_size=8, joint_attention_dim=12, pooled_projection_dim=10, pos_embed_max_size=16)
    sizes |= dict(dual_attention_layers=(0,), qk_norm="rms_norm")
    return SD3Transformer2DModel(**sizes | config).eval()


def emmdit(**config) -> EMMDiTTransformer2DModel:
    sizes = dict(sample_size=8, in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16)
    sizes |= dict(block_groups=(1, 2, 1), caption_channels=12, subregion_pattern=("full",))
    return EMMDiTTransformer2DModel(**sizes | config).eval()


TEACHERS = {"pixart": pixart, "sd3": sd3, "emmdit": emmdit}
STUDENTS = {"pixart": EDiTTransformer2DModel, "sd3": MMEDiTTransformer2DModel, "emmdit": HybridEMMDiTTransformer2DModel}
each = pytest.mark.parametrize("name", TEACHERS)


def inputs(name: str, height: int = 8, width: int = 12, batch: int = 2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(height * 100 + width)
    given = dict(
        hidden_states=torch.randn(batch, 16 if name == "sd3" else 4, height, width, generator=g),
        timestep=torch.linspace(10, 900, batch),
        encoder_hidden_states=torch.randn(batch, 5, 12, generator=g),
    )
    if name == "sd3":
        given["pooled_projections"] = torch.randn(batch, 10, generator=g)
    return given


def awake(student: nn.Module) -> nn.Module:
    """New weights that start at zero, or as an average, are random: a test must see them."""
    for key in parameter_names(student, "new"):
        parameter = student.get_parameter(key)
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return student


@torch.no_grad()
def run(network: nn.Module, **given) -> Tensor:
    return network(**given).sample


def distance(student: nn.Module, teacher: nn.Module, **given) -> float:
    expected = run(teacher, **given)
    return ((run(student, **given) - expected).norm() / expected.norm()).item()


# -------------------------------------------------------------------------------- how near a student starts

PLAIN = dict(baseline="kv_compression", key="linear", value="linear")  # softmax over all tokens


@each
@pytest.mark.parametrize("query", ["linear", "conv_fusion"])
def test_identity_like_student_is_its_teacher(name: str, query: str, caplog: pytest.LogCaptureFixture):
    """To 1e-5 of the output's norm (measured: 3e-7 at most)."""
    teacher = TEACHERS[name]()
    student = linearize(copy.deepcopy(teacher), **PLAIN, query=query)
    logging.getLogger("diffusers").addHandler(caplog.handler)
    assert distance(student, teacher, **inputs(name)) < 1e-5
    logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert "not expected by" not in caplog.text  # diffusers' word for arguments that it drops


@each
def test_paper_student_starts_near_its_teacher(name: str):
    """The kernel and the compressed keys remain: a few percent on these random networks, whose attention is flat
    (measured over ten seeds: at most 0.1). Of a trained teacher it is far: docs/linear_attention.md."""
    teacher = TEACHERS[name]()
    near = distance(linearize(copy.deepcopy(teacher)), teacher, **inputs(name))
    far = distance(awake(linearize(copy.deepcopy(teacher))), teacher, **inputs(name))
    assert near < 0.15 and near < far


@each
def test_weights_with_a_counterpart_are_the_teachers(name: str):
    teacher = TEACHERS[name]()
    before, expected = copy.deepcopy(teacher.state_dict()), type(teacher)
    student = linearize(teacher)
    assert student is teacher and type(student) is STUDENTS[name] and isinstance(student, expected)
    after, new = student.state_dict(), set(parameter_names(student, "new"))
    gone = before.keys() - after.keys()
    assert new == after.keys() - before.keys()
    # Queries of the last block's text, which nothing reads.
    assert all(".attn.add_q_proj." in key or ".attn.norm_added_q." in key for key in gone)
    assert bool(gone) == (name != "pixart")
    assert all(torch.equal(after[key], before[key]) for key in before.keys() - gone)


def test_sd3_without_norms_and_second_attention():
    teacher = sd3(dual_attention_layers=(), qk_norm=None)
    assert distance(linearize(copy.deepcopy(teacher)), teacher, **inputs("sd3")) < 0.15


def test_subregions_are_lifted():
    teacher, given = emmdit(subregion_pattern=("strided",), subregion_groups=2), inputs("emmdit", 8, 8)
    given["encoder_hidden_states"] = torch.randn(2, 4, 12)
    assert distance(linearize(copy.deepcopy(teacher), query="linear", **PLAIN), teacher, **given) > 1e-4
    run(linearize(teacher), **inputs("emmdit", 8, 12))  # five text tokens: nothing is cut, nothing must be divisible


# -------------------------------------------------------------------------------- grids


@each
@pytest.mark.parametrize("baseline", ["edit", "sana", "kv_compression"])
@pytest.mark.parametrize("size", [(4, 16), (12, 8)])
def test_any_size_and_the_right_way_round(name: str, baseline: str, size: tuple[int, int]):
    """The transposed image through transposed convolutions, without positions: the transposed prediction."""
    teacher = emmdit(compression_ratios=()) if name == "emmdit" else TEACHERS[name]()
    student = awake(linearize(teacher, baseline=baseline))
    if name == "emmdit":
        student.pos_table.zero_()
    else:
        student.pos_embed.pos_embed = None
    given = inputs(name, *size)
    y = run(student, **given)
    assert y.shape[2:] == size
    for module in student.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.transpose(2, 3)
    output = student.proj_out
    p, channels = student.config.patch_size, output.out_features // student.config.patch_size**2
    for tensor in (output.weight, output.bias):  # the pixels inside a patch turn too
        turned = tensor.data.unflatten(0, (p, p, channels)).transpose(0, 1).flatten(0, 2)
        tensor.data = turned.contiguous()
    turned = run(student, **given | {"hidden_states": given["hidden_states"].transpose(2, 3)})
    torch.testing.assert_close(turned.transpose(2, 3), y, rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize("baseline", ["edit", "sana"])
def test_two_resolutions_in_turn_under_checkpointing(name: str, baseline: str):
    """Gradients of a first grid, computed after a second grid of as many tokens went through."""
    student = copy.deepcopy(awake(linearize(TEACHERS[name](), baseline=baseline))).train()  # a copy, as for EMA
    first, second = inputs(name, 4, 16), inputs(name, 16, 4)

    def gradients(*between: dict[str, Tensor]) -> list[Tensor]:
        student.zero_grad()
        loss = student(**first).sample.square().mean()
        for given in between:
            student(**given)
        loss.backward()
        return [p.grad.clone() for p in student.parameters() if p.grad is not None]

    expected = gradients()
    student.enable_gradient_checkpointing()
    for got, want in zip(gradients(second), expected, strict=True):
        torch.testing.assert_close(got, want)


@each
def test_a_compiled_block_gives_the_same(name: str):
    """Graphs are captured and run eagerly: nothing in a student keeps a block from being one graph."""
    student = awake(linearize(TEACHERS[name]()))
    expected = [run(student, **inputs(name, *size)) for size in ((8, 12), (12, 8))]
    torch._dynamo.reset()
    # One with two grids, one with two attentions: graphs cost seconds each.
    block = student.blocks[1] if name == "emmdit" else student.transformer_blocks[0]
    block.compile(backend="eager", fullgraph=True)
    for size, want in zip(((8, 12), (12, 8)), expected, strict=True):
        torch.testing.assert_close(run(student, **inputs(name, *size)), want)
    torch._dynamo.reset()


# -------------------------------------------------------------------------------- files and pipelines


@each
@pytest.mark.parametrize("baseline", BASELINES)
def test_save_and_load_bit_for_bit(name: str, baseline: str, tmp_path: Path):
    student = linearize(TEACHERS[name](), baseline=baseline)
    student.save_pretrained(tmp_path)
    loaded, info = STUDENTS[name].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.attention == student.config.attention
    own, others = student.state_dict(), loaded.state_dict()
    assert own.keys() == others.keys() and all(torch.equal(own[key], others[key]) for key in own)
    assert torch.equal(run(loaded, **inputs(name)), run(student, **inputs(name)))


def test_a_student_with_the_config_of_an_older_version(tmp_path: Path):
    student = linearize(pixart(), query="linear")
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"attention": OLD | dict(query="linear")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = EDiTTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.config.attention == student.config.attention
    assert torch.equal(run(loaded, **inputs("pixart")), run(student, **inputs("pixart")))


@each
def test_a_student_is_made_by_its_config_too(name: str):
    """As a YAML does it, here on the meta device, as the training checks do."""
    made = linearize(TEACHERS[name](), query="linear")
    config = {key: value for key, value in TEACHERS[name]().config.items() if not key.startswith("_")}
    with torch.device("meta"):
        student = STUDENTS[name](**config, attention=dict(query="linear"))
    shapes = {key: value.shape for key, value in student.state_dict().items()}
    assert shapes == {key: value.shape for key, value in made.state_dict().items()}
    assert {parameter.device.type for parameter in student.parameters()} == {"meta"}
    with pytest.raises(ValueError, match="'qeury'.*query"):
        STUDENTS[name](**config, attention=dict(qeury="linear"))


@each
def test_the_teacher_of_a_student_and_of_a_teacher(name: str, tmp_path: Path):
    teacher = TEACHERS[name]()
    student = linearize(copy.deepcopy(teacher))
    student.save_pretrained(tmp_path)
    for network in (teacher, student, STUDENTS[name].from_pretrained(tmp_path)):
        with torch.device("meta"):
            again = teacher_of(network)
        assert type(again) is type(teacher) is teacher_class(type(network))
        sharded = type(f"FSDP{type(network).__name__}", (type(network),), {})  # what fully_shard makes of the class
        assert issubclass(teacher_class(sharded), type(teacher))
        assert {parameter.device.type for parameter in again.parameters()} == {"meta"}
        again = teacher_of(network).eval()
        again.load_state_dict(teacher.state_dict())
        assert distance(again, teacher, **inputs(name)) == 0


def pixart_sigma(student: nn.Module) -> tuple[PixArtSigmaPipeline, dict]:
    from transformers import AutoTokenizer, T5EncoderModel

    t5 = standin("t5", caption_channels=12)
    parts = dict(tokenizer=AutoTokenizer.from_pretrained(t5), text_encoder=T5EncoderModel.from_pretrained(t5))
    parts |= dict(vae=AutoencoderKL.from_pretrained(standin("sdxl_vae")), scheduler=DPMSolverMultistepScheduler())
    return PixArtSigmaPipeline(transformer=student, **parts), dict(use_resolution_binning=False)


def stable_diffusion_3(student: nn.Module) -> tuple[StableDiffusion3Pipeline, dict]:
    folder = standin("sd3_text", clip_l=16, clip_g=24, caption_channels=64)
    encoders = SD3TextEncoders(str(folder), t5_length=8, caption_channels=64, clip_channels=(16, 24), dtype="float32")
    parts = dict(vae=AutoencoderKL.from_pretrained(standin("sd3_vae")), scheduler=FlowMatchEulerDiscreteScheduler())
    return StableDiffusion3Pipeline(transformer=student, **parts, **encoders.components()), {}


SD3 = dict(joint_attention_dim=64, pooled_projection_dim=40)
PIPELINES = [("pixart", pixart_sigma, {}), ("sd3", stable_diffusion_3, SD3)]


@pytest.mark.parametrize(("name", "pipeline_of", "sizes"), PIPELINES)
def test_stock_pipelines_take_a_student(name: str, pipeline_of: Callable, sizes: dict, tmp_path: Path):
    pipeline, options = pipeline_of(awake(linearize(TEACHERS[name](**sizes))))
    pipeline.set_progress_bar_config(disable=True)
    options |= dict(height=64, width=96, max_sequence_length=8, num_inference_steps=2, output_type="pt")

    def images() -> Tensor:
        return pipeline("a red circle", generator=torch.Generator().manual_seed(0), **options).images

    expected = images()
    assert expected.shape == (1, 3, 64, 96) and expected.isfinite().all()
    pipeline.transformer.save_pretrained(tmp_path)
    pipeline.transformer = STUDENTS[name].from_pretrained(tmp_path)
    assert torch.equal(images(), expected)
    pipeline.transformer = TEACHERS[name](**sizes)
    assert not torch.equal(images(), expected)


# -------------------------------------------------------------------------------- what trains


@each
@pytest.mark.parametrize("part", ["new", "attention", "all"])
def test_gradients_reach_exactly_what_trains(name: str, part: str):
    """Gates that start at zero would hide a gradient; no network here has them."""
    student = awake(linearize(TEACHERS[name]()))
    names = train_only(student, part)
    student(**inputs(name)).sample.square().mean().backward()
    reached = {key for key, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    silent = set(names) - reached
    # A key's bias adds the same to all scores of a softmax, and its gradient is zero but for rounding.
    assert reached - set(names) == set() and all(key.endswith("bias") for key in silent), silent
    assert [key for key in names if student.get_parameter(key).grad is None] == []


def test_parts_are_what_they_say():
    student = linearize(sd3(), baseline="sana")
    with pytest.raises(ValueError, match=r"\bpart\b.*new, attention, all.*'heads'"):
        parameter_names(student, "heads")
    assert all(".ff.conv_" in key for key in parameter_names(student, "new"))
    student = linearize(sd3())
    new, attention, everything = (set(parameter_names(student, part)) for part in ("new", "attention", "all"))
    assert new < attention < everything == {key for key, _ in student.named_parameters()}
    assert all(key.split(".")[3] in ("fuse_q", "compress_k", "compress_v") for key in new)
    assert all(key.split(".")[2] in ("attn", "attn2") for key in attention)
    with pytest.raises(ValueError, match="[\"']new[\"']"):
        parameter_names(linearize(sd3(), baseline="linear"), "new")


@each
def test_teacher_and_student_layers_pair_up(name: str):
    teacher = TEACHERS[name]()
    student = linearize(copy.deepcopy(teacher))
    of_teacher, of_student = attention_layers(teacher), attention_layers(student)
    assert list(of_teacher) == list(of_student)
    names = {key for key, module in student.named_modules() if isinstance(module, LinearAttention)}
    assert names == set(of_student) and not any(isinstance(module, LinearAttention) for module in of_teacher.values())
    assert all(student.get_submodule(key) is module for key, module in of_student.items())
    hybrid = {key.split(".")[-1] for key, module in of_student.items() if isinstance(module, HybridAttention)}
    assert hybrid == ({"attn"} if name != "pixart" else set())  # not attn1, nor SD3.5's second one


@each
def test_precision_and_mode_are_the_teachers(name: str):
    student = linearize(TEACHERS[name]().bfloat16())
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16} and not student.training
    assert not any(module.training for module in student.modules())
    given = {key: value if key == "timestep" else value.bfloat16() for key, value in inputs(name).items()}
    exact = run(copy.deepcopy(student).float(), **{key: value.float() for key, value in given.items()})
    assert (run(student, **given).float() - exact).norm() < 0.03 * exact.norm()


# -------------------------------------------------------------------------------- refusals


def refused(match: str, function, *args, **choices) -> None:
    with pytest.raises(ValueError, match=match) as error:
        function(*args, **choices)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_refusals_in_one_sentence(tmp_path: Path):
    refused(r"\bLinear\b.*PixArtTransformer2DModel", linearize, nn.Linear(2, 2))
    refused(r"\bEDiTTransformer2DModel\b", linearize, linearize(pixart()))
    refused("'kernal'.*query", linearize, sd3(), kernal="relu")
    refused(
        "HybridEMMDiTTransformer2DModel.*save_pretrained", save_nitro_e, linearize(emmdit()), tmp_path / "x.safetensors"
    )
    refused("E-MMDiT.*projections", linearize(emmdit()).fuse_qkv_projections)
    refused(r"\bLinear\b(?!.*Transformer)", attention_layers, nn.Linear(2, 2))
    fused = emmdit()
    fused.fuse_qkv_projections()
    refused("unfuse_qkv_projections", linearize, fused)
    for name in ("pixart", "sd3"):
        refused("7 x 8 .* 2 x 2", linearize(TEACHERS[name]()), **inputs(name, 7, 8))


@each
def test_a_refused_teacher_is_unchanged(name: str):
    teacher = TEACHERS[name]()
    before = copy.deepcopy(teacher)
    with pytest.raises(ValueError, match="'key'|key is 'linear'"):
        linearize(teacher, key="linear")
    assert type(teacher) is type(before) and str(teacher) == str(before)
