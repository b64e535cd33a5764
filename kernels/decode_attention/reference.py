"""Decode attention in plain torch: the specification, and what runs on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_length: int,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """See kernels.decode_attention. `max_length` is not needed here: lengths are read on the host."""
    S, H, D = q.shape
    kv_heads = k.shape[0]
    out = torch.zeros_like(q)
    for s, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        if length == 0:
            continue
        first = start if window is None else start + max(0, length - window)
        keys, values = k[:, first : start + length].float(), v[:, first : start + length].float()
        queries = q[s].float().view(kv_heads, H // kv_heads, D)
        logits = queries @ keys.mT * scale
        if sinks is not None:
            logits = torch.cat([logits, sinks.float().view(kv_heads, H // kv_heads, 1)], dim=-1)
        weights = torch.softmax(logits, dim=-1)[..., : keys.shape[1]]
        out[s] = (weights @ values).view(H, D).to(q.dtype)
    return out
