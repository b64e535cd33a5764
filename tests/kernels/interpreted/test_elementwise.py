"""The Triton row-wise kernels, interpreted: masks, strides, roundings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels import elementwise_cases as cases


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("check", [cases.check_rms_norm, cases.check_fp8, cases.check_silu_mul, cases.check_rope])
def test_matches_float64(check: Any, dtype: torch.dtype, poisoned: None, rounding_to_nearest: None) -> None:
    check(dtype, "triton", "cpu")
