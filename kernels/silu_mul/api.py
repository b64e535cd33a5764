"""The gate of a gated MLP, act(gate) * up, in one pass, with or without row-wise fp8."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kernels._common.rows import QuantizedRows, as_rows, check_columns, check_floating, choose_row_kernel
from kernels.dispatch import implementation, on_its_gpu

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")


@on_its_gpu
def silu_mul(gate: Tensor, up: Tensor, *, activation: str = "silu", impl: str = "auto") -> Tensor:
    """act(gate) * up, elementwise; the activation is computed in float32 and rounded before the product.

    gate, up: [..., D] bfloat16, float16 or float32, of one shape; rows evenly spaced, so that they may be the two
        halves of one GEMM's output. activation: "silu", or "gelu_tanh" (GELU in its tanh form).
    Returns contiguous [..., D] in their dtype. Raises ValueError for shapes, types or layouts that do not fit.
    """
    choice = choose_row_kernel("silu_mul", gate.device, impl)
    rows = _check("silu_mul", gate, up, activation, backward=choice.impl == "reference")
    return implementation("silu_mul", choice).silu_mul(*rows, activation).view(gate.shape)


@on_its_gpu
def silu_mul_fp8(gate: Tensor, up: Tensor, *, activation: str = "silu", impl: str = "auto") -> QuantizedRows:
    """`quantize_rows(silu_mul(...))` without writing the product: rounded to the inputs' dtype, then quantised.

    Arguments as for `silu_mul`, D <= 65536. Returns fp8 rows [..., D] with a float32 scale each. Raises ValueError too
    on GPUs without fp8.
    """
    choice = choose_row_kernel("silu_mul_fp8", gate.device, impl, fp8=True)
    rows = _check("silu_mul_fp8", gate, up, activation, backward=choice.impl == "reference")
    check_columns("silu_mul_fp8", gate.shape[-1])
    values, scales = implementation("silu_mul", choice).silu_mul_fp8(*rows, activation)
    return QuantizedRows(values.view(gate.shape), scales.view(*gate.shape[:-1], 1), gate.dtype)


def _check(op: str, gate: Tensor, up: Tensor, activation: str, backward: bool) -> tuple[Tensor, Tensor]:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    check_floating(op, gate, up, backward=backward)
    if gate.shape != up.shape or gate.device != up.device:
        raise ValueError(
            f"{op}: gate and up must agree, got {tuple(gate.shape)} on {gate.device}, {tuple(up.shape)} on {up.device}"
        )
    return as_rows(op, gate), as_rows(op, up)
