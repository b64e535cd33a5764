"""The fp8 linear."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.quantize import FP8, QuantizedRows, quantize_rows, scaled_product
from kernels.skinny_linear import MAX_ROWS, skinny_linear


def scaled_linear(
    rows: QuantizedRows, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, fast_accumulation: bool = False
) -> Tensor:
    """rows @ weight.T, both in fp8, the scales applied to the sums.

    rows: values [..., K]. weight: float8_e4m3fn [N, K], contiguous. scale: float32 [1, N]. bias: [N] or None.
    fast_accumulation: Hopper sums in its tensor cores' reduced precision instead of promoting to float32 as it goes;
    not of few rows on a GPU, as decode steps have: `kernels.skinny_linear` is precise.
    Returns [..., N] in rows.dtype; on a GPU that must be bfloat16. Raises ValueError otherwise.
    """
    if rows.values.is_cuda and rows.dtype != torch.bfloat16:
        raise ValueError(f"fp8 linears on a GPU need a bfloat16 model, got {rows.dtype}")
    flat = QuantizedRows(rows.values.view(-1, rows.values.shape[-1]), rows.scales.view(-1, 1), rows.dtype)
    if not rows.values.is_cuda:
        # A float32 product of the same values: `torch._scaled_mm` depends on the CPU's instructions (with AMX one call
        # took seconds), and some builds (torch 2.11) scale whole tensors only.
        product = scaled_product(flat, weight, scale)
        out = (product if bias is None else product + bias.float()).to(rows.dtype)
    elif len(flat.values) <= MAX_ROWS:
        out = skinny_linear(weight, scale.view(-1), flat, bias=bias)
    else:
        out = torch._scaled_mm(
            flat.values,
            weight.t(),
            scale_a=flat.scales,
            scale_b=scale,
            bias=bias,
            out_dtype=rows.dtype,
            use_fast_accum=fast_accumulation,
        )
    return out.view(*rows.values.shape[:-1], weight.shape[0])


class Fp8Linear(nn.Module):
    """y = x @ W.T + b with W in fp8.

    weight: float8_e4m3fn [N, K]; weight_scale: float32 [1, N], W = weight * weight_scale.T; bias: [N] or None.
    Takes activations, which it quantises per row, or rows that are quantised already.
    """

    def __init__(
        self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *, fast_accumulation: bool = False
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.fast_accumulation = fast_accumulation
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, fast_accumulation: bool = False, device: torch.device | None = None
    ) -> Fp8Linear:
        """Quantise a linear's weight, on `device` if given. Raises ValueError on GPUs without fp8."""
        rows = quantize_rows(linear.weight.detach().to(device))
        bias = None if linear.bias is None else linear.bias.detach().to(device)
        return cls(rows.values, rows.scales.view(1, -1), bias, fast_accumulation=fast_accumulation)

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype. Raises RuntimeError if the weight was converted to another type."""
        if self.weight.dtype != FP8 or self.weight_scale.dtype != torch.float32:
            raise RuntimeError(
                f"an fp8 linear was converted to {self.weight.dtype}, which loses its scale: move such a model with "
                ".to(device), never .to(dtype)"
            )
        rows = x if isinstance(x, QuantizedRows) else quantize_rows(x)
        return scaled_linear(rows, self.weight, self.weight_scale, self.bias, fast_accumulation=self.fast_accumulation)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"fast_accumulation={self.fast_accumulation}"
        )
