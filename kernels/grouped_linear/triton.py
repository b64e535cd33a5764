# mypy: disable-error-code="no-untyped-def"
"""Grouped products in Triton: a program for each tile of rows of one expert, and block of its output channels.

Rows are read where they lie and written where they belong, so that nothing is gathered before or scattered after. Tiles
of few rows (decode) let the weights be the product's tall side: wgmma takes 64 rows or more.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.rows import QuantizedRows
from kernels.grouped_linear.api import LARGE, MIDDLE, SMALL, Groups

# By the rows of a tile: output channels of a program, warps, stages. A stage holds INPUTS of all of them.
SHAPES = {SMALL: (64, 4, 6), MIDDLE: (128, 4, 4), LARGE: (128, 8, 3)}
INPUTS = 128


@triton.jit(do_not_specialize=["repeat"])
def grouped_linear_kernel(
    weight, scale, rows, row_scales, bias, factors, out, order, tile_expert, tile_first, tile_end, N, K, repeat,
    HAS_BIAS: tl.constexpr, HAS_FACTORS: tl.constexpr, TALL_WEIGHT: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, IMPRECISE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program tile * blocks + block, block of output channels innermost: a tile's rows and an expert stay in L2."""
    blocks = tl.cdiv(N, BN)
    tile = tl.program_id(0) // blocks
    first = tl.load(tile_first + tile)
    end = tl.load(tile_end + tile)
    if first < end:
        expert = tl.load(tile_expert + tile).to(tl.int64)
        # Past the end the last row and the last channel are computed again: nothing but the store needs a mask.
        place = first + tl.arange(0, BM)
        row = tl.load(order + tl.minimum(place, end - 1))
        source = (row // repeat).to(tl.int64)
        row = row.to(tl.int64)
        channel = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
        n = tl.minimum(channel, N - 1)
        k = tl.arange(0, BK)
        x_at = rows + source[:, None] * K + k[None, :]
        w_at = weight + expert * N * K + n[:, None] * K + k[None, :]
        acc = tl.zeros((BN, BM), tl.float32) if TALL_WEIGHT else tl.zeros((BM, BN), tl.float32)
        for at in tl.range(0, K, BK, num_stages=STAGES):
            if EVEN:
                x = tl.load(x_at + at)
                w = tl.load(w_at + at)
            else:
                x = tl.load(x_at + at, mask=(at + k < K)[None, :], other=0.0)
                w = tl.load(w_at + at, mask=(at + k < K)[None, :], other=0.0)
            if TALL_WEIGHT:
                acc = tl.dot(w, tl.trans(x), acc, max_num_imprecise_acc=IMPRECISE)
            else:
                acc = tl.dot(x, tl.trans(w), acc, max_num_imprecise_acc=IMPRECISE)
        if TALL_WEIGHT:
            acc = tl.trans(acc)
        acc = acc * tl.load(row_scales + source)[:, None] * tl.load(scale + expert * N + n)[None, :]
        if HAS_BIAS:
            acc += tl.load(bias + expert * N + n).to(tl.float32)[None, :]
        if HAS_FACTORS:
            acc *= tl.load(factors + row).to(tl.float32)[:, None]
        tl.store(out + row[:, None] * N + channel[None, :], acc, mask=(place < end)[:, None] & (channel < N)[None, :])


def grouped_linear(
    weight: Tensor,
    scale: Tensor,
    rows: QuantizedRows,
    groups: Groups,
    bias: Tensor | None,
    factors: Tensor | None,
    fast_accumulation: bool,
    **shape: Any,
) -> Tensor:
    """See kernels.grouped_linear.grouped_linear. shape: channels, warps, stages, where not those of SHAPES."""
    N, K = weight.shape[1:]
    R = groups.ids.numel()
    out = torch.empty(R, N, dtype=rows.dtype, device=weight.device)
    if not R:
        return out
    channels, warps, stages = (
        shape.get(name, usual)
        for name, usual in zip(("channels", "warps", "stages"), SHAPES[groups.tile_rows], strict=True)
    )
    inputs = INPUTS if K % INPUTS == 0 else INPUTS // 2
    grid = (groups.tile_expert.numel() * triton.cdiv(N, channels),)
    grouped_linear_kernel[grid](
        weight, scale, rows.values, rows.scales, bias, factors, out, groups.order, groups.tile_expert,
        groups.tile_first, groups.tile_end, N, K, R // rows.values.shape[0],
        HAS_BIAS=bias is not None, HAS_FACTORS=factors is not None, TALL_WEIGHT=groups.tile_rows < 64,
        EVEN=K % inputs == 0, BM=groups.tile_rows, BN=channels, BK=inputs,
        IMPRECISE=None if fast_accumulation else inputs, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return out
