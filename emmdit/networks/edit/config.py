"""Configuration of a linear attention student; the defaults are EDiT and MM-EDiT (arXiv 2503.16726).

[paper] marks what is reported of the paper: docs/papers.md says by whom (A1 to A8); [ours] what is left open, with the
reason. Points that no experiment varies are constants, marked where they stand, in `attention.py` and `hybrid.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_type_hints

from emmdit.legacy import modernize_attention

# What the paper's tables compare with, as the fields that differ from its own form; further fields may be changed.
BASELINES: dict[str, dict[str, Any]] = {
    "edit": {},
    # Linear attention with nothing around it; on an MM-DiT all four parts are linear ("Linear MM-DiT-alpha").
    "linear": dict(query="linear", key="linear", value="linear"),
    # SANA (arXiv 2410.10629): the same, and convolutions in the feed-forward (Mix-FFN).
    "sana": dict(query="linear", key="linear", value="linear"),
    # LinFusion (arXiv 2409.02097): a nonlinear map of each token before queries and keys, and elu + 1 for ReLU.
    "linfusion": dict(query="mlp", key="mlp", value="linear"),
    # PixArt-Sigma's own KV compression (arXiv 2403.04692): softmax over keys and values averaged 2 x 2.
    "kv_compression": dict(query="linear"),
}


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig:
    """How `linearize` replaces attention.

    Args:
        query: what image tokens go through before `to_q`: "conv_fusion" [paper], "linear" (nothing), or "mlp"
            (LinFusion's token map).
        key: "compressor" behind `to_k` [paper]; or before it "conv_fusion", "linear" (nothing) or "mlp", as in the
            paper's ablation (docs/papers.md, A8b).
        value: "compressor" behind `to_v` [paper] or "linear". Keys and values are compressed both or neither.
        image_mix: weight eta_I of the linear part in the image rows of joint attention: "token_share", N_I / (N_I +
            N_T) [paper], or "exact", its share of the two normalizers, which needs the N_I x N_T scores [paper: its
            ablation].
        baseline: the form that the fields change, one of `BASELINES`; "edit" is the paper's.
    """

    query: Literal["conv_fusion", "mlp", "linear"] = "conv_fusion"
    key: Literal["compressor", "conv_fusion", "mlp", "linear"] = "compressor"
    value: Literal["compressor", "linear"] = "compressor"
    image_mix: Literal["token_share", "exact"] = "token_share"
    baseline: Literal["edit", "linear", "sana", "linfusion", "kv_compression"] = "edit"

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> LinearAttentionConfig:
        """From a mapping of fields, or the config of a student, also one that an older version saved.

        Raises:
            ValueError: with one sentence for an unknown name or value, or fields that contradict each other.
        """
        given = modernize_attention(fields)
        baseline = given.setdefault("baseline", "edit")
        if baseline not in BASELINES:
            raise ValueError(f"There is no baseline {baseline!r}: choose one of {', '.join(BASELINES)}.")
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(f"Attention has no option {unknown[0]!r}: choose among {', '.join(names)}.")
        return cls(**BASELINES[baseline] | given)

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if getattr(self, name) not in get_args(hint):
                raise ValueError(f"{name} must be one of {', '.join(get_args(hint))}, got {getattr(self, name)!r}.")
        if (self.key == "compressor") != (self.value == "compressor"):
            raise ValueError(
                f"Keys and values must have equal counts, but key is {self.key!r} and value {self.value!r}: set both "
                'or neither to "compressor".'
            )
        if "mlp" in (self.query, self.key) and self.baseline != "linfusion":
            raise ValueError(f'query and key "mlp" belong to the baseline "linfusion", not {self.baseline!r}.')
        if self.image_mix == "exact" and self.baseline != "edit":
            raise ValueError(f'image_mix "exact" belongs to the hybrid form, not to the baseline {self.baseline!r}.')
