"""RMSNorm in one pass, with transformers' rounding, and RMSNorm that ends in row-wise fp8."""

from kernels._common.rows import QuantizedRows
from kernels.rms_norm.api import rms_norm, rms_norm_fp8

__all__ = ["QuantizedRows", "rms_norm", "rms_norm_fp8"]
