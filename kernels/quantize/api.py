"""Row-wise fp8 quantisation of activations and weights."""

from __future__ import annotations

from torch import Tensor

from kernels._common.rows import QuantizedRows, as_rows, check_columns, check_floating, choose_row_kernel
from kernels.dispatch import implementation, on_its_gpu


@on_its_gpu
def quantize_rows(x: Tensor, *, impl: str = "auto") -> QuantizedRows:
    """Each row of x in float8 e4m3 with one scale: its largest magnitude / 448, computed in float32.

    x: [..., D] bfloat16, float16 or float32, D <= 65536, rows evenly spaced (views of a wider tensor may be given).
    Returns values float8_e4m3fn [..., D] and scales float32 [..., 1]; a row of zeros keeps its zeros.
    Raises ValueError for other types or layouts, and on GPUs without fp8.
    """
    choice = choose_row_kernel("quantize_rows", x.device, impl, fp8=True)
    check_floating("quantize_rows", x, backward=choice.impl == "reference")
    check_columns("quantize_rows", x.shape[-1])
    rows = as_rows("quantize_rows", x)
    values, scales = implementation("quantize", choice).quantize_rows(rows)
    return QuantizedRows(values.view(x.shape), scales.view(*x.shape[:-1], 1), x.dtype)
