"""RMSNorm in Triton: each program holds its rows in registers, so x is read once and y written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.fp8 import FP8
from kernels._common.rows import in_memory_order, row_layout
from kernels._common.rows_triton import quantize_tile, row_start, warps


# Sizes that follow the number of tokens are not specialised: no recompilation for a last chunk or a batch size.
@triton.jit(do_not_specialize=["rows", "n2", "n3"])
def rms_norm_kernel(
    x, weight, y, scales, rows, columns, eps, weight_offset, n2, n3, s1, s2, s3,
    WEIGHT: tl.constexpr, ROUND: tl.constexpr, QUANTIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x: rows as kernels._common.rows.row_layout says; y contiguous. QUANTIZE: y fp8, `scales` float32 [rows]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    start = row_start(row, n2, n3, s1, s2, s3)
    dtype = x.dtype.element_ty
    tile = tl.load(x + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    variance = tl.sum(tile * tile, axis=1) / columns
    tile = tile * tl.rsqrt(variance + eps)[:, None]
    if ROUND:
        tile = tile.to(dtype).to(tl.float32)
    if WEIGHT:
        scale = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32) + weight_offset
        tile = tile * scale[None, :]
    tile = tile.to(dtype)
    place = y + row.to(tl.int64)[:, None] * columns + column[None, :]
    if QUANTIZE:
        # Masked columns hold weight_offset * 0: still zero, so they do not touch the largest magnitude.
        values, row_scale = quantize_tile(tile.to(tl.float32))
        tl.store(place, values, mask=inside)
        tl.store(scales + row, row_scale, mask=row < rows)
    else:
        tl.store(place, tile, mask=inside)


def _launch(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, rounding: bool, y: Tensor, scales: Tensor | None
) -> None:
    """y contiguous, rows in x's order."""
    D = x.shape[-1]
    rows = x.numel() // D
    if rows == 0:
        return
    n2, n3, strides = row_layout("rms_norm", x)
    block = triton.next_power_of_2(D)
    tile = max(1, 2048 // block)
    rms_norm_kernel[(triton.cdiv(rows, tile),)](
        x, x if weight is None else weight, y, y if scales is None else scales, rows, D, eps, offset, n2, n3, *strides,
        WEIGHT=weight is not None, ROUND=rounding, QUANTIZE=scales is not None, ROWS=tile, BLOCK=block,
        num_warps=warps(tile * block),
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, round_before_weight: bool) -> Tensor:
    """See kernels.rms_norm.rms_norm."""
    ordered, inverse = in_memory_order(x)
    y = torch.empty(ordered.shape, dtype=x.dtype, device=x.device)
    _launch(ordered, weight, eps, weight_offset, round_before_weight, y, None)
    return y.permute(inverse)


def rms_norm_fp8(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, round_before_weight: bool
) -> tuple[Tensor, Tensor]:
    """See kernels.rms_norm.rms_norm_fp8. Returns values [..., D], scales [..., 1], contiguous."""
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    scales = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    _launch(x, weight, eps, weight_offset, round_before_weight, values, scales)
    return values, scales
