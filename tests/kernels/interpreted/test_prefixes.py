"""Decode attention of rows that share a prefix, under Triton's interpreter (float16 and float32)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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


@pytest.mark.parametrize("fp8", [False, True], ids=["kv16", "kv8"])
def test_what_no_group_wrote_is_not_read(fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory holds ordinary numbers as often as NaN, which a maximum passes over."""
    empty = torch.empty

    def left_over(*shape: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*shape, **options)
        return tensor.fill_(7.0) if tensor.is_floating_point() and tensor.element_size() > 1 else tensor

    monkeypatch.setattr(torch, "empty", left_over)
    cases.check(cases.CASES[0], "triton", "cpu", fp8)
    cases.check(cases.CASES[1], "triton", "cpu", fp8)
