"""Products of fp8 rows with a weight in plain torch: the specification.

Source: `torch._scaled_mm` with a scale for each row of either operand, as fp8 linears use it.
"""

from __future__ import annotations

from torch import Tensor

from kernels._common.rows import QuantizedRows, scaled_product


def skinny_linear(weight: Tensor, scale: Tensor, rows: QuantizedRows, bias: Tensor | None) -> Tensor:
    """See kernels.skinny_linear.skinny_linear; sums are in float32."""
    product = scaled_product(rows, weight, scale)
    return (product if bias is None else product + bias.float()).to(rows.dtype)
