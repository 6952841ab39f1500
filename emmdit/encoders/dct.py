"""Block-DCT image codec: no learned weights, exactly invertible up to the coefficients it drops.

Each block of each YCbCr channel goes through an orthonormal DCT-II; `channels` of the 3 * block_size**2 coefficients
are kept and normalized. With 4x4 blocks and 32 channels an image of 32x32 px becomes 32x8x8, with the channel count of
DC-AE f32.
"""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from emmdit.encoders.base import ImageCodec, as_dtype, clamped, frozen

LARGEST_BLOCK = 32  # a block is one vector, and its transform a matrix of 3072 x 3072
# BT.601, as in JPEG; images are in [-1, 1], so there is no offset for chroma.
RGB_TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))

# Measured on 20,000 renders of the default shapes world with `python -m assets.recipes.measure_dct`.
# Coefficient = component * 16 + vertical frequency * 4 + horizontal frequency (component 0 Y, 1 Cb, 2 Cr),
# largest RGB energy first.
# fmt: off
ORDER_4 = (
    0, 16, 32, 1, 4, 17, 20, 5, 33, 36, 2, 8,
    21, 6, 9, 18, 24, 37, 3, 12, 34, 40, 10, 22,
    25, 7, 13, 38, 41, 19, 28, 35, 44, 14, 11, 26,
    42, 23, 29, 39, 15, 45, 30, 27, 46, 43, 31, 47,
)
MEAN_4 = (
    2.0204, -0.0247, 0.0688, 0.0003, 0.0008, 0.0001, 0.0002, -0.0000, -0.0000, -0.0001, 0.0022, 0.0018,
    0.0000, -0.0000, 0.0000, 0.0001, 0.0000, 0.0000, -0.0001, -0.0004, -0.0002, -0.0003, 0.0000, 0.0000,
    0.0000, 0.0000, 0.0000, -0.0000, -0.0000, -0.0000, -0.0001, 0.0000, 0.0001, 0.0000, 0.0000, -0.0000,
    -0.0000, -0.0000, 0.0000, -0.0000, -0.0000, -0.0000, -0.0000, -0.0000, 0.0000, 0.0000, -0.0000, -0.0000,
)
STD_4 = (
    1.2329, 0.6265, 0.5976, 0.3997, 0.3977, 0.1817, 0.1811, 0.1724, 0.1740, 0.1733, 0.1556, 0.1529,
    0.0788, 0.0818, 0.0814, 0.0704, 0.0692, 0.0754, 0.0655, 0.0647, 0.0674, 0.0663, 0.0441, 0.0374,
    0.0373, 0.0362, 0.0345, 0.0358, 0.0356, 0.0297, 0.0294, 0.0285, 0.0282, 0.0223, 0.0216, 0.0202,
    0.0193, 0.0166, 0.0158, 0.0158, 0.0140, 0.0151, 0.0102, 0.0099, 0.0097, 0.0095, 0.0064, 0.0061,
)
# fmt: on


class BlockDCT(ModelMixin, ConfigMixin):
    """Images (B, 3, H, W) in [-1, 1] <-> normalized coefficients (B, channels, H / block, W / block).

    Args:
        block_size: side of a block in pixels.
        channels: coefficients to keep, at most 3 * block_size**2. For 4x4 blocks these are the first of `ORDER_4`, else
            those of lowest frequency (vertical + horizontal, chroma counted one step higher).
        latents_mean, latents_std: one number per channel; default those of the shapes world (4x4 blocks only; for other
            sizes or images use `BlockDCT.fitted`).
        whitening: the exponent of std that is divided out; then one global factor makes the overall variance 1.
            1 = every channel has unit variance, 0 = the natural spectrum.
    """

    @register_to_config
    def __init__(
        self,
        block_size: int = 4,
        channels: int = 32,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        whitening: float = 1.0,
    ) -> None:
        super().__init__()
        if not 1 <= block_size <= LARGEST_BLOCK:
            raise ValueError(f"BlockDCT takes a block_size from 1 to {LARGEST_BLOCK}, got {block_size}.")
        if not 1 <= channels <= 3 * block_size**2:
            raise ValueError(
                f"BlockDCT with block_size={block_size} has {3 * block_size**2} coefficients, so channels cannot be "
                f"{channels}."
            )
        if (latents_mean is None) != (latents_std is None):
            raise ValueError("BlockDCT needs both latents_mean and latents_std, or neither.")
        if latents_mean is None:
            if block_size != 4:
                raise ValueError(
                    f"BlockDCT has statistics of 4x4 blocks only: for block_size={block_size} pass latents_mean and "
                    "latents_std, or call BlockDCT.fitted(images, ...)."
                )
            latents_mean, latents_std = list(MEAN_4[:channels]), list(STD_4[:channels])
            self.register_to_config(latents_mean=latents_mean, latents_std=latents_std)
        if len(latents_mean) != channels or len(latents_std) != channels or min(latents_std) <= 0:
            raise ValueError(f"BlockDCT needs {channels} latents_mean and {channels} positive latents_std.")

        # Each direction is one affine map, built in float64.
        kept = coefficient_order(block_size)[:channels]
        std = torch.tensor(latents_std, dtype=torch.float64)
        mean = torch.tensor(latents_mean, dtype=torch.float64)
        gain = std**-whitening
        gain = gain / ((std * gain) ** 2).mean().sqrt()
        analysis, synthesis = block_matrices(block_size)
        # Persistent, so that `save_pretrained` has tensors to save and `from_pretrained` restores them.
        self.register_buffer("analysis", (analysis[:, kept] * gain).float())
        self.register_buffer("analysis_bias", (-mean * gain).float())
        self.register_buffer("synthesis", (synthesis[kept] / gain[:, None]).float())
        self.register_buffer("synthesis_bias", (mean @ synthesis[kept]).float())

    @classmethod
    def fitted(cls, images: torch.Tensor, block_size: int = 4, channels: int = 32, whitening: float = 1.0) -> BlockDCT:
        """The codec with the statistics of `images` (N, 3, H, W) in [-1, 1]."""
        analysis, _ = block_matrices(block_size)
        kept = coefficient_order(block_size)[:channels]
        coefficients = fold_blocks(images.double(), block_size).flatten(0, 2) @ analysis[:, kept]
        mean, std = coefficients.mean(dim=0), coefficients.std(dim=0).clamp_min(1e-3)
        return cls(block_size, channels, mean.tolist(), std.tolist(), whitening)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> (B, channels, H / block_size, W / block_size)."""
        blocks = fold_blocks(images.to(self.analysis), self.config.block_size)
        rows = torch.addmm(self.analysis_bias, blocks.flatten(0, 2), self.analysis)
        return rows.unflatten(0, blocks.shape[:3]).permute(0, 3, 1, 2).contiguous()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, channels, h, w) -> images (B, 3, h * block_size, w * block_size), not clamped."""
        if latents.ndim != 4 or latents.shape[1] != self.config.channels:
            raise ValueError(f"BlockDCT decodes latents (B, {self.config.channels}, h, w), got {tuple(latents.shape)}.")
        n = self.config.block_size
        b, _, h, w = latents.shape
        rows = latents.to(self.synthesis).permute(0, 2, 3, 1).flatten(0, 2)
        blocks = torch.addmm(self.synthesis_bias, rows, self.synthesis).view(b, h, w, 3, n, n)
        return blocks.permute(0, 3, 1, 4, 2, 5).reshape(b, 3, h * n, w * n)


