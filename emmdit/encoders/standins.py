"""Stand-ins for pretrained models: tiny random models of the same classes and interface sizes.

Each function saves a folder that the real class (`DCAE`, `TextEncoder`, ...) loads through `from_pretrained`. A config
selects one by `source: standin:NAME`, or `source: standin:NAME?key=value&key=value` to change a size, and then runs on
a CPU with no network. Their outputs are meaningless; meaningful images and captions without downloads are those of
`emmdit.shapes`.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from urllib.parse import parse_qsl

import torch

from emmdit.files import cache_folder

_TEXT = """a photo of the an and in on left right above below two three four red green blue yellow orange
purple pink brown black white circle square star cross triangle ring person dog cat car table tree house"""
_WORDS = _TEXT.split()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Initialize weights from `seed` and leave torch's global generators as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the accelerators
        yield


def _save(folder: str | Path, *parts) -> Path:
    for part in parts:
        part.save_pretrained(folder)
    return Path(folder)


def tiny_dc_ae(folder: str | Path, latent_channels: int = 32, downsample: int = 32, seed: int = 0) -> Path:
    """AutoencoderDC for `DCAE`; `downsample` is a power of two."""
    from diffusers import AutoencoderDC

    stages = downsample.bit_length()
    sizes = dict(
        block_out_channels=(8,) * (stages - 2) + (latent_channels,) * 2,
        layers_per_block=(1,) * stages,
        qkv_multiscales=((),) * stages,
    )
    both = {f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in sizes.items()}
    with _seeded(seed):
        return _save(folder, AutoencoderDC(latent_channels=latent_channels, scaling_factor=0.41407, **both))


def _tiny_kl(folder: str | Path, latent_channels: int, sample_size: int, seed: int, **config) -> Path:
    from diffusers import AutoencoderKL

    config |= dict(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )
    with _seeded(seed):
        return _save(folder, AutoencoderKL(latent_channels=latent_channels, sample_size=sample_size, **config))


def tiny_sd3_vae(folder: str | Path, sample_size: int = 1024, seed: int = 0) -> Path:
    """AutoencoderKL for `SD3VAE`; `sample_size` is the tile side when tiling."""
    config = dict(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    return _tiny_kl(folder, 16, sample_size, seed, **config)


def tiny_sdxl_vae(folder: str | Path, sample_size: int = 1024, seed: int = 0) -> Path:
    """AutoencoderKL for `SDXLVAE`."""
    return _tiny_kl(folder, 4, sample_size, seed, scaling_factor=0.13025, force_upcast=True)


def tiny_llama_text(folder: str | Path, caption_channels: int = 2048, layers: int = 1, seed: int = 0) -> Path:
    """LlamaModel and a byte-level BPE tokenizer without a pad token (as Llama's) for `TextEncoder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    options = dict(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator([_TEXT] * 2, trainers.BpeTrainer(vocab_size=512, special_tokens=[bos, eos], **options))
    bpe.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=caption_channels,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with _seeded(seed):
        return _save(folder, LlamaModel(config), tokenizer)


def tiny_t5(folder: str | Path, caption_channels: int = 4096, layers: int = 1, seed: int = 0) -> Path:
    """T5EncoderModel and a unigram tokenizer for `TextEncoder`."""
    return _save(folder, *_t5_parts(caption_channels, layers, seed))


def _t5_parts(caption_channels: int, layers: int, seed: int):
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -4.0) for word in dict.fromkeys(_WORDS)] + [(chr(i), -9.0) for i in range(33, 127)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    sizes = dict(vocab_size=len(tokenizer), d_model=caption_channels, d_kv=8, d_ff=16, num_layers=layers, num_heads=2)
    with _seeded(seed):
        return T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes)), tokenizer


def tiny_clip_text(folder: str | Path, hidden_size: int = 768, layers: int = 2, seed: int = 0) -> Path:
    """CLIPTextModelWithProjection (projection of the hidden size) and its tokenizer for `TextEncoder`."""
    return _save(folder, *_clip_parts(hidden_size, layers, "<|endoftext|>", seed))


