"""RMSNorm in one pass, with transformers' rounding, and RMSNorm that ends in row-wise fp8."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common.rows import QuantizedRows, check_columns, check_floating, choose_row_kernel
from kernels.dispatch import implementation, on_its_gpu


@on_its_gpu
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = True,
    impl: str = "auto",
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight_offset + weight), in float32, over the last dimension.

    x: [..., D] bfloat16, float16 or float32, last dimension contiguous, D <= 65536; the leading dimensions may be
        strided. weight: [D], or None for none.
    weight_offset: 1 for families whose weights are stored around zero (gemma).
    round_before_weight: llama and most families round the normalised row to x's dtype and then multiply by the weight;
        False rounds once, after the weight (gemma, olmo2). With True, weight must have x's dtype.
    Returns [..., D] in x's dtype; memory order of the leading dimensions as in x.
    Raises ValueError for shapes, types or layouts that do not fit.
    """
    choice = choose_row_kernel("rms_norm", x.device, impl)
    _check("rms_norm", x, weight, weight_offset, round_before_weight, backward=choice.impl == "reference")
    return implementation("rms_norm", choice).rms_norm(x, weight, eps, weight_offset, round_before_weight)


@on_its_gpu
def rms_norm_fp8(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = True,
    impl: str = "auto",
) -> QuantizedRows:
    """`quantize_rows(rms_norm(...))` without writing the normalised rows: rounded to x's dtype, then quantised.

    Arguments as for `rms_norm`. Returns fp8 rows [..., D] with a float32 scale each. Raises ValueError too on GPUs
    without fp8.
    """
    choice = choose_row_kernel("rms_norm_fp8", x.device, impl, fp8=True)
    _check("rms_norm_fp8", x, weight, weight_offset, round_before_weight, backward=choice.impl == "reference")
    values, scales = implementation("rms_norm", choice).rms_norm_fp8(x, weight, eps, weight_offset, round_before_weight)
    return QuantizedRows(values, scales, x.dtype)


def _check(
    op: str, x: Tensor, weight: Tensor | None, weight_offset: float, round_before_weight: bool, backward: bool
) -> None:
    check_floating(op, x, backward=backward)
    check_columns(op, x.shape[-1])
    if weight is None:
        if weight_offset:
            raise ValueError(f"{op}: weight_offset={weight_offset} needs a weight")
        return
    if weight.shape != x.shape[-1:] or not weight.is_contiguous():
        raise ValueError(f"{op}: weight must be contiguous [{x.shape[-1]}], got {tuple(weight.shape)}")
    allowed = (x.dtype,) if round_before_weight else (x.dtype, torch.float32)
    if weight.dtype not in allowed:
        raise ValueError(f"{op}: weight must be {' or '.join(map(str, allowed))}, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"{op}: weight is on {weight.device}, x on {x.device}")
