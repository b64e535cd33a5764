"""Decode attention of rows that share a prefix, under Triton's interpreter (float16 and float32)."""

from __future__ import annotations

import pytest

from tests.kernels import prefix_cases as cases
from tests.kernels.prefix_cases import Shared

IMPLS = ["reference", "triton"]


@pytest.mark.parametrize("fp8", [False, True], ids=["kv16", "kv8"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_decode(case: Shared, impl: str, fp8: bool, poisoned: None) -> None:
    cases.check(case, impl, "cpu", fp8)


@pytest.mark.parametrize("fp8", [False, True], ids=["kv16", "kv8"])
@pytest.mark.parametrize("impl", IMPLS)
def test_company_changes_nothing(impl: str, fp8: bool, poisoned: None) -> None:
    cases.check_company(impl, "cpu", fp8)
