"""Skinny products on random operands, checked against float64 of the same fp8 values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.quantize import QuantizedRows, quantize_rows
from kernels.skinny_linear import skinny_linear


@dataclass(frozen=True)
class Case:
    """M rows of K inputs, N outputs; positive: operands that do not cancel, so that sums which lose bits are biased."""

    M: int
    N: int
    K: int
    bias: bool = False
    positive: bool = False
    dtype: torch.dtype = torch.float32


CASES = [
    Case(1, 64, 128),
    Case(1, 100, 1024, bias=True),  # inputs in parts
    Case(4, 7, 2064, bias=True),  # the last part is not whole
    Case(16, 130, 400),
    Case(17, 64, 144, bias=True),
    Case(64, 48, 1152, positive=True),
    Case(0, 64, 128),
]


def operands(case: Case, device: str) -> tuple[Tensor, Tensor, QuantizedRows, Tensor | None]:
    """weight [N, K] and scale [N], rows [M, K], bias [N] or None."""
    torch.manual_seed(case.M)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, device=device) + 0.5 if case.positive else torch.randn(shape, device=device)

    weight, rows = quantize_rows(random(case.N, case.K)), quantize_rows(random(case.M, case.K).to(case.dtype))
    bias = random(case.N).to(case.dtype) if case.bias else None
    return weight.values, weight.scales.view(-1), rows, bias


def check(case: Case, impl: str, device: str) -> None:
    """Every row's error is that of rounding the output, its sums' error that of float32 sums."""
    weight, scale, rows, bias = operands(case, device)
    got = skinny_linear(weight, scale, rows, bias=bias, impl=impl)
    true = (rows.values.double() * rows.scales) @ (weight.double() * scale[:, None]).T
    true = true if bias is None else true + bias.double()
    assert got.shape == true.shape
    assert got.dtype == case.dtype
    assert got.isfinite().all()
    # Hopper's tensor cores keep about 14 bits in sums of up to 128 products (2.3e-4 where all are positive, as in
    # cuBLAS's precise accumulation); on a CPU all is float32.
    lost = 4e-4 if got.is_cuda else 1e-6
    error = (got.double() - true).norm(dim=1)
    assert (error <= true.norm(dim=1) * max(torch.finfo(case.dtype).eps, lost)).all()


def check_company(impl: str, device: str, N: int, K: int) -> None:
    """A row's output is the same, bit for bit, alone and among others, wherever it stands."""
    weight, scale, rows, _ = operands(Case(64, N, K), device)
    together = skinny_linear(weight, scale, rows, impl=impl)
    for first, end in ((0, 1), (3, 4), (0, 16), (5, 22), (31, 64)):
        some = QuantizedRows(rows.values[first:end], rows.scales[first:end], rows.dtype)
        assert torch.equal(skinny_linear(weight, scale, some, impl=impl), together[first:end])
