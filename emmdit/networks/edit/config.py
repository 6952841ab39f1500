"""Every choice of a linear attention student in one place; the defaults are EDiT and MM-EDiT (arXiv 2503.16726).

Marked [paper]: stated there. Marked [ours]: the papers leave it open (facts: papers.md A1-A6, C1-C3); the reason
stands beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_type_hints

BASELINES: dict[str, dict[str, Any]] = {
    # What the papers' tables compare with; each is a set of choices, and any choice beside it still holds.
    "edit": {},
    # Linear attention with nothing around it; on an MM-DiT all four parts are linear ("Linear MM-DiT-alpha").
    "linear": dict(query="linear", key="linear", value="linear", joint="linear"),
    # SANA (arXiv 2410.10629): plain linear attention, and convolutions in the feed-forward in their place.
    "sana": dict(query="linear", key="linear", value="linear", joint="linear", feed_forward="mix"),
    # LinFusion (arXiv 2409.02097): a non-linear map of each token by itself before queries and keys, and elu + 1.
    "linfusion": dict(query="mlp", key="mlp", value="linear", kernel="elu", joint="linear"),
    # PixArt-Sigma's own KV compression (arXiv 2403.04692): softmax over keys and values averaged 2 x 2.
    "kv_compression": dict(
        query="linear",
        kernel="softmax",
        joint="softmax",
        compressor_kernel=2,
        compressor_shared=True,
        compressor_norm=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class AttentionChoices:
    """How `linearize` replaces attention.

    Queries, keys and values of the image:
        query: what the tokens go through before `to_q`: "conv_fusion" [paper], "mlp" (LinFusion), "linear" (nothing).
        key: "compressor" (after `to_k`) [paper], or before it "conv_fusion", "mlp", "linear" (ablations A8b).
        value: "compressor" [paper] or "linear". Keys and values are compressed both or neither.
        kernel: feature map of the image-to-image part: "relu" [paper], "elu" (elu + 1, LinFusion), or "softmax" for
            plain attention on the same queries, keys and values.
        eps: beside the normaliser q . mean(k), which ReLU can make zero [ours: LinFusion's 1e-4].
        float32: sum over tokens in float32 whatever the autocast [ours: bf16 sums lose small keys].
        qk_norm: the teacher's norm of queries and keys (if it has one) holds in the linear part too [ours].

    ConvFusion, x + conv_b(act(norm(conv_a(x)))):
        conv_fusion_form: "v2": norm before activation, and `to_q` behind the sum; "v1": activation before norm, and no
            `to_q` (two accounts of the paper differ; only v2 can take the teacher's weights) [ours].
        conv_fusion_ratio: width / width of the middle [ours: 8 costs about one more Linear of the block's fourteen and
            fits the published speed at 1024 px; 4 would double that].
        conv_fusion_groups: GroupNorm groups; their greatest common divisor with the middle width is used [ours].
        conv_fusion_kernel: side of conv_a [paper: 3].
        negative_slope: of the LeakyReLU [ours: torch's default].
        zero_init: the branch of ConvFusion and MLP starts at zero, the queries as the teacher's [ours].

    Spatial Compressor, a depthwise convolution:
        compressor_kernel, compressor_stride: side and stride [paper: 3, 2].
        compressor_init: "average" (1 / k^2, as PixArt-Sigma's) or "delta" (picks the centre) [ours].
        compressor_shared: one for keys and values [ours: no].
        compressor_norm: LayerNorm behind it (PixArt-Sigma's) [paper: none is written].

    Joint attention (MM-DiTs):
        joint: "hybrid" [paper], "linear" (all four parts by the kernel) or "softmax" (one, over compressed keys).
        image_mix: weight of the linear part in the image rows: "token_share", N_I / (N_I + N_T) [paper], or "exact",
            its share of the two normalisers (computes the N_I x N_T scores explicitly).
        prompt_rows: "joint", one softmax over image and prompt keys, which is the exact mixture [ours: the same formula
            with the exact share, and the cheapest]; or "token_share".
        prompt_keys: image keys and values that prompt queries see: "compressed" [ours: the paper defines one set] or
            "full".
        rectified: the softmax parts take queries and keys behind the kernel's ReLU [ours: no, nearer to the teacher].
        compensate: a compressed key counts as the tokens it stands for, in "joint" and "exact" [ours: no, as written].
        second_attention: SD3.5's image-only attention: "linear" [ours: it is image-to-image] or "teacher".

    Elsewhere:
        feed_forward: "teacher" [paper] or "mix" (SANA's Mix-FFN on the image tokens).
        mix_ratio: its hidden width in units of the width (SANA: 2.5).
        layers: blocks to replace, counted from 0; None: all [paper].
    """

    query: Literal["conv_fusion", "mlp", "linear"] = "conv_fusion"
    key: Literal["compressor", "conv_fusion", "mlp", "linear"] = "compressor"
    value: Literal["compressor", "linear"] = "compressor"
    kernel: Literal["relu", "elu", "softmax"] = "relu"
    eps: float = 1e-4
    float32: bool = True
    qk_norm: bool = True
    conv_fusion_form: Literal["v2", "v1"] = "v2"
    conv_fusion_ratio: int = 8
    conv_fusion_groups: int = 32
    conv_fusion_kernel: int = 3
    negative_slope: float = 0.01
    zero_init: bool = True
    compressor_kernel: int = 3
    compressor_stride: int = 2
    compressor_init: Literal["average", "delta"] = "average"
    compressor_shared: bool = False
    compressor_norm: bool = False
    joint: Literal["hybrid", "linear", "softmax"] = "hybrid"
    image_mix: Literal["token_share", "exact"] = "token_share"
    prompt_rows: Literal["joint", "token_share"] = "joint"
    prompt_keys: Literal["compressed", "full"] = "compressed"
    rectified: bool = False
    compensate: bool = False
    second_attention: Literal["linear", "teacher"] = "linear"
    feed_forward: Literal["teacher", "mix"] = "teacher"
    mix_ratio: float = 2.5
    layers: Sequence[int] | None = None

    @classmethod
    def of(cls, choices: Mapping[str, Any]) -> AttentionChoices:
        """From a mapping, which may name a `baseline` that the other choices start from.

        Raises:
            ValueError: with one sentence for an unknown name or value, or choices that contradict each other.
        """
        given = dict(choices)
        baseline = given.pop("baseline", "edit")
        if baseline not in BASELINES:
            raise ValueError(f"There is no baseline {baseline!r}: choose one of {', '.join(BASELINES)}.")
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(
                f"There is no choice {unknown[0]!r} of attention: choose among baseline, {', '.join(names)}."
            )
        return cls(**BASELINES[baseline] | given)

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, allowed = getattr(self, name), get_args(hint)
            if getattr(hint, "__origin__", None) is Literal and value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
            if hint is int and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
            if hint is bool and not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {value!r}.")
        if (self.key == "compressor") != (self.value == "compressor"):
            raise ValueError(
                f"Keys and values must have equal counts, but key is {self.key!r} and value {self.value!r}: set both "
                'or neither to "compressor".'
            )
        if self.conv_fusion_kernel % 2 == 0:
            raise ValueError(f"conv_fusion_kernel must be odd to keep the grid, got {self.conv_fusion_kernel}.")
        if self.eps < 0:
            raise ValueError(f"eps must not be negative, got {self.eps}.")
        if self.kernel == "softmax" and self.joint == "linear":
            raise ValueError(
                'joint "linear" needs the kernel "relu" or "elu": softmax over all tokens is joint "softmax".'
            )

    def as_config(self) -> dict[str, Any]:
        """All of them, as plain values for a network's config."""
        return dataclasses.asdict(self) | {"layers": None if self.layers is None else list(self.layers)}

    def replaces(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers
