"""The skinny products compiled for GPUs that are not there: fp8 tensor cores, no spills, room for several programs."""

from __future__ import annotations

import pytest
import torch

from kernels.quantize import FP8, QuantizedRows
from tests.kernels import offline, sass

ADA, HOPPER = (8, 9), (9, 0)
SHARED = {ADA: 99 * 1024, HOPPER: 227 * 1024}
INSTRUCTION = {ADA: "QMMA", HOPPER: "QGMMA"}


@pytest.mark.parametrize("capability", [ADA, HOPPER], ids=["sm89", "sm90"])
@pytest.mark.parametrize("M", [1, 64])
def test_skinny_linear(M: int, capability: tuple[int, int]) -> None:
    from kernels.skinny_linear import triton

    weight = torch.empty(4096, 14336, dtype=FP8, device="meta")
    rows = QuantizedRows(
        torch.empty(M, 14336, dtype=FP8, device="meta"), torch.empty(M, 1, device="meta"), torch.bfloat16
    )
    with offline.compiling(capability) as compiled:
        triton.skinny_linear(weight, torch.empty(4096, device="meta"), rows, None)
    product, parts = map(offline.report, compiled)
    assert product.spills == parts.spills == 0, f"{product}\n{parts}"
    # Sums that are promoted make each wgmma wait for the one before it.
    assert all("C7517" in line for line in product.warnings), str(product)
    # The kernel waits for memory: what one program loads ahead does not suffice.
    assert (1 if capability == ADA else 2) * product.shared <= SHARED[capability], str(product)
    found = {each.opcode.split(".")[0] for each in sass.disassemble(compiled[0].asm["cubin"])[0]}
    assert INSTRUCTION[capability] in found
