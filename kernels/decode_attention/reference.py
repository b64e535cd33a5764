"""Decode attention in plain torch: the specification, and what runs on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common.prefixes import Prefixes


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
    prefixes: Prefixes | None = None,
) -> Tensor:
    """See kernels.decode_attention. `max_length` is not needed here: lengths are read on the host.

    A row with a prefix attends to the keys of both places laid behind one another.
    """
    S, H, D = q.shape
    kv_heads = k.shape[0]
    out = torch.zeros_like(q)
    prefix_starts, prefix_lengths = [0] * S, [0] * S
    if prefixes is not None:
        prefix_starts, prefix_lengths = prefixes.starts.tolist(), prefixes.lengths.tolist()
    rows = zip(prefix_starts, prefix_lengths, starts.tolist(), lengths.tolist(), strict=True)
    for s, (prefix_start, prefix_length, start, length) in enumerate(rows):
        if prefix_length + length == 0:
            continue
        unseen = 0 if window is None else max(0, prefix_length + length - window)
        seen = slice(start + max(0, unseen - prefix_length), start + length)
        keys, values = k[:, seen], v[:, seen]
        if unseen < prefix_length:
            before = slice(prefix_start + unseen, prefix_start + prefix_length)
            keys, values = torch.cat([k[:, before], keys], dim=1), torch.cat([v[:, before], values], dim=1)
        keys, values = keys.float(), values.float()
        queries = q[s].float().view(kv_heads, H // kv_heads, D)
        logits = queries @ keys.mT * scale
        if sinks is not None:
            logits = torch.cat([logits, sinks.float().view(kv_heads, H // kv_heads, 1)], dim=-1)
        weights = torch.softmax(logits, dim=-1)[..., : keys.shape[1]]
        out[s] = (weights @ values).view(H, D).to(q.dtype)
    return out
