"""The Triton kernels that find drafts, interpreted: blocks, prefixes, ties, texts that repeat themselves."""

from __future__ import annotations

import pytest

from tests.kernels import lookup_cases as cases


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_matches_a_search_word_by_word(case: cases.Lookup, poisoned: None) -> None:
    cases.check(case, "triton", "cpu")
