"""The grouped products' Triton kernel, interpreted: tiles, masks, both orders of the operands."""

from __future__ import annotations

import pytest

from tests.kernels import grouped_cases as cases
from tests.kernels.grouped_cases import Case


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_grouped_linear(case: Case, poisoned: None, rounding_to_nearest: None) -> None:
    cases.check(case, "triton", "cpu")