class DCTCodec(ImageCodec):
    """The `ImageCodec` of a `BlockDCT` (see there for the arguments): frozen, no grad, clamped.

    `model` replaces `BlockDCT(block_size, channels, whitening=whitening)`.
    """

    def __init__(
        self, block_size: int = 4, channels: int = 32, whitening: float = 1.0, model: BlockDCT | None = None
    ) -> None:
        self.model = (model or BlockDCT(block_size, channels, whitening=whitening)).eval().requires_grad_(False)
        self.latent_channels: int = self.model.config.channels
        self.downsample: int = self.model.config.block_size

    def components(self) -> dict[str, object]:
        """The components that a diffusers pipeline saves, by their names there."""
        return {"vae": self.model}

    def adopt(self, model: BlockDCT) -> None:
        """Use a loaded module in place of the present one."""
        self.__init__(model=model)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None) -> DCTCodec:
        if device is not None:
            self.model.to(device)
        if dtype is not None:  # diffusers warns about every `dtype=` argument, even None
            self.model.to(as_dtype(dtype))
        return self

    @property
    def device(self) -> torch.device:
        return self.model.analysis.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.analysis.dtype

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents (B, C, H / block, W / block), float32."""
        with frozen(self.device):
            return self.model.encode(images).float()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents -> images (B, 3, H, W) clamped to [-1, 1], float32; an overflow is NaN."""
        with frozen(self.device):
            return clamped(self.model.decode(latents).float())


def fold_blocks(images: torch.Tensor, n: int) -> torch.Tensor:
    """(B, 3, H, W) -> (B, H / n, W / n, 3 * n * n), each block as (component, row, column)."""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % n or images.shape[3] % n:
        raise ValueError(
            f"BlockDCT encodes images (B, 3, H, W) with H and W multiples of {n}, got {tuple(images.shape)}."
        )
    b, _, height, width = images.shape
    blocks = images.reshape(b, 3, height // n, n, width // n, n)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(b, height // n, width // n, 3 * n * n)


def block_matrices(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(analysis, synthesis), float64 (3n^2, 3n^2), inverse of each other: block @ analysis = coefficients."""
    k = torch.arange(n, dtype=torch.float64)
    dct = torch.cos(math.pi / (2 * n) * k[:, None] * (2 * k[None, :] + 1)) * math.sqrt(2 / n)
    dct[0] /= math.sqrt(2)
    color = torch.tensor(RGB_TO_YCBCR, dtype=torch.float64)
    dct2 = torch.kron(dct, dct)
    return torch.kron(color, dct2).T.contiguous(), torch.kron(torch.linalg.inv(color), dct2.T).T.contiguous()


def coefficient_order(n: int) -> list[int]:
    """All 3n^2 coefficients, the most important first (see `BlockDCT`)."""
    if n == 4:
        return list(ORDER_4)
    indices = range(3 * n * n)
    return sorted(indices, key=lambda i: (i % (n * n) // n + i % n + (i >= n * n), i % (n * n), i))
