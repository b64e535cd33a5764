"""The skinny products' Triton kernels, interpreted: masks, parts and their sum, the same row in any company."""

from __future__ import annotations

import pytest

from tests.kernels import skinny_cases as cases
from tests.kernels.skinny_cases import Case


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_skinny_linear(case: Case, poisoned: None, rounding_to_nearest: None) -> None:
    cases.check(case, "triton", "cpu")


def test_company_changes_nothing(poisoned: None, rounding_to_nearest: None) -> None:
    cases.check_company("triton", "cpu", 64, 1040)
