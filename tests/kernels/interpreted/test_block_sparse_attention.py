"""The portable Triton path, interpreted: logic, masks, strides and offsets on small shapes.

No bfloat16: Triton's interpreter multiplies its bit patterns as integers.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention_cases import Case, check

HALF, SINGLE = torch.float16, torch.float32
CASES = [
    Case(1, block_size=16, head_dim=64, dtype=HALF),
    Case(127, block_size=32, head_dim=64, heads=2, kv_heads=1, dtype=HALF),
    Case(129, block_size=64, head_dim=64, heads=2, batch=2, unknown=70, dtype=HALF),
    Case(80, block_size=16, head_dim=64, heads=2, dtype=SINGLE, keep=0.3),
    Case(50, start=96, block_size=32, head_dim=64, dtype=HALF, unknown=33),
    Case(200, start=256, heads=4, kv_heads=1, dtype=HALF),
    Case(257, block_size=256, head_dim=64, heads=2, kv_heads=1, dtype=HALF),
    Case(70, block_size=32, head_dim=96, heads=2, dtype=HALF),
    Case(130, head_dim=256, heads=2, kv_heads=1, dtype=HALF),
    Case(70, start=64, block_size=64, head_dim=512, heads=2, kv_heads=1, dtype=HALF),
    Case(40, start=30, head_dim=320, keep=None, heads=2, kv_heads=1, dtype=SINGLE),
    Case(190, head_dim=64, keep=None, heads=2, batch=2, unknown=5, dtype=HALF),
    Case(99, start=37, head_dim=96, keep=None, heads=2, dtype=HALF),
    Case(70, start=130, head_dim=64, keep=None, heads=2, window=50, dtype=SINGLE),
    Case(100, block_size=32, head_dim=64, heads=2, window=40, dtype=SINGLE),
    Case(70, block_size=64, head_dim=64, heads=2, window=1, dtype=SINGLE, keep=1.0),
    Case(96, block_size=32, head_dim=64, heads=3, kv_heads=3, keep=1.0, scale=0.3, dtype=HALF),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: Case, poisoned: None) -> None:
    check(case, "triton", "cpu")
