"""Row-wise fp8 quantisation of activations and weights."""

from kernels._common.fp8 import FP8
from kernels._common.rows import QuantizedRows, choose_row_kernel, scaled_product
from kernels.quantize.api import quantize_rows

__all__ = ["FP8", "QuantizedRows", "choose_row_kernel", "quantize_rows", "scaled_product"]
