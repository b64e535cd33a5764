"""Bound scores in plain torch: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bound_scores import KeyBounds


def bound_keys(k: Tensor, key_start: int, end: int, block_size: int, span: int, bounds: KeyBounds) -> None:
    """Extend `bounds` to tokens [0, end); a part-filled last block is written but not counted as done."""
    begin = bounds.blocks * block_size
    if begin < end:
        new = k[:, :, begin - key_start : end - key_start]
        missing = (0, 0, 0, -new.shape[2] % span)
        spans = slice(begin // span, -(-end // span))
        bounds.upper[:, :, spans] = F.pad(new, missing, value=-torch.inf).unflatten(2, (-1, span)).amax(3)
        bounds.lower[:, :, spans] = F.pad(new, missing, value=torch.inf).unflatten(2, (-1, span)).amin(3)
        bounds.blocks = end // block_size


def bound_scores(
    q: Tensor,
    k: Tensor,
    query_start: int,
    block_size: int,
    group: int,
    span: int,
    scale: float,
    bounds: KeyBounds,
    key_start: int = 0,
) -> Tensor:
    """See kernels.bound_scores.bound_scores."""
    N, H, Lq, D = q.shape
    kv_heads = k.shape[1]
    bound_keys(k, key_start, query_start + Lq, block_size, span, bounds)
    n_rows, n_keys = -(-Lq // block_size), -(-(query_start + Lq) // block_size)
    scores = torch.full((N, H, n_rows, n_keys), -torch.inf, dtype=torch.float32, device=q.device)
    spans_per_block = block_size // span
    for row in range(n_rows):
        begin, end = row * block_size, min(Lq, (row + 1) * block_size)
        starts = torch.arange(begin, end, group, device=q.device)
        counts = (end - starts).clamp(max=group)
        padded = F.pad(q[:, :, begin:end].float(), (0, 0, 0, -(end - begin) % group))
        rows = (padded.unflatten(2, (-1, group)).sum(3) / counts[:, None]).mul(scale).reshape(N, kv_heads, -1, D)
        known = -(-(query_start + end) // span)
        limit = rows.clamp(min=0) @ bounds.upper[:, :, :known].float().mT
        limit += rows.clamp(max=0) @ bounds.lower[:, :, :known].float().mT
        limit = limit.unflatten(2, (H // kv_heads, len(starts)))
        behind = torch.arange(known, device=q.device) * span > (query_start + starts + counts - 1)[:, None]
        limit.masked_fill_(behind, -torch.inf)
        limit = F.pad(limit, (0, -known % spans_per_block), value=-torch.inf)
        share = limit.unflatten(-1, (-1, spans_per_block)).amax(-1).softmax(-1).flatten(1, 2)
        scores[:, :, row, : share.shape[-1]] = share.amax(2)
    return scores
