"""act(gate) * up in plain torch: the specification. Rounding as in transformers' gated MLPs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.quantize import quantize_rows


def silu_mul(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """gate, up [M, D] -> [M, D]."""
    activated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return activated * up


def silu_mul_fp8(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """gate, up [M, D] -> float8_e4m3fn [M, D], float32 [M, 1]."""
    rows = quantize_rows(silu_mul(gate, up, activation), impl="reference")
    return rows.values, rows.scales
