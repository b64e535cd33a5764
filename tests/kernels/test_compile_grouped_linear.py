"""The grouped products compiled for GPUs that are not there: no spills, wgmma not serialised, room in shared memory."""

from __future__ import annotations

import pytest
import torch

from kernels.grouped_linear import group_rows
from kernels.quantize import FP8, QuantizedRows
from tests.kernels import offline, sass

ADA, HOPPER = (8, 9), (9, 0)
SHARED_LIMIT = {ADA: 99 * 1024, HOPPER: 227 * 1024}


@pytest.mark.parametrize("capability", [ADA, HOPPER], ids=["sm89", "sm90"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "precise"])
@pytest.mark.parametrize("tokens", [1, 100, 4096], ids=["decode", "some", "prefill"])
@pytest.mark.parametrize(("N", "K", "experts", "bias"), [(1536, 2048, 16, False), (2880, 2880, 8, True)])
def test_grouped_linear(
    N: int, K: int, experts: int, bias: bool, tokens: int, fast: bool, capability: tuple[int, int]
) -> None:
    from kernels.grouped_linear import triton

    groups = group_rows(torch.zeros(tokens, 4, dtype=torch.int64), experts)
    weight = torch.empty(experts, N, K, dtype=FP8, device="meta")
    rows = QuantizedRows(
        torch.empty(tokens, K, dtype=FP8, device="meta"), torch.empty(tokens, 1, device="meta"), torch.bfloat16
    )
    scale = torch.empty(experts, N, device="meta")
    biases = torch.empty(experts, N, dtype=torch.bfloat16, device="meta") if bias else None
    factors = torch.empty(tokens * 4, dtype=torch.bfloat16, device="meta")
    with offline.compiling(capability) as compiled:
        triton.grouped_linear(weight, scale, rows, groups, biases, factors, fast)
    report = offline.report(compiled[0])
    assert report.spills == 0, str(report)
    assert report.shared <= SHARED_LIMIT[capability], str(report)
    # Sums that are promoted make each wgmma wait for the one before it.
    assert not report.warnings or (not fast and all("C7517" in line for line in report.warnings)), str(report)
    if capability == HOPPER:
        assert any("QGMMA" in each.opcode for each in sass.disassemble(compiled[0].asm["cubin"])[0])
        assert not sass.undefined_reads(compiled[0].asm["cubin"])
