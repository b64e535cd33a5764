"""Decode attention of rows that share a prefix, on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.decode_attention import Prefixes, decode_attention
from tests.kernels import prefix_cases as cases
from tests.kernels.prefix_cases import Shared, questions
from tests.kernels.selection_cases import BF16, FP16, FP32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LARGE = [
    *(
        Shared(
            (questions(9000, *range(1, 21)), questions(0, 300, 0), questions(4000, 7, 64)),
            heads=32, kv_heads=8, head_dim=dim, dtype=dtype, window=window, sinks=window is not None,
        )
        for dim in (64, 128, 256)
        for dtype in (BF16, FP32)
        for window in (None, 500)
    ),
    Shared((questions(40_000, *range(1, 129)),), heads=32, kv_heads=8, head_dim=128, dtype=BF16),
    Shared((questions(17_000, 5), questions(3000, 5)), heads=28, kv_heads=4, head_dim=128, dtype=BF16),
]  # fmt: skip


@pytest.mark.parametrize("fp8", [False, True], ids=["kv16", "kv8"])
@pytest.mark.parametrize("case", [*cases.CASES, *(replace(case, dtype=BF16) for case in cases.CASES), *LARGE], ids=str)
def test_decode(case: Shared, fp8: bool, poisoned: None) -> None:
    if fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    cases.check(case, "triton", "cuda", fp8)


@pytest.mark.parametrize("fp8", [False, True], ids=["kv16", "kv8"])
def test_company_changes_nothing(fp8: bool, poisoned: None) -> None:
    if fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    cases.check_company("triton", "cuda", fp8)


def test_captured_with_other_groups() -> None:
    """A graph goes by what the tables hold when it is replayed."""
    k = torch.randn(2, 4096, 64, device="cuda", dtype=FP16)
    q = torch.randn(4, 8, 64, device="cuda", dtype=FP16)
    starts = torch.tensor([2048, 2176, 2304, 2432], device="cuda")
    lengths = torch.tensor([5, 60, 128, 1], dtype=torch.int32, device="cuda")
    first = torch.tensor([0, 0, 0, 0], device="cuda")
    before = torch.tensor([1000] * 4, dtype=torch.int32, device="cuda")
    members = torch.tensor([[0, 1, 2, 3], [-1] * 4], dtype=torch.int32, device="cuda")
    prefixes = Prefixes(first, before, members, 2048)

    def run(impl: str) -> torch.Tensor:
        return decode_attention(q, k, k, starts, lengths, max_length=128, prefixes=prefixes, impl=impl)

    run("triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run("triton")
    first.copy_(torch.tensor([0, 1024, 0, 1024]))
    before.copy_(torch.tensor([300, 700, 300, 0]))
    members.copy_(torch.tensor([[0, 2, -1, -1], [1, -1, -1, -1]]))
    graph.replay()
    torch.testing.assert_close(out, run("reference"), rtol=2e-3, atol=2e-3)
