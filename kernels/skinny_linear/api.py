"""Products of a few fp8 rows with a large fp8 weight, as decode steps need them."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common.fp8 import FP8
from kernels._common.rows import QuantizedRows, choose_row_kernel
from kernels.dispatch import implementation, on_its_gpu

# Rows that one program holds. Beyond them the weight is reused enough for cuBLAS's tiles.
MAX_ROWS = 64
# 16-byte loads.
ALIGNMENT = 16


@on_its_gpu
def skinny_linear(
    weight: Tensor, scale: Tensor, rows: QuantizedRows, *, bias: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """rows @ weight.T + bias for at most MAX_ROWS rows, scales applied to the sums.

    weight: float8_e4m3fn [N, K], contiguous; K a multiple of 16. scale: float32 [N], of the output channels.
    rows: values [M, K], 0 <= M <= MAX_ROWS. bias: [N] or None.
    Sums go to float32 every 128 products: Hopper's fp8 tensor cores keep about 14 bits of longer ones, so that this is
    more exact than cuBLAS's fast accumulation, and no slower, since reading the weight takes longer. The order of a
    sum depends on N and K alone: a row's output is bit for bit the same whatever rows are with it.
    Returns [M, N] in rows.dtype. Raises ValueError for what does not fit, and on GPUs without fp8.
    """
    choice = choose_row_kernel("skinny_linear", weight.device, impl, fp8=True)
    _check(weight, scale, rows, bias)
    out: Tensor = implementation("skinny_linear", choice).skinny_linear(weight, scale, rows, bias)
    return out


def _check(weight: Tensor, scale: Tensor, rows: QuantizedRows, bias: Tensor | None) -> None:
    if weight.dtype != FP8 or weight.ndim != 2 or not weight.is_contiguous():
        raise ValueError(
            f"skinny_linear: weight must be contiguous float8_e4m3fn [N, K], got {weight.dtype} {tuple(weight.shape)}"
        )
    N, K = weight.shape
    if K % ALIGNMENT or not K:
        raise ValueError(f"skinny_linear: K must be a multiple of {ALIGNMENT}, got {K}")
    if rows.values.ndim != 2 or rows.values.shape[1] != K or len(rows.values) > MAX_ROWS:
        raise ValueError(
            f"skinny_linear: rows must be [M, {K}] with M at most {MAX_ROWS}, got {tuple(rows.values.shape)}"
        )
    if scale.dtype != torch.float32 or scale.shape != (N,) or not scale.is_contiguous():
        raise ValueError(
            f"skinny_linear: scale must be contiguous float32 [{N}], got {scale.dtype} {tuple(scale.shape)}"
        )
    if bias is not None and (bias.shape != (N,) or not bias.is_contiguous()):
        raise ValueError(f"skinny_linear: bias must be contiguous [{N}], got {tuple(bias.shape)}")
