# mypy: disable-error-code="no-untyped-def"
"""Device helpers of the Triton kernels that write or read fp8 heads."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_at(place):
    """The key that stored place `place` of the transposed values holds (kernels.fp8_heads says why)."""
    within = place % 16
    return place - within + within // 2 % 2 * 8 + within // 4 * 2 + within % 2


@triton.jit
def place_of(key):
    """The inverse of `key_at`."""
    within = key % 16
    return key - within + within % 8 // 2 * 4 + within // 8 * 2 + within % 2


@triton.jit
def to_fp8(x, scale):
    """x / scale in e4m3, saturated; NaN stays NaN. scale: float32 scalar."""
    scaled = x.to(tl.float32) * tl.div_rn(1.0, scale)
    return tl.clamp(scaled, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
