"""Text conditioners with pretrained encoders: one encoder (Llama, T5, CLIP, ...) or SD3's three."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from emmdit.encoders.base import FrozenModel, TextConditioner, frozen
from emmdit.encoders.loading import load_tokenizer, read_config
from emmdit.types import Condition

# model_type -> the class of its text encoder alone; every other kind goes through AutoModel.
_TEXT_CLASSES = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}


class TextEncoder(FrozenModel, TextConditioner):
    """The body of a pretrained text model, never its LM head; of an encoder-decoder (T5), the encoder.

    Captions are padded and truncated to `max_length`; the pad token is the EOS token where the tokenizer has none
    (Llama). The text model itself always gets its attention mask, unless `mask_encoder` is off. The hidden states
    are in `dtype`: a caller that runs without autocast casts them to the dtype of the network.

    Args:
        source: local folder or hub id; `subfolder` and `tokenizer_subfolder` for a diffusers pipeline.
        caption_channels: width of the hidden states (known before loading, checked after).
        padding_side: "right" is the default of Llama-3.2's tokenizer; the released Nitro-E code leaves it to the
            tokenizer's file, so it is fixed here.
        with_mask: give the denoiser `encoder_attention_mask`. False is faithful to Nitro-E, whose joint attention
            attends to the padded positions; PixArt needs True.
        pooled: give the denoiser `pooled_projections` (CLIP only; the projected ones where the model has a projection).
        hidden_layer: -1 = the last hidden state, after the final norm; -2 = the output of the penultimate layer,
            without that norm.
        mask_encoder: False hides the mask from the text model, as SD3's pipeline does.
        clean_captions: lower-case and collapse white space (training reads raw captions).
    """

    def __init__(
        self,
        source: str = "meta-llama/Llama-3.2-1B",
        max_length: int = 128,
        caption_channels: int = 2048,
        dtype: str | torch.dtype = "bfloat16",
        padding_side: str = "right",
        with_mask: bool = False,
        pooled: bool = False,
        hidden_layer: int = -1,
        mask_encoder: bool = True,
        clean_captions: bool = False,
        subfolder: str | None = None,
        tokenizer_subfolder: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__(source, dtype, subfolder, revision)
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', not {padding_side!r}.")
        self.max_length, self.caption_channels, self.padding_side = max_length, caption_channels, padding_side
        self.with_mask, self.pooled, self.mask_encoder = with_mask, pooled, mask_encoder
        self.hidden_layer, self.clean_captions = hidden_layer, clean_captions
        self.tokenizer_subfolder = tokenizer_subfolder
        self._tokenizer = None
        self._nulls: dict[tuple[torch.device, torch.dtype], Condition] = {}

    @property
    def tokenizer(self):
        """The Hugging Face tokenizer, with padding side and pad token set; loaded at first use."""
        if self._tokenizer is None:
            tokenizer = load_tokenizer(self.source, self.tokenizer_subfolder, self.revision)
            tokenizer.padding_side, tokenizer.truncation_side = self.padding_side, "right"
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            self._tokenizer = tokenizer
        return self._tokenizer

    def adopt(self, model: nn.Module, tokenizer) -> None:
        super().adopt(model)
        tokenizer.padding_side, tokenizer.truncation_side = self.padding_side, "right"
        self._tokenizer = tokenizer
        self._nulls.clear()

    def load(self) -> TextEncoder:
        _ = self.tokenizer
        return super().load()

    def _build(self) -> nn.Module:
        import transformers

        config = read_config(self.source, self.subfolder, self.revision)
        name = _TEXT_CLASSES.get(config.get("model_type", ""), "AutoModel")
        if "CLIPTextModelWithProjection" in (config.get("architectures") or ()):
            name = "CLIPTextModelWithProjection"
        model = self._load(getattr(transformers, name))
        if name == "AutoModel" and model.config.is_encoder_decoder:
            model = model.get_encoder()
        config = model.config.get_text_config()
        self._check_argument("caption_channels", self.caption_channels, config.hidden_size)
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and self.max_length > longest:
            raise ValueError(
                f"max_length is {self.max_length}, but '{self.source}' takes at most {longest} tokens: set max_length."
            )
        if self.pooled and not name.startswith("CLIPText"):
            raise ValueError(
                f"pooled needs a CLIP text model, but '{self.source}' holds a {type(model).__name__}: set pooled off."
            )
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False  # a decoder would keep its keys and values without need
        return model

    def tokenize(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """`input_ids` and `attention_mask` (B,max_length) int64 on the CPU."""
        if isinstance(captions, str):
            raise ValueError("captions must be a list of strings, not one string.")
        if self.clean_captions:
            captions = [" ".join(caption.lower().split()) for caption in captions]
        options = dict(padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt")
        tokens = self.tokenizer(list(captions), **options)
        # A tokenizer without BOS turns "" into no token at all. A softmax over an empty set is undefined, so the text
        # model then gets one pad token.
        mask = tokens["attention_mask"].clone()
        mask[mask.sum(1) == 0, 0 if self.padding_side == "right" else -1] = 1
        return tokens["input_ids"], mask

    def __call__(self, captions: list[str]) -> Condition:
        """`encoder_hidden_states` (B,max_length,caption_channels), and the entries of `with_mask` and `pooled`."""
        ids, mask = (t.to(self.device) for t in self.tokenize(captions))
        with frozen(self.device):
            output = self.model(
                input_ids=ids,
                attention_mask=mask if self.mask_encoder else None,
                output_hidden_states=self.hidden_layer != -1,
            )
        hidden = output.last_hidden_state if self.hidden_layer == -1 else output.hidden_states[self.hidden_layer]
        condition = {"encoder_hidden_states": hidden}
        if self.with_mask:
            condition["encoder_attention_mask"] = mask.bool()
        if self.pooled:
            projected = getattr(output, "text_embeds", None)
            condition["pooled_projections"] = output.pooler_output if projected is None else projected
        return condition

    def null(self, batch_size: int) -> Condition:
        """The condition of the empty caption, encoded once per device and dtype."""
        key = (self.device, self.dtype)
        if key not in self._nulls:
            self._nulls[key] = self([""])
        return {name: value.expand(batch_size, *value.shape[1:]) for name, value in self._nulls[key].items()}

    def components(self) -> dict[str, object]:
        """The components that a diffusers pipeline saves, by their names there."""
        return {"text_encoder": self.model, "tokenizer": self.tokenizer}


class SD3TextEncoders(TextConditioner):
    """The conditioning of Stable Diffusion 3: two CLIPs and T5, for SD3Transformer2DModel.

    `encoder_hidden_states` (B, clip_length + t5_length, caption_channels): the penultimate layers of both CLIPs side by
    side, zero-padded to T5's width, then T5's sequence. `pooled_projections` (B, sum of clip_channels): both CLIPs'
    projected vectors. No masks, neither in the text models nor for the denoiser, as in diffusers' pipeline. With
    `use_t5=False` T5's part is zeros and the 4.7B-parameter encoder is not loaded.
    """

    def __init__(
        self,
        source: str = "stabilityai/stable-diffusion-3.5-medium",
        clip_length: int = 77,
        t5_length: int = 256,
        caption_channels: int = 4096,
        clip_channels: tuple[int, int] = (768, 1280),
        use_t5: bool = True,
        dtype: str | torch.dtype = "bfloat16",
        clean_captions: bool = False,
        revision: str | None = None,
    ) -> None:
        common = dict(dtype=dtype, clean_captions=clean_captions, revision=revision, mask_encoder=False)

        def encoder(suffix: str, length: int, channels: int, **options) -> TextEncoder:
            folders = dict(subfolder=f"text_encoder{suffix}", tokenizer_subfolder=f"tokenizer{suffix}")
            return TextEncoder(source, length, channels, **folders, **common, **options)

        clip = dict(pooled=True, hidden_layer=-2)
        pairs = zip(("", "_2"), clip_channels, strict=True)
        self.encoders = [encoder(suffix, clip_length, channels, **clip) for suffix, channels in pairs]
        if use_t5:
            self.encoders.append(encoder("_3", t5_length, caption_channels))
        self.source, self.use_t5, self.t5_length = source, use_t5, t5_length
        self.caption_channels, self.max_length = caption_channels, clip_length + t5_length
        self.pooled_channels = sum(clip_channels)

    @property
    def device(self) -> torch.device:
        return self.encoders[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoders[0].dtype

    def load(self) -> SD3TextEncoders:
        for encoder in self.encoders:
            encoder.load()
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None) -> SD3TextEncoders:
        for encoder in self.encoders:
            encoder.to(device, dtype)
        return self

    def __call__(self, captions: list[str]) -> Condition:
        """`encoder_hidden_states` (B,T,D) and `pooled_projections` (B,P)."""
        return self._join([encoder(captions) for encoder in self.encoders])

    def null(self, batch_size: int) -> Condition:
        """The condition of the empty caption, encoded once by each encoder."""
        return self._join([encoder.null(batch_size) for encoder in self.encoders])

    def _join(self, parts: list[Condition]) -> Condition:
        clips, t5s = parts[:2], [part["encoder_hidden_states"] for part in parts[2:]]
        hidden = torch.cat([clip["encoder_hidden_states"] for clip in clips], dim=-1)
        hidden = F.pad(hidden, (0, self.caption_channels - hidden.shape[-1]))
        t5 = t5s[0] if t5s else hidden.new_zeros(len(hidden), self.t5_length, self.caption_channels)
        return {
            "encoder_hidden_states": torch.cat([hidden, t5], dim=1),
            "pooled_projections": torch.cat([clip["pooled_projections"] for clip in clips], dim=-1),
        }

    def components(self) -> dict[str, object]:
        """The components that StableDiffusion3Pipeline saves, by their names there."""
        parts: dict[str, object] = {}
        for encoder, suffix in zip(self.encoders, ("", "_2", "_3"), strict=False):
            parts |= {f"text_encoder{suffix}": encoder.model, f"tokenizer{suffix}": encoder.tokenizer}
        return parts
