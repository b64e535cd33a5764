"""Budgets shared among heads under Triton's interpreter."""

from __future__ import annotations

import pytest

from tests.kernels import share_cases as cases

IMPLS = ["reference", "triton"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_the_definition(kind: str, impl: str, poisoned: None) -> None:
    cases.check_definition(kind, impl, "cpu")


@pytest.mark.parametrize("kind", ["shares", "ties", "nan"])
@pytest.mark.parametrize(("heads", "rows", "first_row"), [(1, 5, 0), (7, 2, 130), (32, 2, 1500), (33, 1, 600)])
def test_equals_the_reference(kind: str, heads: int, rows: int, first_row: int, poisoned: None) -> None:
    cases.check_same(kind, heads, rows, first_row, "triton", "cpu")


@pytest.mark.parametrize("impl", IMPLS)
def test_budgets_are_used_up_within_floor_and_cap(impl: str, poisoned: None) -> None:
    cases.check_bounds(impl, "cpu")


@pytest.mark.parametrize("impl", IMPLS)
def test_plain_cases(impl: str, poisoned: None) -> None:
    cases.check_plain_cases(impl, "cpu")


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_depends_on_nothing_else(impl: str, poisoned: None) -> None:
    cases.check_invariances(impl, "cpu")