def _clip_parts(hidden_size: int, layers: int, pad_token: str, seed: int):
    from tokenizers import pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = letters + [f"{letter}</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad_token, model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=16,
        projection_dim=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with _seeded(seed):
        return CLIPTextModelWithProjection(config), tokenizer


def tiny_clip(folder: str | Path, dim: int = 32, image_size: int = 32, patch_size: int = 8, seed: int = 0) -> Path:
    """CLIPModel with both towers, tokenizer and preprocessing for `CLIP` and `CLIPVision`."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    text, tokenizer = _clip_parts(16, 1, "<|endoftext|>", seed)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(image_size=image_size, patch_size=patch_size)
    config = CLIPConfig(text_config=text.config.to_dict(), vision_config=vision, projection_dim=dim)
    crop = dict(height=image_size, width=image_size)
    processor = CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=crop)
    with _seeded(seed):
        return _save(folder, processor, CLIPModel(config), tokenizer)


def tiny_sd3_text(
    folder: str | Path, clip_l: int = 768, clip_g: int = 1280, caption_channels: int = 4096, seed: int = 0
) -> Path:
    """The three text encoders and tokenizers of a Stable Diffusion 3 folder for `SD3TextEncoders`."""
    parts = (
        _clip_parts(clip_l, 2, "<|endoftext|>", seed),
        _clip_parts(clip_g, 2, "!", seed + 1),
        _t5_parts(caption_channels, 1, seed + 2),
    )
    for (model, tokenizer), suffix in zip(parts, ("", "_2", "_3"), strict=True):
        model.save_pretrained(Path(folder, f"text_encoder{suffix}"))
        tokenizer.save_pretrained(Path(folder, f"tokenizer{suffix}"))
    return Path(folder)


def tiny_dinov2(folder: str | Path, feature_dim: int = 768, image_size: int = 224, seed: int = 0) -> Path:
    """Dinov2Model with 14px patches for `DINOv2`."""
    from transformers import Dinov2Config, Dinov2Model

    sizes = dict(hidden_size=feature_dim, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=1)
    with _seeded(seed):
        return _save(folder, Dinov2Model(Dinov2Config(**sizes, image_size=image_size)))


STANDINS: dict[str, Callable[..., Path]] = {
    "dc_ae": tiny_dc_ae,
    "sd3_vae": tiny_sd3_vae,
    "sdxl_vae": tiny_sdxl_vae,
    "llama": tiny_llama_text,
    "t5": tiny_t5,
    "clip": tiny_clip_text,
    "clip_model": tiny_clip,
    "sd3_text": tiny_sd3_text,
    "dinov2": tiny_dinov2,
}


def standin(name: str, cache_dir: str | Path | None = None, **sizes: int) -> Path:
    """The folder of a stand-in, made if it does not exist; safe to call from several processes at once.

    Args:
        name: a key of `STANDINS`, optionally with sizes: `"llama?caption_channels=64"`.
        cache_dir: default `$EMMDIT_CACHE/standins`, or `~/.cache/emmdit/standins`.
        sizes: arguments of the function.
    """
    name, _, query = name.partition("?")
    if name not in STANDINS:
        raise ValueError(f"There is no stand-in '{name}': choose one of {', '.join(STANDINS)}.")
    try:
        sizes = {key: int(value) for key, value in parse_qsl(query, strict_parsing=bool(query))} | sizes
    except ValueError:
        raise ValueError(f"The sizes of the stand-in '{name}' are written '?key=1&key=2', not '?{query}'.") from None

    root = Path(cache_dir or cache_folder("standins")).expanduser()
    # A new folder whenever the sizes, this file or the libraries change.
    made_by = f"{name} {sorted(sizes.items())} {[version(p) for p in ('torch', 'diffusers', 'transformers')]}"
    folder = root / f"{name}-{hashlib.sha256(made_by.encode() + Path(__file__).read_bytes()).hexdigest()[:12]}"
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as scratch:
            made = STANDINS[name](Path(scratch, "made"), **sizes)
            try:
                made.rename(folder)  # atomic; fails if another process was faster, and then its folder is used
            except OSError:
                if not folder.is_dir():
                    raise
    return folder
