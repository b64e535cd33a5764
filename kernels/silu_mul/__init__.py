"""The gate of a gated MLP, act(gate) * up, in one pass, with or without row-wise fp8."""

from kernels._common.rows import QuantizedRows
from kernels.silu_mul.api import ACTIVATIONS, Activation, silu_mul, silu_mul_fp8

__all__ = ["ACTIVATIONS", "Activation", "QuantizedRows", "silu_mul", "silu_mul_fp8"]
