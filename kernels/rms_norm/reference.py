"""RMSNorm in plain torch: the specification. Rounding as in transformers' LlamaRMSNorm and GemmaRMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.quantize import quantize_rows


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, round_before_weight: bool) -> Tensor:
    """See kernels.rms_norm.rms_norm."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    if round_before_weight:
        y = y.to(x.dtype).float()
    if weight is not None:
        y = y * (weight.float() + weight_offset)
    return y.to(x.dtype)


def rms_norm_fp8(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, round_before_weight: bool
) -> tuple[Tensor, Tensor]:
    """See kernels.rms_norm.rms_norm_fp8. Returns values [..., D], scales [..., 1]."""
    y = rms_norm(x, weight, eps, weight_offset, round_before_weight)
    rows = quantize_rows(y.reshape(-1, y.shape[-1]), impl="reference")
    return rows.values.view(x.shape), rows.scales.view(*x.shape[:-1], 1)
