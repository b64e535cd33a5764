"""Decode attention of rows that share a prefix, on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels._common.fp8 import HeadScales, quantize, store_order
from kernels.decode_attention import Prefixes, decode_attention
from kernels.decode_attention_fp8 import decode_attention_fp8
from kernels.dispatch import hopper_unavailable
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

BF16_CASES = [replace(case, dtype=BF16) for case in cases.CASES]
# More queries than a program takes; drafts whose last keys lie in shares of their own; tiles of 64 queries.
OF_HOPPER = [
    Shared((questions(9000, *range(1, 129)),), heads=32, kv_heads=8, head_dim=64, dtype=BF16),
    Shared((((8193, 0), (8194, 0), (8195, 0), (8196, 0)), ((129, 0), (128, 0))), head_dim=128, dtype=BF16, sinks=True),
    Shared((questions(20_000, *range(1, 17)), questions(33, 4)), heads=32, kv_heads=8, head_dim=128, dtype=BF16),
]
hopper = pytest.mark.skipif(
    bool(not torch.cuda.is_available() or hopper_unavailable(torch.device("cuda"))), reason="needs a Hopper GPU"
)


def on_hopper(case: Shared) -> bool:
    return case.dtype == BF16 and case.head_dim in (64, 128) and case.window is None


@pytest.mark.parametrize("fp8", [False, True], ids=["kv16", "kv8"])
@pytest.mark.parametrize("case", [*cases.CASES, *BF16_CASES, *LARGE], ids=str)
def test_decode(case: Shared, fp8: bool, poisoned: None) -> None:
    if fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    cases.check(case, "triton", "cuda", fp8)


@pytest.mark.parametrize("fp8", [False, True], ids=["kv16", "kv8"])
def test_company_changes_nothing(fp8: bool, poisoned: None) -> None:
    if fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    cases.check_company("triton", "cuda", fp8)


@hopper
@pytest.mark.parametrize("case", [case for case in [*BF16_CASES, *LARGE, *OF_HOPPER] if on_hopper(case)], ids=str)
def test_decode_on_hopper(case: Shared, poisoned: None) -> None:
    cases.check(case, "gluon", "cuda", fp8=True)


@hopper
def test_company_changes_nothing_on_hopper(poisoned: None) -> None:
    cases.check_company("gluon", "cuda", fp8=True, dtype=BF16, windows=(None,))


@hopper
def test_small_weights_count_beside_a_large_one(poisoned: None) -> None:
    """One key that outweighs each of 100,000 others 2^24 times, and all of them together not: e4m3 beside the largest
    would be zero.
    """
    length, scale = 100_000, 2.0**-3
    q = torch.full((1, 8, 64), 1.0, device="cuda", dtype=BF16)
    keys, values = torch.zeros(2, 2, length + 96, 64, device="cuda")
    keys[:, 5], values[:, 5], values[:, 6:length] = 24 * 0.6931 / (64 * scale), 0.0, 1.0
    scales = HeadScales(*(torch.full((n,), 2.0**-6, device="cuda") for n in (8, 2, 2)))
    k8 = quantize(keys, scales.k[:, None, None])
    vt8 = store_order(quantize(values, scales.v[:, None, None]).mT.contiguous())
    prefixes = Prefixes(
        torch.zeros(1, dtype=torch.int64, device="cuda"), torch.tensor([length], dtype=torch.int32, device="cuda"),
        torch.zeros(1, 1, dtype=torch.int32, device="cuda"), length,
    )  # fmt: skip
    nothing = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    options: dict[str, Any] = {"max_length": 1, "scale": scale, "prefixes": prefixes}
    got, exact = (
        decode_attention_fp8(q, k8, vt8, scales, *nothing, impl=impl, **options) for impl in ("gluon", "reference")
    )
    torch.testing.assert_close(got, exact, rtol=2.0**-7, atol=0.0)


def test_hopper_needs_bfloat16() -> None:
    with pytest.raises(ValueError, match="impl='gluon' cannot run: the Hopper path"):
        cases.check(replace(cases.CASES[0], dtype=FP16), "gluon", "cuda", fp8=True)


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
