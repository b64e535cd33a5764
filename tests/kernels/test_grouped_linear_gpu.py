"""Grouped products on a GPU: every row against float64, the same inside a CUDA graph, the same in any batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.grouped_linear import group_rows, grouped_linear
from kernels.quantize import quantize_rows
from tests.kernels import grouped_cases as cases
from tests.kernels.grouped_cases import Case

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
LARGE = [
    Case(1, 128, 8, 1536, 2048, factors=True),
    Case(17, 128, 8, 2048, 768, shared=False, factors=True),
    Case(333, 32, 4, 2880, 2880, bias=True, factors=True),
    Case(700, 32, 4, 2048, 768, fast=False),
    Case(1500, 16, 4, 1536, 2048),
    Case(700, 16, 4, 1536, 2048, fast=False),
]


@pytest.mark.parametrize("case", [*cases.CASES, *LARGE], ids=str)
def test_grouped_linear(case: Case, poisoned: None) -> None:
    cases.check(replace(case, dtype=BF16), "triton", "cuda")


def test_a_graph_follows_other_ids() -> None:
    """Nothing is read on the host: the graph of one routing computes another."""
    weight, scale, x, ids, _, factors = cases.operands(Case(4, 8, 2, 64, 128, dtype=BF16), "cuda")
    for tokens in (3, 40):  # a tile for each row, and sorted rows
        x, ids = x[:1].repeat(tokens, 1), ids[:1].repeat(tokens, 1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            grouped_linear(weight, scale, quantize_rows(x), group_rows(ids, 8))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = grouped_linear(weight, scale, quantize_rows(x), group_rows(ids, 8))
        ids.copy_(torch.rand(tokens, 8, device="cuda").argsort(-1)[:, :2])
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, grouped_linear(weight, scale, quantize_rows(x), group_rows(ids, 8)))


def test_a_token_does_not_depend_on_its_batch() -> None:
    weight, scale, x, ids, _, _ = cases.operands(Case(64, 128, 8, 256, 2048, dtype=BF16), "cuda")
    together = grouped_linear(weight, scale, quantize_rows(x), group_rows(ids, 128))
    for token in (0, 31, 63):
        alone = grouped_linear(weight, scale, quantize_rows(x[token : token + 1]), group_rows(ids[token], 128))
        assert torch.equal(alone, together[8 * token : 8 * token + 8])
