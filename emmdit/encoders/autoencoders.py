"""Image codecs on pretrained autoencoders: DC-AE (32x downsampling), and the KL autoencoders of SD3 and SDXL (8x).

Latents are the input of a denoiser: (raw - shift_factor) * scaling_factor, about unit variance. The numbers are
arguments with the published values as defaults, so that a network can be checked against its codec before anything is
loaded; when the model is loaded, they are compared with its config.
"""

from __future__ import annotations

import torch
from torch import nn

from emmdit.encoders.base import FrozenModel, ImageCodec, as_dtype, clamped, frozen


class AutoencoderCodec(FrozenModel, ImageCodec):
    """Base class of codecs on a diffusers autoencoder.

    Args:
        latent_channels, downsample: channels of the latents, pixels per latent side.
        scaling_factor, shift_factor: latents = (raw - shift_factor) * scaling_factor; scaling_factor None takes both
            numbers of the model.
        source, dtype, subfolder, revision: see `FrozenModel`.
        slicing: encode and decode the batch one image at a time (less memory).
        tiling: split large images into overlapping tiles, blended (less memory; not the same numbers as in one piece).
    """

    kind: str  # class name in diffusers

    def __init__(
        self,
        source: str,
        latent_channels: int,
        downsample: int,
        scaling_factor: float | None,
        shift_factor: float = 0.0,
        dtype: str | torch.dtype = "float32",
        slicing: bool = False,
        tiling: bool = False,
        subfolder: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__(source, dtype, subfolder, revision)
        self.latent_channels, self.downsample = latent_channels, downsample
        self._scaling_factor, self._shift_factor = scaling_factor, shift_factor
        self.slicing, self.tiling = slicing, tiling

    @property
    def scaling_factor(self) -> float:
        if self._scaling_factor is None:
            self.load()
        return self._scaling_factor  # type: ignore[return-value]

    @property
    def shift_factor(self) -> float:
        if self._scaling_factor is None:
            self.load()
        return self._shift_factor

    def components(self) -> dict[str, object]:
        """The components that a diffusers pipeline saves, by their names there."""
        return {"vae": self.model}

    def adopt(self, model: nn.Module) -> None:
        super().adopt(self._checked(model))

    def scale(self, raw: torch.Tensor) -> torch.Tensor:
        """The latents of the autoencoder (as stored in the Nitro-E shards) -> those of a denoiser."""
        return (raw - self.shift_factor) * self.scaling_factor

    def unscale(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `scale`."""
        return latents / self.scaling_factor + self.shift_factor

    def encode(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """(B,3,H,W) in [-1,1] -> scaled latents (B,C,H/d,W/d) float32. ValueError for other sides.

        `generator` is for codecs that sample their latents (`sample=True`); default torch's global one.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"{type(self).__name__} encodes images (B,3,H,W), not {tuple(images.shape)}.")
        height, width = images.shape[-2:]
        if height % self.downsample or width % self.downsample:
            fits = [max(1, side // self.downsample) * self.downsample for side in (height, width)]
            raise ValueError(
                f"{type(self).__name__} needs image sides divisible by {self.downsample}, not "
                f"{height}x{width}: resize or crop to {fits[0]}x{fits[1]}."
            )
        with frozen(self.device):
            return self.scale(self._encode(images.to(self.device, self.dtype), generator).float())

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B,C,h,w) -> images (B,3,h*d,w*d) float32, clamped to [-1,1]; an overflow is NaN."""
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"{type(self).__name__} decodes latents (B,{self.latent_channels},h,w), not {tuple(latents.shape)}."
            )
        with frozen(self.device):
            raw = self.unscale(latents.to(self.device, torch.float32)).to(self.dtype)
            return clamped(self.model.decode(raw, return_dict=False)[0].float())

    def _encode(self, images: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Images -> the latents of the autoencoder."""
        raise NotImplementedError

    def _build(self) -> nn.Module:
        import diffusers

        return self._checked(self._load(getattr(diffusers, self.kind), kinds=(self.kind,)))

    def _checked(self, model: nn.Module) -> nn.Module:
        """A loaded module, compared with the arguments of the constructor and set up."""
        config = model.config
        shift_factor = config.get("shift_factor") or 0.0
        downsample = getattr(model, "spatial_compression_ratio", None) or 2 ** (len(config["block_out_channels"]) - 1)
        self._check_argument("latent_channels", self.latent_channels, config["latent_channels"])
        self._check_argument("downsample", self.downsample, downsample)
        if self._scaling_factor is None:
            self._scaling_factor, self._shift_factor = config["scaling_factor"], shift_factor
        self._check_argument("scaling_factor", self._scaling_factor, config["scaling_factor"])
        self._check_argument("shift_factor", self._shift_factor, shift_factor)
        if self.slicing:
            model.enable_slicing()
        if self.tiling:
            model.enable_tiling()
        return model


class DCAE(AutoencoderCodec):
    """The deep-compression autoencoder of SANA and E-MMDiT: 32 channels, 32x downsampling, deterministic.

    Args:
        scaling_factor: latents = raw * scaling_factor; None takes the number of the model.
        latent_channels, downsample: see `AutoencoderCodec`, as all other arguments.
    """

    kind = "AutoencoderDC"

    def __init__(
        self,
        source: str = "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers",
        scaling_factor: float | None = 0.41407,
        latent_channels: int = 32,
        downsample: int = 32,
        **options,
    ) -> None:
        super().__init__(source, latent_channels, downsample, scaling_factor, shift_factor=0.0, **options)

    def _encode(self, images: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        return self.model.encode(images, return_dict=False)[0]


class AutoencoderKLCodec(AutoencoderCodec):
    """Any AutoencoderKL of diffusers.

    Args:
        sample: encode to a sample of the posterior instead of its mode.
        latent_channels, downsample, scaling_factor, shift_factor: see `AutoencoderCodec`, as all other arguments.
    """

    kind = "AutoencoderKL"

    def __init__(
        self,
        source: str,
        latent_channels: int = 4,
        downsample: int = 8,
        scaling_factor: float | None = None,
        shift_factor: float = 0.0,
        sample: bool = False,
        **options,
    ) -> None:
        super().__init__(source, latent_channels, downsample, scaling_factor, shift_factor, **options)
        self.sample = sample

    def _encode(self, images: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        posterior = self.model.encode(images, return_dict=False)[0]
        return posterior.sample(generator) if self.sample else posterior.mode()


class SD3VAE(AutoencoderKLCodec):
    """The autoencoder of Stable Diffusion 3 and 3.5: 16 channels, 8x downsampling."""

    def __init__(
        self,
        source: str = "stabilityai/stable-diffusion-3.5-medium",
        subfolder: str | None = "vae",
        sample: bool = False,
        **options,
    ) -> None:
        super().__init__(source, 16, 8, 1.5305, 0.0609, sample, subfolder=subfolder, **options)


class SDXLVAE(AutoencoderKLCodec):
    """The autoencoder of SDXL and PixArt-Sigma: 4 channels, 8x downsampling.

    Its activations overflow in float16 (black images), so that dtype is refused; bfloat16 and float32 are safe, and so
    is float16 with `madebyollin/sdxl-vae-fp16-fix`, whose config has `force_upcast: false`.
    """

    def __init__(
        self, source: str = "stabilityai/sdxl-vae", subfolder: str | None = None, sample: bool = False, **options
    ) -> None:
        super().__init__(source, 4, 8, 0.13025, 0.0, sample, subfolder=subfolder, **options)

    def _checked(self, model: nn.Module) -> nn.Module:
        self._refuse_float16(model, model.dtype)
        return super()._checked(model)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None) -> SDXLVAE:
        if self.loaded and dtype is not None:
            self._refuse_float16(self.model, as_dtype(dtype))
        return super().to(device, dtype)

    def _refuse_float16(self, model: nn.Module, dtype: torch.dtype) -> None:
        if dtype == torch.float16 and model.config.force_upcast:
            raise ValueError(
                f"The autoencoder in '{self.source}' overflows in float16: set dtype to bfloat16 or float32, "
                f"or source to madebyollin/sdxl-vae-fp16-fix."
            )
