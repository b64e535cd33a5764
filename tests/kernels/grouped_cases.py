"""Grouped products on random operands, checked against float64 of the same fp8 values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.grouped_linear import group_rows, grouped_linear
from kernels.quantize import quantize_rows


@dataclass(frozen=True)
class Case:
    """tokens, each of which goes to `top` of `experts`; shared: its rows are of tokens, else there are tokens * top.

    alone: all tokens go to the first `top` experts, so that others have no row.
    """

    tokens: int
    experts: int
    top: int
    N: int
    K: int
    shared: bool = True
    bias: bool = False
    factors: bool = False
    alone: bool = False
    fast: bool = True
    dtype: torch.dtype = torch.float32


CASES = [
    Case(1, 8, 2, 64, 128),
    Case(3, 16, 4, 80, 144, bias=True, factors=True),
    Case(5, 64, 8, 32, 48, shared=False, factors=True),
    Case(33, 4, 2, 96, 256, fast=False),
    Case(129, 8, 3, 48, 144, shared=False, bias=True),
    Case(127, 4, 2, 144, 32, factors=True),
    Case(300, 2, 1, 160, 400, bias=True, factors=True),
    Case(300, 6, 2, 64, 128, shared=False, alone=True),
    Case(0, 4, 2, 64, 64),
]


def operands(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """weight [E, N, K] and scale [E, N] in fp8, x, ids, bias, factors."""
    torch.manual_seed(case.tokens)
    weight = quantize_rows(torch.randn(case.experts, case.N, case.K, device=device))
    rows = case.tokens * (1 if case.shared else case.top)
    x = torch.randn(rows, case.K, device=device).to(case.dtype)
    ids = torch.rand(case.tokens, case.experts, device=device).argsort(-1)[:, : case.top]
    if case.alone:
        ids = torch.arange(case.top, device=device).expand(case.tokens, -1)
    bias = torch.randn(case.experts, case.N, device=device).to(case.dtype)
    factors = torch.rand(case.tokens * case.top, device=device).to(case.dtype)
    return weight.values, weight.scales[..., 0], x, ids, bias, factors


def check(case: Case, impl: str, device: str) -> None:
    """Every row against float64; its error is that of rounding the output."""
    weight, scale, x, ids, bias, factors = operands(case, device)
    rows = quantize_rows(x)
    got = grouped_linear(
        weight,
        scale,
        rows,
        group_rows(ids, case.experts),
        bias=bias if case.bias else None,
        factors=factors if case.factors else None,
        fast_accumulation=case.fast,
        impl=impl,
    )
    flat = ids.reshape(-1)
    source = torch.arange(len(flat), device=device) // (case.top if case.shared else 1)
    exact = rows.values.double() * rows.scales
    true = torch.zeros(len(flat), case.N, dtype=torch.float64, device=device)
    for expert in range(case.experts):  # one by one: a copy of its weight for every row would not fit
        mine = flat == expert
        true[mine] = exact[source[mine]] @ (weight[expert].double() * scale[expert, :, None]).mT
    if case.bias:
        true = true + bias.double()[flat]
    if case.factors:
        true = true * factors.double()[:, None]
    assert got.shape == true.shape
    assert got.dtype == case.dtype
    assert got.isfinite().all()
    # On a GPU products are summed in the tensor cores' precision (14 bits of the largest) unless asked otherwise.
    lost = 2e-3 if got.is_cuda and case.fast else 2e-4 if got.is_cuda else 1e-6
    error = (got.double() - true).norm(dim=1)
    assert (error <= true.norm(dim=1) * max(torch.finfo(case.dtype).eps, lost)).all()
