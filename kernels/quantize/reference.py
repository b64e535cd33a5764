"""Row-wise fp8 quantisation in plain torch: the specification."""

from __future__ import annotations

from torch import Tensor

from kernels._common.fp8 import FP8, FP8_MAX
from kernels._common.rows import LEAST_AMAX


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, D] -> float8_e4m3fn [M, D], float32 [M, 1]."""
    x = x.float()
    amax = x.abs().amax(-1, keepdim=True).clamp(min=LEAST_AMAX)
    return (x * (FP8_MAX / amax)).to(FP8), amax / FP8_MAX
