"""act(gate) * up in Triton: column blocks for plain output, whole rows in registers where fp8 needs their maximum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.fp8 import FP8
from kernels._common.rows_triton import quantize_tile, warps


@triton.jit
def gated(gate, up, GELU: tl.constexpr):
    """act(gate) * up in the inputs' type, the activation rounded first."""
    g = gate.to(tl.float32)
    slope = g
    if GELU:
        # 0.5 (1 + tanh z) = sigmoid(2 z), z = sqrt(2 / pi) (g + 0.044715 g^3)
        slope = 1.5957691216057308 * (g + 0.044715 * g * g * g)
    activated = g * tl.sigmoid(slope)
    return (activated.to(gate.dtype).to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def silu_mul_kernel(
    gate, up, y, columns, gate_stride, up_stride, GELU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program (row, column block)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0)
    tl.store(y + row * columns + column, gated(g, u, GELU), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def silu_mul_fp8_kernel(
    gate, up, y, scales, rows, columns, gate_stride, up_stride,
    GELU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    far = row.to(tl.int64)[:, None]
    g = tl.load(gate + far * gate_stride + column[None, :], mask=inside, other=0.0)
    u = tl.load(up + far * up_stride + column[None, :], mask=inside, other=0.0)
    values, scale = quantize_tile(gated(g, u, GELU).to(tl.float32))
    tl.store(y + far * columns + column[None, :], values, mask=inside)
    tl.store(scales + row, scale, mask=row < rows)


def silu_mul(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See kernels.silu_mul.reference."""
    M, D = gate.shape
    y = torch.empty(M, D, dtype=gate.dtype, device=gate.device)
    block = min(2048, triton.next_power_of_2(D))
    if M and D:
        silu_mul_kernel[(M, triton.cdiv(D, block))](
            gate, up, y, D, gate.stride(0), up.stride(0), GELU=activation == "gelu_tanh", BLOCK=block,
            num_warps=max(1, block // 256),
        )  # fmt: skip
    return y


def silu_mul_fp8(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """See kernels.silu_mul.reference."""
    M, D = gate.shape
    values = torch.empty(M, D, dtype=FP8, device=gate.device)
    scales = torch.empty(M, 1, dtype=torch.float32, device=gate.device)
    block = triton.next_power_of_2(D)
    tile = max(1, 2048 // block)
    if M:
        silu_mul_fp8_kernel[(triton.cdiv(M, tile),)](
            gate, up, values, scales, M, D, gate.stride(0), up.stride(0),
            GELU=activation == "gelu_tanh", ROWS=tile, BLOCK=block, num_warps=warps(tile * block),
        )  # fmt: skip
    return values, scales
