"""Products of a few rows with a weight: the reference, and what is refused."""

from __future__ import annotations

import pytest
import torch

from kernels.quantize import QuantizedRows
from kernels.skinny_linear import MAX_ROWS, skinny_linear
from tests.kernels import skinny_cases as cases
from tests.kernels.skinny_cases import Case


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_reference(case: Case, poisoned: None) -> None:
    cases.check(case, "reference", "cpu")


def test_what_does_not_fit_is_refused() -> None:
    weight, scale, rows, bias = cases.operands(Case(2, 32, 64, bias=True), "cpu")
    assert bias is not None
    many = QuantizedRows(rows.values.repeat(40, 1), rows.scales.repeat(40, 1), rows.dtype)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        skinny_linear(weight.float(), scale, rows)
    with pytest.raises(ValueError, match="contiguous float8_e4m3fn"):
        skinny_linear(weight.T, scale, rows)
    with pytest.raises(ValueError, match="multiple of 16, got 56"):
        skinny_linear(weight[:, :56].contiguous(), scale, rows)
    with pytest.raises(ValueError, match=rf"M at most {MAX_ROWS}, got \(80, 64\)"):
        skinny_linear(weight, scale, many)
    with pytest.raises(ValueError, match=r"contiguous float32 \[32\]"):
        skinny_linear(weight, scale[:16], rows)
    with pytest.raises(ValueError, match=r"bias must be contiguous \[32\]"):
        skinny_linear(weight, scale, rows, bias=bias[:16])
    with pytest.raises(ValueError, match="no gluon"):
        skinny_linear(weight, scale, rows, impl="gluon")
    assert torch.equal(skinny_linear(weight, scale, rows), skinny_linear(weight, scale, rows, impl="reference"))
