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
    """See kernels.sample_scores.sample_scores. A query block at a time: no more than its rows times all keys."""
    N, H, Lq, D = q.shape
    kv_heads, known = k.shape[1], query_start + Lq
    n_rows, n_keys = -(-Lq // block_size), -(-known // block_size)
    compute = torch.promote_types(q.dtype, torch.float32)
    keys = k[:, :, :known].to(compute)
    if scales is not None:
        keys = keys * scales.k[:, None, None]
    keys = pad(keys, (0, 0, 0, n_keys * block_size - known))
    # The keys by their place in the block: on a CPU maxima over outer dimensions are many times as fast.
    keys = keys.unflatten(2, (n_keys, block_size)).permute(0, 1, 3, 4, 2).contiguous()  # [N, Hkv, place, D, n_keys]
    scores = torch.full((N, H, n_rows, n_keys), -torch.inf, device=q.device)
    for row in range(n_rows):
        first = row * block_size
        sampled = torch.arange(first, first + block_size, every, device=q.device)
        sampled = (sampled + every - 1).clamp(max=Lq - 1)[sampled < Lq]
        queries = q[:, :, sampled].to(compute)
        if scales is not None:
            queries = quantize(queries, scales.q[:, None, None]).to(compute) * scales.q[:, None, None]
        seen = query_start // block_size + row + 1
        # Heads of one KV head are stacked as further rows, so that keys are not repeated.
        stacked = queries.reshape(N, kv_heads, 1, -1, D) * scale
        logits = (stacked @ keys[..., :seen]).unflatten(3, (H // kv_heads, len(sampled)))
        later = torch.arange(block_size, device=q.device)[:, None] > sampled - first
        logits[..., -1].masked_fill_(later[:, None], -torch.inf)  # of their own block alone
        peaks = logits.unflatten(2, (block_size // (2 * PEAKS), PEAKS, 2)).amax(dim=4).amax(dim=2)
        weights = (peaks - peaks.amax(dim=(2, -1), keepdim=True)).exp_().sum(dim=2)
        shares = weights / weights.sum(-1, keepdim=True)
        scores[:, :, row, :seen] = shares.amax(3).flatten(1, 2).float()
    return scores
