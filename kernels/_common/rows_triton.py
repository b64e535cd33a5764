# mypy: disable-error-code="no-untyped-def"
"""Device helpers of the row-wise Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._common.fp8 import FP8_MAX
from kernels._common.rows import LEAST_AMAX

_FP8_MAX = tl.constexpr(FP8_MAX)
_LEAST_AMAX = tl.constexpr(LEAST_AMAX)


@triton.jit
def row_start(row, n2, n3, s1, s2, s3):
    """Offset in elements of row numbers `row`; see kernels._common.rows.row_layout. int64."""
    outer = row // n3
    offset = (outer // n2).to(tl.int64) * s1 + (outer % n2).to(tl.int64) * s2
    return offset + (row % n3).to(tl.int64) * s3


@triton.jit
def quantize_tile(y):
    """float32 [R, C], zero where masked -> (e4m3 [R, C], scales float32 [R]), rounded as the reference does."""
    amax = tl.maximum(tl.max(tl.abs(y), axis=1), _LEAST_AMAX)
    # No clamp: the largest magnitude maps to 448 within rounding, which the conversion keeps; NaN stays NaN.
    scaled = y * tl.div_rn(_FP8_MAX, amax)[:, None]
    return scaled.to(tl.float8e4nv), tl.div_rn(amax, _FP8_MAX)


def warps(elements: int) -> int:
    """Warps for a tile: about 16 elements a thread."""
    return max(1, min(32, triton.next_power_of_2(elements) // 512))
