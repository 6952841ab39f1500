"""Hybrid joint attention of MM-EDiT (arXiv 2503.16726, section 4; papers.md A5).

Joint attention is four: image-to-image becomes linear, the three that involve the prompt stay softmax, whose cost is
linear in image tokens since the prompt's length is fixed.

    image rows   eta_I A_lin(Q_I, K_I, V_I) + (1 - eta_I) A_sm(Q_I, K_P, V_P)
    prompt rows  eta_P A_sm(Q_P, K_I, V_I)  + (1 - eta_P) A_sm(Q_P, K_P, V_P)
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emmdit.networks.edit.attention import LinearAttention, linear_attention, normed, softmax_attention
from emmdit.networks.edit.config import AttentionChoices
from emmdit.networks.edit.grids import Grids, check_grids
from emmdit.networks.emmdit.layers import Subregions, attention


class HybridAttention(LinearAttention):
    """Joint attention of image tokens (B, N, D) and prompt tokens (B, T, D).

    Beside what `LinearAttention` takes over from the teacher: `add_q_proj`, `add_k_proj`, `add_v_proj`, `norm_added_q`,
    `norm_added_k` and `to_add_out`. Where `to_add_out` is None (the last block, whose text goes nowhere), there are no
    prompt rows, nor the weights that only they would use.
    """

    subregions = Subregions("full")  # where E-MMDiT's teacher cuts its tokens, the student sees them all

    def __init__(self, teacher: Mapping[str, nn.Module | None], heads: int, choices: AttentionChoices) -> None:
        super().__init__(teacher, heads, choices)
        if self.to_add_out is None:
            self.add_q_proj = self.norm_added_q = None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        grids: Grids,
    ) -> tuple[Tensor, Tensor | None]:
        """`attention_mask` (B, T): True where a prompt token may be attended. -> image and prompt rows."""
        check_grids(hidden_states.shape[1], grids)
        q = self.queries(hidden_states, grids)
        full = self.keys_values(hidden_states, grids)
        k, v = (self.split(t) for t in self.compress(*full, grids))
        prompt_k = normed(self.norm_added_k, self.split(self.add_k_proj(encoder_hidden_states)))
        prompt_v = self.split(self.add_v_proj(encoder_hidden_states))
        prompt_q = None
        if self.add_q_proj is not None:
            prompt_q = normed(self.norm_added_q, self.split(self.add_q_proj(encoder_hidden_states)))
        mask = None if attention_mask is None else attention_mask[:, None, None, :]

        prompt = None
        if self.choices.joint != "hybrid":
            image, prompt = self._together(q, k, v, prompt_q, prompt_k, prompt_v, mask)
        else:
            normed_q, normed_k = normed(self.norm_q, q), normed(self.norm_k, k)
            linear_q, linear_k = (normed_q, normed_k) if self.normalises else (q, k)
            linear, log_sum = self.normed_image_to_image(linear_q, linear_k, v, self.choices.image_mix == "exact")
            image = self._image_rows(linear, log_sum, k.shape[-2], normed_q, prompt_k, prompt_v, mask)
            if prompt_q is not None:
                if self.choices.prompt_keys == "full":
                    k, v = (self.split(t) for t in full)
                    normed_k = normed(self.norm_k, k)
                tokens = hidden_states.shape[1]
                prompt = self._prompt_rows(prompt_q, normed_k, v, prompt_k, prompt_v, mask, tokens)
        image = self.project(self.to_out, image)
        return image, None if prompt is None else self.project(self.to_add_out, prompt)

    def _image_rows(
        self,
        linear: Tensor,
        linear_log_sum: Tensor | None,
        image_keys: int,
        q: Tensor,
        prompt_k: Tensor,
        prompt_v: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        tokens, q, prompt_k = q.shape[-2], self._rectify(q), self._rectify(prompt_k)
        if linear_log_sum is None:
            softmax = attention(q, prompt_k, prompt_v, _some(mask))
            return _mix(self._token_share(tokens, prompt_k.shape[-2], mask), linear, softmax)
        softmax, log_sum = softmax_attention(q, prompt_k, prompt_v, _some(mask))
        if mask is not None:
            log_sum = log_sum.masked_fill(~mask.any(dim=-1, keepdim=True), -math.inf)
        if self.choices.compensate:
            linear_log_sum = linear_log_sum + math.log(tokens / image_keys)
        return _mix((linear_log_sum - log_sum).sigmoid(), linear, softmax)

    def _prompt_rows(
        self, q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, mask: Tensor | None, tokens: int
    ) -> Tensor:
        q, k, prompt_k = self._rectify(q), self._rectify(k), self._rectify(prompt_k)
        if self.choices.prompt_rows == "token_share":
            share = self._token_share(tokens, prompt_k.shape[-2], mask)
            return _mix(share, attention(q, k, v), attention(q, prompt_k, prompt_v, _some(mask)))
        image = k.shape[-2]
        keys, values = torch.cat([k, prompt_k], dim=-2), torch.cat([v, prompt_v], dim=-2)
        bias = None if mask is None else F.pad(mask, (image, 0), value=True)
        if self.choices.compensate and image != tokens:
            # exp(score + log r) = r exp(score): r equal keys in place of one
            weight = torch.zeros(image + prompt_k.shape[-2], dtype=q.dtype, device=q.device)
            weight[:image] = math.log(tokens / image)
            bias = weight[None, None, None] if bias is None else weight.masked_fill(~bias, -math.inf)
        return attention(q, keys, values, bias)

    def _together(
        self, q: Tensor, k: Tensor, v: Tensor, prompt_q: Tensor | None, prompt_k: Tensor, prompt_v: Tensor, mask
    ) -> tuple[Tensor, Tensor | None]:
        """One attention over all tokens, linear or softmax: the baselines without the hybrid."""
        choices, image = self.choices, q.shape[-2]
        if choices.qk_norm or choices.joint == "softmax":
            q, k = normed(self.norm_q, q), normed(self.norm_k, k)
        queries = q if prompt_q is None else torch.cat([q, prompt_q], dim=-2)
        keys, values = torch.cat([k, prompt_k], dim=-2), torch.cat([v, prompt_v], dim=-2)
        if mask is not None:
            mask = F.pad(mask, (k.shape[-2], 0), value=True)
        if choices.joint == "softmax":
            y = attention(queries, keys, values, mask)
        else:
            keys = self.kernel(keys)
            if mask is not None:
                keys = keys * mask.transpose(-2, -1)
            y, _ = linear_attention(self.kernel(queries), keys, values, choices.eps, choices.float32)
        return y[..., :image, :], None if prompt_q is None else y[..., image:, :]

    def _rectify(self, x: Tensor) -> Tensor:
        return self.kernel(x) if self.choices.rectified and self.choices.kernel != "softmax" else x

    @staticmethod
    def _token_share(image: int, prompt: int, mask: Tensor | None) -> float | Tensor:
        """N_I / (N_I + N_T), image tokens before compression; masked prompt tokens do not count."""
        return image / (image + (prompt if mask is None else mask.sum(dim=-1, keepdim=True)))


def _mix(share: float | Tensor, a: Tensor, b: Tensor) -> Tensor:
    if isinstance(share, float):
        return torch.lerp(b.to(a.dtype), a, share)  # one pass over the tokens
    return (share * a + (1 - share) * b).to(a.dtype)


def _some(mask: Tensor | None) -> Tensor | None:
    """Softmax over no key at all is not a number; such a row gets all keys here, and no weight in the mixture."""
    return None if mask is None else mask | ~mask.any(dim=-1, keepdim=True)
