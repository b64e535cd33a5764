"""Row-wise fp8 quantisation in Triton: one pass, each program holds its rows in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.fp8 import FP8
from kernels._common.rows_triton import quantize_tile, warps


@triton.jit(do_not_specialize=["rows"])
def quantize_rows_kernel(
    x, y, scales, rows, columns, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """x [rows, columns] at `stride` elements a row; y contiguous."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(x + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    values, scale = quantize_tile(tile)
    tl.store(y + row.to(tl.int64)[:, None] * columns + column[None, :], values, mask=inside)
    tl.store(scales + row, scale, mask=row < rows)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """See kernels.quantize.reference."""
    M, D = x.shape
    values = torch.empty(M, D, dtype=FP8, device=x.device)
    scales = torch.empty(M, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(D)
    tile = max(1, 2048 // block)
    if M:
        quantize_rows_kernel[(triton.cdiv(M, tile),)](
            x, values, scales, M, D, x.stride(0), ROWS=tile, BLOCK=block, num_warps=warps(tile * block)
        )
    return values, scales
