"""Skinny products on a GPU: every row against float64, the same in any company and inside a CUDA graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.quantize import QuantizedRows
from kernels.skinny_linear import skinny_linear
from tests.kernels import skinny_cases as cases
from tests.kernels.skinny_cases import Case

pytestmark = pytest.mark.gpu
LARGE = [
    Case(1, 28672, 4096),
    Case(5, 6144, 4096, bias=True),
    Case(16, 4096, 14336, positive=True),
    Case(64, 4096, 14336),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*cases.CASES, *LARGE], ids=str)
def test_skinny_linear(case: Case, dtype: torch.dtype, poisoned: None) -> None:
    cases.check(replace(case, dtype=dtype), "triton", "cuda")


@pytest.mark.parametrize(("N", "K"), [(4096, 14336), (6144, 4096), (28672, 4096), (100, 1040)])
def test_company_changes_nothing(N: int, K: int) -> None:
    cases.check_company("triton", "cuda", N, K)


def test_a_graph_follows_other_rows() -> None:
    weight, scale, rows, _ = cases.operands(Case(3, 4096, 4096, dtype=torch.bfloat16), "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        skinny_linear(weight, scale, rows)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = skinny_linear(weight, scale, rows)
    rows.values.copy_(rows.values.flip(0).clone())
    graph.replay()
    assert torch.equal(out, skinny_linear(weight, scale, QuantizedRows(rows.values, rows.scales, rows.dtype)))
