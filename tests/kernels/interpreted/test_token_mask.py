"""The Triton kernel that masks tokens, interpreted: words, rests of them, rows that are skipped."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import token_mask_cases as cases


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_matches_the_bits(dtype: torch.dtype) -> None:
    cases.check(dtype, "triton", "cpu")
