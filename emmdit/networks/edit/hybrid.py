"""Hybrid joint attention of MM-EDiT (arXiv 2503.16726; docs/papers.md, A5).

Joint attention has four parts. Image-to-image becomes linear; the three that involve the prompt stay softmax, whose
cost is linear in image tokens since the prompt's length is fixed.

    image rows   eta_I A_lin(Q_I, K_I, V_I) + (1 - eta_I) A_sm(Q_I, K_P, V_P)
    prompt rows  eta_P A_sm(Q_P, K_I, V_I)  + (1 - eta_P) A_sm(Q_P, K_P, V_P)

eta_I = N_I / (N_I + N_P), with image tokens before compression [paper].

eta_P is the exact share of the image keys in the softmax normalizer, with which the prompt rows are one softmax over
image and prompt keys [ours: the same formula, and the cheapest].

The softmax parts take queries and keys before ReLU [ours: nearer to the teacher], and the same compressed image keys
and values as the linear part [ours: the paper defines one set]. [paper] marks what is reported of the paper:
docs/papers.md says by whom.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emmdit.networks.edit.attention import LinearAttention, linear_attention, merge_heads
from emmdit.networks.edit.config import LinearAttentionConfig
from emmdit.networks.edit.grids import Grids, check_grids
from emmdit.networks.emmdit.layers import Subregions


class HybridAttention(LinearAttention):
    """Joint attention of image tokens (B, N, D) and prompt tokens (B, T, D).

    Beside the modules of `LinearAttention` it takes the teacher's `add_q_proj`, `add_k_proj`, `add_v_proj`,
    `norm_added_q`, `norm_added_k` and `to_add_out`. Where `to_add_out` is None (the last block, whose prompt goes
    nowhere), there are no prompt rows, nor the weights that only they would use.
    """

    subregions = Subregions("full")  # where E-MMDiT's own attention cuts its tokens, this one sees all of them

    def __init__(self, teacher: Mapping[str, nn.Module | None], heads: int, config: LinearAttentionConfig) -> None:
        super().__init__(teacher, heads, config)
        if teacher.get("to_add_out") is None:
            self.add_q_proj = self.norm_added_q = None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        grids: Grids,
    ) -> tuple[Tensor, Tensor | None]:
        """`attention_mask` (B, T): True where a prompt token may be attended to. -> image and prompt rows."""
        x, c, mask = hidden_states, encoder_hidden_states, attention_mask
        check_grids(x.shape[1], grids)
        q_i, k_i, v_i = self.queries(x, grids), self.keys(x, grids), self.values(x, grids)
        k_p, v_p, q_p = self.prompt_keys(c), self.prompt_values(c), self.prompt_queries(c)

        eta_i = token_share(q_i, k_p, mask)
        a_linear = linear_attention(F.relu(q_i), F.relu(k_i), v_i)
        a_softmax = softmax_attention(q_i, k_p, v_p, mask)
        image = self.to_out(merge_heads(mixture(eta_i, a_linear, a_softmax)))
        if q_p is None:
            return image, None
        # With the exact eta_p both terms are one softmax, over image and prompt keys.
        prompt = softmax_attention(q_p, join(k_i, k_p), join(v_i, v_p), with_image_keys(mask, k_i))
        return image, self.to_add_out(merge_heads(prompt))

    def prompt_queries(self, c: Tensor) -> Tensor | None:
        """(B, T, D) -> (B, heads, T, d)."""
        return None if self.add_q_proj is None else self.norm_added_q(self.split_heads(self.add_q_proj(c)))

    def prompt_keys(self, c: Tensor) -> Tensor:
        """(B, T, D) -> (B, heads, T, d)."""
        return self.norm_added_k(self.split_heads(self.add_k_proj(c)))

    def prompt_values(self, c: Tensor) -> Tensor:
        """(B, T, D) -> (B, heads, T, d)."""
        return self.split_heads(self.add_v_proj(c))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (B, heads, N, d), k and v (B, heads, M, d), mask (B, M) True where a key may be attended to.

    Where a mask leaves no key, all count, since softmax over nothing is NaN: `token_share` gives that part no weight.
    """
    if mask is not None:
        mask = (mask | ~mask.any(dim=-1, keepdim=True))[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def token_share(q_i: Tensor, k_p: Tensor, mask: Tensor | None) -> float | Tensor:
    """N_I / (N_I + N_P); masked prompt tokens do not count."""
    n_i, n_p = q_i.shape[-2], k_p.shape[-2]
    return n_i / (n_i + (n_p if mask is None else mask.sum(dim=-1)[:, None, None, None]))


def mixture(share: float | Tensor, a: Tensor, b: Tensor) -> Tensor:
    """share a + (1 - share) b, in the dtype of a."""
    if isinstance(share, float):
        return torch.lerp(b.to(a.dtype), a, share)  # one pass over the tokens
    return (share * a + (1 - share) * b).to(a.dtype)


def join(image: Tensor, prompt: Tensor) -> Tensor:
    """(B, heads, M, d), (B, heads, T, d) -> (B, heads, M + T, d)."""
    return torch.cat([image, prompt], dim=-2)


def with_image_keys(mask: Tensor | None, k_i: Tensor) -> Tensor | None:
    """The mask of prompt keys (B, T) -> of image and prompt keys (B, M + T)."""
    return None if mask is None else F.pad(mask, (k_i.shape[-2], 0), value=True)
