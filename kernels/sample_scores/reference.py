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
    known = query_start + Lq
    n_rows, n_keys = -(-Lq // block_size), -(-known // block_size)
    compute = torch.promote_types(q.dtype, torch.float32)
    keys = k[:, :, :known].to(compute)
    if scales is not None:
        keys = keys * scales.k[:, None, None]
    keys = pad(keys, (0, 0, 0, n_keys * block_size - known)).repeat_interleave(H // k.shape[1], dim=1)
    scores = torch.full((N, H, n_rows, n_keys), -torch.inf, device=q.device)
    for row in range(n_rows):
        first = row * block_size
        sampled = torch.arange(first, first + block_size, every, device=q.device)
        sampled = (sampled + every - 1).clamp(max=Lq - 1)[sampled < Lq]
        queries = q[:, :, sampled].to(compute)
        if scales is not None:
            queries = quantize(queries, scales.q[:, None, None]).to(compute) * scales.q[:, None, None]
        seen = query_start // block_size + row + 1
        logits = queries @ keys[:, :, : seen * block_size].mT * scale
        position = torch.arange(seen * block_size, device=q.device)
        logits.masked_fill_(position > (query_start + sampled)[:, None], -torch.inf)
        peaks = logits.unflatten(-1, (seen, block_size // (2 * PEAKS), PEAKS, 2)).amax(dim=(-3, -1))
        weights = peaks.logsumexp(-1)
        shares = (weights - weights.logsumexp(-1, keepdim=True)).exp()
        scores[:, :, row, :seen] = shares.amax(2).float()
    return scores
