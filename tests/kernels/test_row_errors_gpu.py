"""Attention on a GPU row by row: long rows, values far from zero, in 16 bits and in fp8."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from kernels.block_sparse_attention import block_sparse_attention, choose_block_sparse_attention
from kernels.block_sparse_attention_fp8 import block_sparse_attention_fp8, choose_block_sparse_attention_fp8
from kernels.fp8_heads import fp8_obstacle
from tools.benchmark._attention_cases import random_selection
from tools.benchmark._attention_fp8 import Fp8Layer
from tools.benchmark._row_errors import BLOCK, even_operands, plain_operands, problem_of, row_errors

pytestmark = pytest.mark.gpu


@dataclass(frozen=True)
class Case:
    """queries from token `start` on; density None: dense."""

    queries: int
    density: float | None = None
    head_dim: int = 128
    heads: int = 8
    kv_heads: int = 2
    start: int = 0
    window: int | None = None

    def __str__(self) -> str:
        kept = "dense" if self.density is None else f"{self.density:.0%}"
        window = f"-window{self.window}" if self.window else ""
        return f"{self.queries}@{self.start}-{self.heads}/{self.kv_heads}x{self.head_dim}-{kept}{window}"


CASES = [
    *(Case(131_072, density) for density in (None, 0.25)),
    *(Case(40_001, density, head_dim=dim) for dim in (64, 128, 256) for density in (None, 0.25)),
    *(Case(16_411, density, heads=heads, kv_heads=kv) for heads, kv in ((4, 4), (8, 1)) for density in (None, 0.25)),
    *(Case(30_000, density, head_dim=dim, window=9000) for dim in (64, 128, 256) for density in (None, 0.25)),
    Case(999, start=130_048),
    Case(333, start=100_001, head_dim=64),
]


@pytest.mark.parametrize("impl", ["gluon", "triton"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_row_is_right(case: Case, precision: str, impl: str, poisoned: None) -> None:
    if precision == "fp8" and (missing := fp8_obstacle(torch.device("cuda", 0))):
        pytest.skip(missing)
    q, k, v = even_operands(case.heads, case.kv_heads, case.queries, case.head_dim, "cuda", start=case.start)
    selection = None if case.density is None else random_selection(q, case.density)
    options = {"query_start": case.start, "window": case.window}
    if precision == "fp8":
        # A mean query whose products with the keys can be told from nothing, and leave the weights nearly even.
        layer = Fp8Layer(q + 0.25 * torch.randn_like(q[:, :, :1]), k, v)
        q8, (k8, vt8) = layer.q8, layer.arenas
        choice = choose_block_sparse_attention_fp8(q8, BLOCK, k=k8[None], vt=vt8[None], **options)  # type: ignore[arg-type]
    else:
        choice = choose_block_sparse_attention(q, BLOCK, k=k, v=v, **options)  # type: ignore[arg-type]
    if impl == "gluon" and choice.impl != "gluon":
        pytest.skip(choice.reason)
    options |= {"return_lse": True, "impl": impl}  # type: ignore[dict-item]
    if precision == "fp8":
        found = block_sparse_attention_fp8(
            q8, k8[None], vt8[None], layer.scales, selection, bias=layer.bias[None], **options
        )  # type: ignore[arg-type]
        operands = layer.biased
    else:
        found = block_sparse_attention(q, k, v, selection, **options)  # type: ignore[arg-type]
        operands = plain_operands(q, k, v)
    assert isinstance(found, tuple)
    out, lse = found
    errors = row_errors(out, operands, selection, start=case.start, window=case.window, lse=lse)
    assert errors[-1].row == case.start + case.queries - 1
    assert problem_of(errors) == "", errors
