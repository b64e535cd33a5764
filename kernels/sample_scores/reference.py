"""The scores of sampled rows in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels._common.fp8 import HeadScales, quantize

# Groups of a block's keys, each weighed by its largest logit. Key u belongs to group u // 2 % PEAKS: what one lane of a
# tensor core's accumulator holds, so that a GPU finds the maxima without exchanging anything.
PEAKS = 4


def sample_scores(
    q: Tensor, k: Tensor, query_start: int, block_size: int, every: int, scale: float, scales: HeadScales | None
) -> Tensor:
    """See kernels.sample_scores.sample_scores. A query block at a time: no more than its rows times all keys.

    Keys are ordered by group and place in the group before block, so that all sums and maxima are over leading
    dimensions: over the last one they take a CPU three times as long.
    """
    N, H, Lq, D = q.shape
    kv_heads, known = k.shape[1], query_start + Lq
    n_rows, n_keys = -(-Lq // block_size), -(-known // block_size)
    compute = torch.promote_types(q.dtype, torch.float32)
    keys = k[:, :, :known].to(compute)
    if scales is not None:
        keys = keys * scales.k[:, None, None]
    keys = by_group(pad(keys, (0, 0, 0, n_keys * block_size - known)).unflatten(2, (n_keys, block_size)), 3)
    keys = keys.movedim(2, 4).contiguous()  # [N, Hkv, PEAKS, block_size / PEAKS, n_keys, D]
    position = by_group(torch.arange(n_keys * block_size, device=q.device).unflatten(0, (n_keys, block_size)), 1)
    scores = torch.full((N, H, n_rows, n_keys), -torch.inf, device=q.device)
    for row in range(n_rows):
        first = row * block_size
        sampled = torch.arange(first, first + block_size, every, device=q.device)
        sampled = (sampled + every - 1).clamp(max=Lq - 1)[sampled < Lq]
        queries = q[:, :, sampled].to(compute)
        if scales is not None:
            queries = quantize(queries, scales.q[:, None, None]).to(compute) * scales.q[:, None, None]
        queries = (queries * scale).unflatten(1, (kv_heads, -1))
        own = query_start // block_size + row  # the rows' own block, the only one with keys behind some of them
        logits = queries.flatten(2, 3)[:, :, None, None] @ keys[..., : own + 1, :].mT
        logits = logits.unflatten(4, queries.shape[2:4])  # [N, Hkv, PEAKS, place, H / Hkv, sampled, seen]
        hidden = position[own, :, :, None, None] > query_start + sampled
        logits[..., own].masked_fill_(hidden, -torch.inf)
        peaks = logits.amax(3)
        weights = (peaks - peaks.amax((2, 5), keepdim=True)).exp()
        shares = weights.sum(2) / weights.sum((2, 5))[..., None]
        scores[:, :, row, : own + 1] = shares.amax(3).flatten(1, 2).float()
    return scores


def by_group(keys: Tensor, dim: int) -> Tensor:
    """keys [.., block_size, ..] at `dim` -> [.., PEAKS, block_size / PEAKS, ..]."""
    return keys.unflatten(dim, (-1, PEAKS, 2)).movedim(dim + 1, dim).flatten(dim + 1, dim + 2)
