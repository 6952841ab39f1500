"""Text encoders: each real class on a tiny random model, saved to disk and loaded back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from emmdit.encoders import SD3TextEncoders, TextConditioner, TextEncoder, standin

CAPTIONS = ["a photo of a red circle", "two blue squares left of a star"]
LLAMA, T5 = "llama?caption_channels=32&layers=2", "t5?caption_channels=24"
SD3 = "standin:sd3_text?clip_l=16&clip_g=24&caption_channels=64"


def llama(source: str = f"standin:{LLAMA}", **options) -> TextEncoder:
    return TextEncoder(source, **{"max_length": 12, "caption_channels": 32, "dtype": "float32"} | options)


def test_llama_is_padded_on_the_right_with_eos_and_masked_inside() -> None:
    from transformers import AutoTokenizer, LlamaModel

    encoder = llama()
    ids, mask = encoder.tokenize([CAPTIONS[0], ""])
    eos = AutoTokenizer.from_pretrained(standin(LLAMA)).eos_token_id
    n = int(mask[0].sum())
    assert 2 < n < 12 and mask[0].tolist() == [1] * n + [0] * (12 - n) and ids[0, n:].tolist() == [eos] * (12 - n)
    assert mask[1].tolist() == [1] + [0] * 11  # BOS alone

    condition = encoder(CAPTIONS)
    assert set(condition) == {"encoder_hidden_states"} and isinstance(encoder, TextConditioner)
    ids, mask = encoder.tokenize(CAPTIONS)
    with torch.no_grad():
        raw = LlamaModel.from_pretrained(standin(LLAMA))(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(condition["encoder_hidden_states"], raw)
    assert type(encoder.model) is LlamaModel and not encoder.model.training
    assert not any(p.requires_grad for p in encoder.model.parameters())


def test_padding_side_mask_and_truncation() -> None:
    right, left = (llama(padding_side=side, with_mask=True)([CAPTIONS[0]]) for side in ("right", "left"))
    mask = right["encoder_attention_mask"]
    assert mask.dtype == torch.bool and torch.equal(mask.flip(1), left["encoder_attention_mask"])
    # Rotary positions are relative and the padding is masked: the real tokens read the same on either side.
    torch.testing.assert_close(
        right["encoder_hidden_states"][mask],
        left["encoder_hidden_states"][left["encoder_attention_mask"]],
        atol=1e-4,
        rtol=1e-4,
    )
    ids, mask = llama(max_length=5).tokenize([CAPTIONS[1]])
    assert torch.equal(ids[0], llama(max_length=30).tokenize([CAPTIONS[1]])[0][0, :5]) and mask.all()
    unmasked = llama(mask_encoder=False)([CAPTIONS[0]])["encoder_hidden_states"]
    assert not torch.allclose(unmasked, llama()([CAPTIONS[0]])["encoder_hidden_states"])


def test_null_is_encoded_once() -> None:
    encoder = llama(with_mask=True).load()
    calls = []
    encoder.model.register_forward_hook(lambda *_: calls.append(1))
    three, five = encoder.null(3), encoder.null(5)
    assert len(calls) == 1 and three["encoder_hidden_states"].shape == (3, 12, 32)
    assert five["encoder_hidden_states"].shape == (5, 12, 32) and five["encoder_attention_mask"].sum() == 5
    torch.testing.assert_close(three["encoder_hidden_states"], encoder([""] * 3)["encoder_hidden_states"])
    assert len(calls) == 2
    encoder.to("cpu", "bfloat16")
    assert encoder.null(1)["encoder_hidden_states"].dtype == torch.bfloat16 and len(calls) == 3


def test_moving_keeps_the_rotary_frequencies() -> None:
    encoder = llama(dtype="bfloat16", max_length=64)
    before = encoder(CAPTIONS)["encoder_hidden_states"]
    encoder.to("cpu").to("cpu", torch.bfloat16)
    assert torch.equal(encoder(CAPTIONS)["encoder_hidden_states"], before)
    cast = llama(max_length=64).load().to(dtype="bfloat16")
    assert torch.equal(cast(CAPTIONS)["encoder_hidden_states"], before)


def test_t5_uses_the_encoder_alone(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, T5Config, T5EncoderModel, T5ForConditionalGeneration

    options = dict(max_length=10, caption_channels=24, dtype="float32", with_mask=True)
    encoder = TextEncoder(f"standin:{T5}", **options)
    condition = encoder([CAPTIONS[0], ""])
    assert type(encoder.model) is T5EncoderModel
    assert condition["encoder_hidden_states"].shape == (2, 10, 24)
    assert condition["encoder_attention_mask"].sum(1).tolist()[1] == 1  # EOS
    ids, mask = encoder.tokenize([CAPTIONS[0], ""])
    raw = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(condition["encoder_hidden_states"], raw)

    whole = T5ForConditionalGeneration(T5Config.from_pretrained(standin(T5)))  # a checkpoint with a decoder
    whole.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(standin(T5)).save_pretrained(tmp_path)
    encoder = TextEncoder(str(tmp_path), **options).load()
    assert type(encoder.model) is T5EncoderModel
    torch.testing.assert_close(encoder.model.shared.weight, whole.shared.weight.detach())


def test_pixart_layout_with_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    import sentencepiece
    from transformers import T5EncoderModel

    T5EncoderModel.from_pretrained(standin(T5)).save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    ids = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    options = dict(vocab_size=40, hard_vocab_limit=False, minloglevel=2, **ids)
    prefix = str(tmp_path / "tokenizer/spiece")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CAPTIONS * 20), model_prefix=prefix, **options)
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    folders = dict(subfolder="text_encoder", tokenizer_subfolder="tokenizer")
    encoder = TextEncoder(str(tmp_path), 40, 24, "float32", with_mask=True, **folders)
    condition = encoder([*CAPTIONS, ""])
    assert condition["encoder_hidden_states"].shape == (3, 40, 24)
    lengths = condition["encoder_attention_mask"].sum(1).tolist()
    assert lengths[2] == 1 and min(lengths[:2]) > 5 and max(lengths) < 40


def test_clip_pooled() -> None:
    encoder = TextEncoder(
        "standin:clip?hidden_size=16", max_length=77, caption_channels=16, dtype="float32", pooled=True
    )
    condition = encoder(CAPTIONS)
    ids, mask = encoder.tokenize(CAPTIONS)
    end = (ids == encoder.tokenizer.eos_token_id).int().argmax(1)
    last = condition["encoder_hidden_states"][torch.arange(2), end]
    torch.testing.assert_close(condition["pooled_projections"], encoder.model.text_projection(last))
    assert encoder.null(3)["pooled_projections"].shape == (3, 16)


def test_other_architectures_and_an_encoder_decoder_go_through_automodel(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BartConfig, BartModel, GPT2Config, GPT2Model

    tokenizer = AutoTokenizer.from_pretrained(standin(LLAMA))
    sizes = dict(vocab_size=len(tokenizer), max_position_embeddings=32)
    half = dict(layers=1, ffn_dim=8, attention_heads=2)
    halves = {f"{name}_{key}": value for name in ("encoder", "decoder") for key, value in half.items()}
    bart = BartConfig(d_model=16, **halves, **sizes)
    gpt2 = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2)
    for name, model in (("bart", BartModel(bart)), ("gpt2", GPT2Model(gpt2))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        encoder = TextEncoder(str(tmp_path / name), max_length=8, caption_channels=16, dtype="float32")
        assert encoder(CAPTIONS)["encoder_hidden_states"].shape == (2, 8, 16)
        assert not hasattr(encoder.model, "decoder")
        with pytest.raises(ValueError, match=rf"max_length.*\b64\b.*{name}.*\b32\b"):
            TextEncoder(str(tmp_path / name), max_length=64, caption_channels=16).load()


def test_an_empty_caption_without_bos_is_finite(tmp_path: Path) -> None:
    from tokenizers import processors
    from transformers import AutoTokenizer, LlamaModel

    LlamaModel.from_pretrained(standin(LLAMA)).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(standin(LLAMA))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    tokenizer.save_pretrained(tmp_path)
    for side in ("left", "right"):
        encoder = llama(str(tmp_path), padding_side=side, with_mask=True)
        null = encoder.null(2)
        assert null["encoder_hidden_states"].isfinite().all()
        assert null["encoder_attention_mask"][0].tolist() == ([True] + [False] * 11)[:: 1 if side == "right" else -1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: llama(caption_channels=2048).load(), r"caption_channels.*\b2048\b.*\b32\b"),
        (lambda: llama(pooled=True).load(), "pooled.*CLIP.*LlamaModel"),
        (lambda: llama(padding_side="middle"), "padding_side.*'middle'"),
        (lambda: llama()("a photo"), r"\bcaptions\b"),
    ],
)
def test_what_does_not_fit_is_named(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_cleaning() -> None:
    tokens = [llama(clean_captions=clean).tokenize([" A  Red\ncircle "])[0] for clean in (True, False)]
    expected = llama().tokenize(["a red circle"])[0]
    assert torch.equal(tokens[0], expected) and not torch.equal(tokens[1], expected)


def test_sd3_conditioning_equals_the_diffusers_pipeline() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    options = dict(caption_channels=64, clip_channels=(16, 24), dtype="float32")
    encoders = SD3TextEncoders(SD3, t5_length=20, **options)
    assert (encoders.max_length, encoders.caption_channels, encoders.pooled_channels) == (97, 64, 40)
    condition = encoders(CAPTIONS)
    parts = dict(transformer=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(), **encoders.components())
    pipeline = StableDiffusion3Pipeline(**parts)
    with torch.no_grad():
        theirs, null, pooled, null_pooled = pipeline.encode_prompt(
            CAPTIONS, None, None, negative_prompt=["", ""], max_sequence_length=20
        )
    torch.testing.assert_close(condition["encoder_hidden_states"], theirs)
    torch.testing.assert_close(condition["pooled_projections"], pooled)
    torch.testing.assert_close(encoders.null(2)["encoder_hidden_states"], null)
    torch.testing.assert_close(encoders.null(2)["pooled_projections"], null_pooled)

    without = SD3TextEncoders(SD3, t5_length=20, use_t5=False, **options)(CAPTIONS)
    assert torch.equal(without["encoder_hidden_states"][:, :77], condition["encoder_hidden_states"][:, :77])
    assert without["encoder_hidden_states"].shape[1] == 97
    assert without["encoder_hidden_states"][:, 77:].abs().max() == 0
