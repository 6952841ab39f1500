"""Types shared by flow, encoders, losses and generation."""

from __future__ import annotations

from torch import Tensor

Condition = dict[str, Tensor]
"""Keyword arguments of a denoiser beside latents and timestep, batch first: `encoder_hidden_states` (B, T, D) always;
`encoder_attention_mask` (B, T) bool, True for a real token, and `pooled_projections` (B, P) where the network takes
them."""
