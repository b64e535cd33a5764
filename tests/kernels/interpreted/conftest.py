"""Conversions as a GPU makes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

TORCH = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp64": torch.float64,
}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@pytest.fixture
def rounding_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter truncates where the GPU rounds to nearest (even): let torch convert instead."""

    def convert(data: np.ndarray, source: Any, target: Any, rounding_mode: object) -> np.ndarray:
        into = TORCH[target.name]
        bits = torch.frombuffer(bytearray(data.tobytes()), dtype=TORCH[source.name]).to(into)
        return np.frombuffer(bits.view(torch.uint8).numpy().tobytes(), UNSIGNED[into.itemsize]).reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
