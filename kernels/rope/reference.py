"""Rotary position embedding in plain torch: the specification (transformers' apply_rotary_pos_emb)."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See kernels.rope.apply_rope."""
    return _rotate(q, cos[:, None], sin[:, None]), _rotate(k, cos[:, None], sin[:, None])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [N, H, L, D], cos, sin [N or 1, 1, L, R]."""
    R = cos.shape[-1]
    first, second = x[..., : R // 2], x[..., R // 2 : R]
    rotated = x[..., :R] * cos + torch.cat((-second, first), dim=-1) * sin
    out = torch.cat((rotated.to(x.dtype), x[..., R:]), dim=-1)
    return out.transpose(1, 2).contiguous().transpose(1, 2)
