# mypy: disable-error-code="no-untyped-def"
"""Skinny products in Triton: a program for each block of output channels and part of the inputs.

The weight is read once, so that time is its bytes over the memory's bandwidth if enough of them are under way: every
program fits on the GPU at the same time with several others on its multiprocessor, each with STAGES of loads ahead.
Few output channels make few programs: then several sum a part of the inputs each, and a second kernel adds the parts
in their order. The weight is the product's tall side: wgmma takes 64 rows or more.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.rows import QuantizedRows
from kernels._common.sizes import ceil_div, power_of_2

# Output channels of a program, warps, stages.
CHANNELS, WARPS, STAGES = 64, 4, 6
# Inputs of a stage, which is also how many products are summed before they go to float32.
INPUTS = 128
# Programs that are aimed at, and inputs that a program has at least.
PROGRAMS = 512
LEAST_INPUTS = 512
# Output channels of a program that adds parts.
SUM_CHANNELS = 256


@triton.jit(do_not_specialize=["M"])
def skinny_linear_kernel(
    weight, scale, rows, row_scales, bias, out, M, N, K, part,
    HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (block, p): output channels block * BN + [0, BN) over inputs p * part + [0, part).

    WHOLE: out is the output [M, N]; else float32 [parts, M, N], unscaled.
    """
    channel = tl.program_id(0) * BN + tl.arange(0, BN)
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, K)
    # Past the last channel it is computed again: nothing but the store needs a mask.
    n = tl.minimum(channel, N - 1)
    m = tl.arange(0, BM)
    k = tl.arange(0, BK)
    w_at = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    x_at = rows + m[:, None] * K + k[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for at in tl.range(begin, end, BK, num_stages=STAGES):
        if EVEN:
            w = tl.load(w_at + at)
            x = tl.load(x_at + at, mask=(m < M)[:, None], other=0.0)
        else:
            w = tl.load(w_at + at, mask=(at + k < end)[None, :], other=0.0)
            x = tl.load(x_at + at, mask=(m < M)[:, None] & (at + k < end)[None, :], other=0.0)
        acc = tl.dot(w, tl.trans(x), acc, max_num_imprecise_acc=BK)
    acc = tl.trans(acc)
    if WHOLE:
        acc = acc * tl.load(row_scales + m, mask=m < M, other=0.0)[:, None] * tl.load(scale + n)[None, :]
        if HAS_BIAS:
            acc += tl.load(bias + n).to(tl.float32)[None, :]
    else:
        out += tl.program_id(1) * M * N
    tl.store(out + m[:, None] * N + channel[None, :], acc, mask=(m < M)[:, None] & (channel < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def add_parts_kernel(
    parts, scale, row_scales, bias, out, M, N, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr
):
    """Program (block, m): row m of the output, channels block * BN + [0, BN), from parts [PARTS, M, N]."""
    m = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < N
    acc = tl.zeros((BN,), tl.float32)
    for p in tl.static_range(PARTS):
        acc += tl.load(parts + (p * M + m) * N + n, mask=inside, other=0.0)
    acc = acc * tl.load(row_scales + m) * tl.load(scale + n, mask=inside, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + m * N + n, acc, mask=inside)


def skinny_linear(weight: Tensor, scale: Tensor, rows: QuantizedRows, bias: Tensor | None, **shape: Any) -> Tensor:
    """See kernels.skinny_linear.skinny_linear. shape: channels, warps, stages, parts, where others than the usual."""
    N, K = weight.shape
    M = len(rows.values)
    out = torch.empty(M, N, dtype=rows.dtype, device=weight.device)
    if not M or not N:
        return out
    channels = shape.get("channels", CHANNELS)
    blocks = ceil_div(N, channels)
    parts = shape.get("parts") or max(1, min(PROGRAMS // blocks, K // LEAST_INPUTS))
    part = ceil_div(ceil_div(K, parts), INPUTS) * INPUTS
    parts = ceil_div(K, part)
    whole = parts == 1
    sums = out if whole else torch.empty(parts, M, N, dtype=torch.float32, device=weight.device)
    skinny_linear_kernel[(blocks, parts)](
        weight, scale, rows.values, rows.scales, bias, sums, M, N, K, part,
        HAS_BIAS=bias is not None, WHOLE=whole, EVEN=K % INPUTS == 0, BM=max(16, power_of_2(M)), BN=channels,
        BK=INPUTS, STAGES=shape.get("stages", STAGES), num_warps=shape.get("warps", WARPS),
    )  # fmt: skip
    if not whole:
        add_parts_kernel[(ceil_div(N, SUM_CHANNELS), M)](
            sums, scale, rows.scales, bias, out, M, N, HAS_BIAS=bias is not None, PARTS=parts, BN=SUM_CHANNELS,
            num_warps=2,
        )  # fmt: skip
    return out
