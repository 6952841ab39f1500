"""Text encoder of the shapes world: a word-level tokenizer and a tiny frozen Llama.

The model is pretrained as a language model is, before any image is seen and at a size that fits: on the captions alone
(`assets/recipes/train_shapes_text.py`), so that a linear map reads from its features what a caption asks for.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from emmdit.encoders.base import TextConditioner, as_dtype, frozen
from emmdit.shapes.world import ShapesWorld
from emmdit.types import Condition

PAD, BOS, UNKNOWN, EOS = "<pad>", "<bos>", "<unk>", "<eos>"
WEIGHTS = Path(__file__).with_name("text.safetensors")
MAX_LENGTH = 16  # <bos> and the longest caption's eleven words fit
TOGETHER = 16  # captions to encode at a time


def shapes_tokenizer(max_length: int = MAX_LENGTH, eos: bool = False) -> PreTrainedTokenizerFast:
    """Lower-cased words of the default world, split at white space; `<bos>` in front, `<pad>` at the right.

    `eos` adds `<eos>` behind the words.
    """
    special = {"pad_token": PAD, "bos_token": BOS, "unk_token": UNKNOWN} | ({"eos_token": EOS} if eos else {})
    vocabulary = {word: i for i, word in enumerate([*special.values(), *ShapesWorld().vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}" if eos else f"{BOS} $A",
        special_tokens=[(token, vocabulary[token]) for token in (BOS, EOS) if token in vocabulary],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="right",
        truncation_side="right",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )


def text_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Sizes of the text model for the vocabulary and length of `tokenizer`."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
        use_cache=False,
        attn_implementation="sdpa",
    )


def pretrained_text_model(tokenizer: PreTrainedTokenizerFast) -> LlamaModel:
    """The frozen text model with the weights of the package, float32 on the CPU; uses no global RNG.

    The mean square of each channel of its output is 1 over all positions (padding, too) of all captions.
    """
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights
        model = LlamaModel(text_config(tokenizer))
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval().requires_grad_(False)


class ShapesText(TextConditioner):
    """Captions of the shapes world -> `encoder_hidden_states` (B, max_length, 64).

    Captions are padded to `max_length`; the features of the padding are the model's outputs there (as in Nitro-E). Each
    different caption is encoded once, in a batch that is always of one size, and cached: its features do not depend on
    the captions beside it, so that a resumed run sees the same bits.

    Args:
        with_mask: give the denoiser `encoder_attention_mask` (B, T) bool, True for a word or `<bos>`.
        pooled: give the denoiser `pooled_projections` (B, 64), the features of the last word, as CLIP's for SD3.
        cache_size: number of captions to keep; the oldest is dropped first.
        model, tokenizer: ready-made ones (both or neither) in place of the pretrained ones.
    """

    def __init__(
        self,
        with_mask: bool = False,
        max_length: int = MAX_LENGTH,
        cache_size: int = 8192,
        model: LlamaModel | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        pooled: bool = False,
    ) -> None:
        if (model is None) != (tokenizer is None):
            raise ValueError("ShapesText needs both a model and its tokenizer, or neither.")
        if type(max_length) is not int or max_length < 1:
            raise ValueError(f"ShapesText max_length must be a number of tokens, not {max_length!r}.")
        if model is None:
            tokenizer = shapes_tokenizer(max_length)
            model = pretrained_text_model(tokenizer)
        self.with_mask, self.max_length, self.pooled, self.cache_size = with_mask, max_length, pooled, cache_size
        self._cache: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.adopt(model, tokenizer)

    def components(self) -> dict[str, object]:
        """The components that a diffusers pipeline saves, by their names there."""
        return {"text_encoder": self.model, "tokenizer": self.tokenizer}

    def adopt(self, model: LlamaModel, tokenizer: PreTrainedTokenizerFast) -> None:
        """Use a loaded model and tokenizer in place of the present ones."""
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.caption_channels = model.config.hidden_size
        self._cache.clear()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None) -> ShapesText:
        self.model.to(device=device, dtype=None if dtype is None else as_dtype(dtype))
        self._cache.clear()
        return self

    def __call__(self, captions: list[str]) -> Condition:
        """Raises ValueError for words outside the vocabulary and for captions longer than `max_length`."""
        if isinstance(captions, str):
            raise ValueError("captions must be a list of strings, not one string.")
        found = {caption: self._cache[caption] for caption in captions if caption in self._cache}
        missing = [caption for caption in dict.fromkeys(captions) if caption not in found]
        for first in range(0, len(missing), TOGETHER):
            found |= self._encode(missing[first : first + TOGETHER])
        self._cache |= {caption: found[caption] for caption in missing}
        for oldest in list(self._cache)[: max(len(self._cache) - self.cache_size, 0)]:
            del self._cache[oldest]
        rows = [found[caption] for caption in captions]
        condition = {"encoder_hidden_states": torch.stack([hidden for hidden, _ in rows])}
        if self.with_mask:
            condition["encoder_attention_mask"] = torch.stack([mask for _, mask in rows])
        if self.pooled:
            condition["pooled_projections"] = torch.stack([hidden[mask.sum() - 1] for hidden, mask in rows])
        return condition

    def check(self, captions: list[str]) -> None:
        """Raise a ValueError for words and lengths that `__call__` refuses."""
        self(captions)

    def null(self, batch_size: int) -> Condition:
        """The condition of the empty prompt; the tensors are views, so do not write into them."""
        return {name: value.expand(batch_size, *value.shape[1:]) for name, value in self([""]).items()}

    def _encode(self, captions: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Features (T, D) and mask (T,) of each of at most `TOGETHER` captions."""
        for caption in captions:
            self._check(caption)
        filled = captions + [""] * (TOGETHER - len(captions))
        tokens = self.tokenizer(filled, padding="max_length", max_length=self.max_length)
        for caption, ids in zip(captions, tokens["input_ids"], strict=False):
            if len(ids) > self.max_length:
                raise ValueError(
                    f"The caption {caption!r} has {len(ids)} tokens with {BOS}, more than max_length "
                    f"{self.max_length}: shorten it or set max_length."
                )
        tokens = tokens.convert_to_tensors("pt").to(self.device)
        with frozen(self.device):
            hidden = self.model(**tokens).last_hidden_state
        # copies: a row of the batch would keep all of it
        rows = zip(hidden.unbind(), tokens["attention_mask"].bool().unbind(), strict=True)
        return {caption: (row.clone(), mask.clone()) for caption, (row, mask) in zip(captions, rows, strict=False)}

    def _check(self, caption: str) -> None:
        vocabulary = self.tokenizer.get_vocab()
        words = sorted(vocabulary.keys() - {PAD, BOS, UNKNOWN}, key=vocabulary.get)
        if unknown := [word for word in dict.fromkeys(caption.lower().split()) if word not in words]:
            raise ValueError(
                f"The shapes world does not know {', '.join(map(repr, unknown))} (in {caption!r}); "
                f"its words are: {', '.join(words)}."
            )
