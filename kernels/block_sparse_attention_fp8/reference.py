"""fp8 block-sparse attention in plain torch: the arithmetic that the kernels are measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common.attention_reference import attend_to_blocks
from kernels._common.fp8 import FP8, HeadScales, join_bias, restore_keys, widen
from kernels._common.selection import BlockSelection

# Probabilities are at most 1: times 2^8 they use e4m3 down to 2^-17 of the row's largest.
WEIGHT_SCALE = 256.0


def round_weights(weights: Tensor) -> Tensor:
    """Unnormalised probabilities in 0..1 as e4m3 keeps them."""
    return widen((weights * WEIGHT_SCALE).to(FP8)).to(weights.dtype) / WEIGHT_SCALE


def block_sparse_attention_fp8(
    q: Tensor,
    k: Tensor,
    vt: Tensor,
    scales: HeadScales,
    selection: BlockSelection | None,
    query_start: int,
    block_size: int,
    scale: float,
    window: int | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See kernels.block_sparse_attention_fp8. Products and sums in float32. The sum that P is divided by is of P as
    rounded: weights that nearly agree are all rounded the same way, and that would shift the output.

    The kernels differ: they round P relative to the largest score so far, not to the row's, and the portable one
    divides by the sum of P before it is rounded, whose bias many keys even out (a tenth of a percent at 1,000).
    """
    known, group = query_start + q.shape[2], q.shape[1] // k.shape[1]
    v = restore_keys(vt[..., : -(-known // 16) * 16])[..., :known].mT
    out, lse = attend_to_blocks(
        widen(q) * scales.q[:, None, None],
        widen(k[:, :, :known]) * scales.k[:, None, None],
        widen(v) * scales.v[:, None, None],
        selection,
        query_start,
        block_size,
        scale,
        window,
        round_weights,
        None if bias is None else join_bias(bias, group) * (scales.q * scales.k.repeat_interleave(group))[:, None],
    )
    return out.to(dtype), lse
