"""Block scores in plain torch: the specification.

Sums that decide ties are made in float64 and one query block at a time, so that the result does not depend on how the
prompt was cut into chunks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.oam_scores import KeySummary

# Keeps the logarithm of an all-zero value group finite.
MIN_NORM = 1e-6
STD_EPS = 1e-6


def _offset_sums(x: Tensor, block_size: int, stride: int) -> Tensor:
    """x [N, H, L, D] -> float32 [N, H, blocks, stride, D]: sums of the tokens t with t % stride == offset."""
    padded = F.pad(x.double(), (0, 0, 0, -x.shape[2] % block_size))
    return padded.unflatten(2, (-1, block_size // stride, stride)).sum(3).float()


def _offset_counts(length: int, block_size: int, stride: int, device: torch.device) -> Tensor:
    """float64 [ceil(length / block_size), stride]: how many tokens each offset sum is made of."""
    exists = torch.ones(1, 1, length, 1, device=device)
    return _offset_sums(exists, block_size, stride)[0, 0, :, :, 0].double()


def _group_log_norms(v: Tensor, block_size: int, stride: int) -> Tensor:
    """v [N, Hkv, L, D] -> float32 [N, Hkv, blocks, block_size / stride], NaN where the group is not complete."""
    norms = torch.linalg.vector_norm(v.float(), dim=-1)
    norms = F.pad(norms, (0, -v.shape[2] % block_size), value=torch.nan)
    # amax hands a NaN on, which marks the group as not complete.
    return norms.unflatten(2, (-1, block_size // stride, stride)).amax(-1).clamp(min=MIN_NORM).log()


def _value_term(log_norms: Tensor) -> Tensor:
    """log_norms [N, Hkv, n, groups] -> float64 [N, Hkv, n]: mean of max(0, z) over the groups of a block."""
    x = log_norms.double()
    exists = ~x.isnan()
    x = x.nan_to_num(0.0)
    count = exists.sum(-1).cumsum(-1).clamp(min=1)
    mean = x.sum(-1).cumsum(-1) / count
    variance = ((x * x).sum(-1).cumsum(-1) / count - mean * mean).clamp(min=0.0)
    z = (x - mean[..., None]) / (variance.sqrt()[..., None] + STD_EPS)
    z = z.clamp(min=0.0).masked_fill(~exists, 0.0)
    return z.sum(-1) / exists.sum(-1).clamp(min=1)


def summarise_keys(
    k: Tensor, v: Tensor, key_start: int, end: int, block_size: int, stride: int, summary: KeySummary
) -> None:
    """Extend `summary` to tokens [0, end); a part-filled last block is written but not counted as done."""
    first = summary.blocks
    begin = first * block_size
    if begin < end:
        last = -(-end // block_size)
        new = slice(begin - key_start, end - key_start)
        summary.key_sums[:, :, first:last] = _offset_sums(k[:, :, new], block_size, stride)
        summary.log_norms[:, :, first:last] = _group_log_norms(v[:, :, new], block_size, stride)
        summary.blocks = end // block_size


def oam_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start: int,
    block_size: int,
    stride: int,
    value_weight: float,
    scale: float,
    summary: KeySummary,
    key_start: int = 0,
    fill_above: bool = True,
) -> Tensor:
    """See kernels.oam_scores.oam_scores."""
    end = query_start + q.shape[2]
    n_keys, first_row = -(-end // block_size), query_start // block_size
    summarise_keys(k, v, key_start, end, block_size, stride, summary)
    kv_head = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // k.shape[1])
    # Key offsets are reversed, so that equal places of the two flattened sums form the antidiagonal pairs.
    key_sums = summary.key_sums[:, :, :n_keys].flip(3).double().flatten(3)
    query_sums = _offset_sums(q, block_size, stride).double().flatten(3)
    pairs = (
        _offset_counts(q.shape[2], block_size, stride, q.device)
        @ _offset_counts(end, block_size, stride, q.device).flip(1).T
    )
    value = value_weight * _value_term(summary.log_norms[:, :, :n_keys])

    scores = torch.full((*q.shape[:2], query_sums.shape[2], n_keys), -torch.inf, dtype=torch.float32, device=q.device)
    for row in range(query_sums.shape[2]):
        i = first_row + row
        dots = torch.einsum("nhc,nhjc->nhj", query_sums[:, :, row], key_sums[:, kv_head, : i + 1])
        routing = dots * scale / pairs[row, : i + 1].clamp(min=1)
        scores[:, :, row, : i + 1] = routing + value[:, kv_head, : i + 1]
    return scores
