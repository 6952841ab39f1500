"""The text side of the shapes world: a word-level tokenizer and a tiny frozen Llama that mixes words.

The model is pretrained as a language model is, before any picture is seen and at a size that fits: on the captions
alone (`benchmarks/train_shapes_text.py`), so that what a caption asks for can be read off its features linearly. It
starts from weights drawn from a fixed seed, except that the queries and keys see one constant direction which makes
every head look a fixed number of words back (RoPE turns a constant query and key into a function of their distance).
`pretrained: false` stops there: features that hold everything, too, but bind little of it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from emmdit.encoders.base import TextConditioner, as_dtype, frozen
from emmdit.shapes.world import TASKS, ShapesWorld
from emmdit.types import Condition

PAD, BOS, UNKNOWN = "<pad>", "<bos>", "<unk>"
WEIGHTS = Path(__file__).with_name("text.safetensors")
MAX_LENGTH = 16  # <bos> and the longest caption's ten words fit
LOOK_BACK = (1, 2, 4, 7)  # words; one head each, in every layer
# Chosen by linear probes (tests/test_shapes_text.py): sharper heads forget the words between, blunter ones
# the order.
CONSTANT = 3.0  # of the direction that queries and keys share, where a word's own channels have variance 1
SHARPNESS, CONTENT = 0.7, 0.3  # of attention by distance, and by word


def shapes_tokenizer(world: ShapesWorld | None = None, max_length: int = MAX_LENGTH) -> PreTrainedTokenizerFast:
    """Lower-cased words of the world, split at white space; `<bos>` in front, `<pad>` at the right."""
    words = (world or ShapesWorld()).vocabulary()
    vocabulary = {word: i for i, word in enumerate([PAD, BOS, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        unk_token=UNKNOWN,
        padding_side="right",
        truncation_side="right",
        model_max_length=max_length,
    )


def shapes_text_model(
    world: ShapesWorld | None = None,
    hidden_size: int = 64,
    layers: int = 2,
    seed: int = 0,
    max_length: int = MAX_LENGTH,
    pretrained: bool = True,
) -> LlamaModel:
    """The frozen text model, float32 on the CPU; same arguments, same weights; uses no global RNG.

    The last norm is scaled so that the mean square of each channel is 1 over all positions (padding too) of
    all captions.

    Args:
        pretrained: the weights that come with the package (`benchmarks/train_shapes_text.py`), for the default world
            and sizes; else random ones.
    """
    world = world or ShapesWorld()
    if pretrained and ((hidden_size, layers, seed) != (64, 2, 0) or world.vocabulary() != ShapesWorld().vocabulary()):
        raise ValueError(
            "The pretrained text model is of the default world with hidden_size 64, layers 2 and seed 0: set "
            "pretrained: false for random weights of another kind."
        )
    tokenizer = shapes_tokenizer(world, max_length)
    heads = len(LOOK_BACK)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights; ours replace them
        model = LlamaModel(config)
    model.eval().requires_grad_(False)
    if pretrained:
        model.load_state_dict(load_file(WEIGHTS))
        return model
    _set_weights(model, torch.Generator().manual_seed(seed))
    captions = [spec.caption for task in TASKS for spec in world.specs(task)]
    scale_norm(model, tokenizer(captions, padding="max_length", max_length=max_length, return_tensors="pt"))
    return model


@torch.no_grad()
def scale_norm(model: LlamaModel, tokens: Mapping[str, torch.Tensor]) -> None:
    """Scale the last norm so that the mean square of each channel is 1 over all positions of `tokens`."""
    model.norm.weight.fill_(1.0)
    features = model(**tokens).last_hidden_state.flatten(0, 1)
    model.norm.weight.copy_(features.square().mean(dim=0).rsqrt().round(decimals=3))


@torch.no_grad()
def _set_weights(model: LlamaModel, generator: torch.Generator) -> None:
    config = model.config
    d, heads = config.hidden_size, config.num_attention_heads
    head_dim = d // heads

    def normal(*shape: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * gain / math.sqrt(shape[-1])

    # Channel 0 of the residual stream is the constant every query and key reads; only the last layer writes
    # there.
    embedding = torch.randn(config.vocab_size, d, generator=generator)
    embedding[:, 0] = CONSTANT
    model.embed_tokens.weight.copy_(embedding)
    inverse_frequency = model.rotary_emb.inv_freq.float()
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        query, key = normal(d, d, gain=CONTENT), normal(d, d, gain=CONTENT)
        for head, distance in enumerate(LOOK_BACK):
            # Score of a word n back: sum over frequencies of cos(w (n - distance)), highest at n = distance.
            rows = slice(head * head_dim, (head + 1) * head_dim)
            angle = -distance * inverse_frequency
            query[rows, 0] = torch.cat([angle.cos(), angle.sin()]) * SHARPNESS
            key[rows, 0] = torch.cat([torch.ones_like(angle), torch.zeros_like(angle)]) * SHARPNESS
        attention.q_proj.weight.copy_(query)
        attention.k_proj.weight.copy_(key)
        attention.v_proj.weight.copy_(normal(d, d))
        output, down = normal(d, d), normal(d, 2 * d)
        if layer is not model.layers[-1]:
            output[0], down[0] = 0.0, 0.0
        attention.o_proj.weight.copy_(output)
        mlp.gate_proj.weight.copy_(normal(2 * d, d, gain=2.0))
        mlp.up_proj.weight.copy_(normal(2 * d, d))
        mlp.down_proj.weight.copy_(down)


class ShapesText(TextConditioner):
    """Captions of the shapes world -> `encoder_hidden_states` (B, 16, 64).

    Captions are padded to `max_length`, and the padding's features are whatever the model gives there (as in
    Nitro-E). Each different caption is encoded once, alone, and kept (the `cache_size` last used): a feature
    then never depends on the batch it was met in, so that a resumed run sees the same bits.

    Args:
        world: its vocabulary makes the tokenizer.
        pretrained: weights from which what a caption asks for can be read linearly; false: random ones.
        with_mask: give the denoiser `encoder_attention_mask` (B, T) bool, True = a word or `<bos>`.
        pooled: give the denoiser `pooled_projections` (B, 64), the last word's features, as CLIP's for SD3.
        model, tokenizer: ready-made ones (both or neither) in place of those of `world` and `seed`.
    """

    def __init__(
        self,
        world: ShapesWorld | None = None,
        with_mask: bool = False,
        max_length: int = MAX_LENGTH,
        hidden_size: int = 64,
        layers: int = 2,
        seed: int = 0,
        pretrained: bool = True,
        cache_size: int = 4096,
        model: LlamaModel | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        pooled: bool = False,
    ) -> None:
        if (model is None) != (tokenizer is None):
            raise ValueError("ShapesText wants both a model and its tokenizer, or neither.")
        if model is None:
            model = shapes_text_model(world, hidden_size, layers, seed, max_length, pretrained)
            tokenizer = shapes_tokenizer(world, max_length)
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.caption_channels, self.max_length = model.config.hidden_size, max_length
        self.with_mask, self.pooled, self.cache_size = with_mask, pooled, cache_size
        self._cache: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, tokenizer_folder: str | Path | None = None, with_mask: bool = False
    ) -> ShapesText:
        """From what `save_pretrained` wrote; in a diffusers pipeline the tokenizer has its own folder."""
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder or folder)
        model = LlamaModel.from_pretrained(folder, dtype=torch.float32)
        return cls(with_mask=with_mask, max_length=tokenizer.model_max_length, model=model, tokenizer=tokenizer)

    def save_pretrained(self, folder: str | Path) -> None:
        """Model and tokenizer, into one folder."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def components(self) -> dict[str, object]:
        """What a diffusers pipeline saves, by the names it uses."""
        return {"text_encoder": self.model, "tokenizer": self.tokenizer}

    def adopt(self, model: LlamaModel, tokenizer: PreTrainedTokenizerFast) -> None:
        """Take a loaded model and tokenizer in place of the own ones."""
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
            raise ValueError("captions is a list of strings, not one string.")
        rows = [self._encode(caption) for caption in captions]
        condition = {"encoder_hidden_states": torch.stack([hidden for hidden, _ in rows])}
        if self.with_mask:
            condition["encoder_attention_mask"] = torch.stack([mask for _, mask in rows])
        if self.pooled:
            condition["pooled_projections"] = torch.stack([hidden[mask.sum() - 1] for hidden, mask in rows])
        return condition

    def null(self, batch_size: int) -> Condition:
        """The empty prompt's condition; the tensors are views, so do not write into them."""
        return {name: value.expand(batch_size, *value.shape[1:]) for name, value in self([""]).items()}

    def _encode(self, caption: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (T, D) and mask (T,) of one caption, through the cache."""
        if caption in self._cache:
            self._cache.move_to_end(caption)
            return self._cache[caption]
        self._check(caption)
        tokens = self.tokenizer(caption, padding="max_length", max_length=self.max_length, return_tensors="pt")
        tokens = tokens.to(self.device)
        length = tokens["input_ids"].shape[1]
        if length > self.max_length:
            raise ValueError(
                f"The caption {caption!r} has {length} tokens with {BOS}, but the shapes world's text "
                f"encoder takes {self.max_length}; shorten it."
            )
        with frozen(self.device):
            hidden = self.model(**tokens).last_hidden_state[0]
        row = self._cache[caption] = (hidden, tokens["attention_mask"][0].bool())
        if len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        return row

    def _check(self, caption: str) -> None:
        special = {PAD, BOS, UNKNOWN}
        words = [word for word in self.tokenizer.get_vocab() if word not in special]
        unknown = list(dict.fromkeys(w for w in caption.lower().split() if w not in words))
        if unknown:
            raise ValueError(
                f"The shapes world does not know {', '.join(map(repr, unknown))} (in {caption!r}); "
                f"its words are: {', '.join(sorted(words, key=self.tokenizer.get_vocab().get))}."
            )
