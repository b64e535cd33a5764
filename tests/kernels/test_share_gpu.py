"""Budgets shared among heads on a GPU: against the reference, in graphs, up to a million tokens."""

from __future__ import annotations

import pytest
import torch

from kernels.block_selection import select_blocks, share_budgets, tile_order
from tests.kernels import share_cases as cases

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", cases.KINDS)
def test_the_definition(kind: str, poisoned: None) -> None:
    cases.check_definition(kind, "triton", "cuda")


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize(
    ("heads", "rows", "first_row"),
    [(32, 64, 960), (32, 3, 8189), (28, 40, 0), (8, 5, 5000), (64, 3, 1500), (128, 2, 700), (1, 9, 100), (33, 1, 0)],
)
def test_equals_the_reference(kind: str, heads: int, rows: int, first_row: int, poisoned: None) -> None:
    cases.check_same(kind, heads, rows, first_row, "triton", "cuda")


def test_budgets_are_used_up_within_floor_and_cap(poisoned: None) -> None:
    cases.check_bounds("triton", "cuda")


def test_plain_cases(poisoned: None) -> None:
    cases.check_plain_cases("triton", "cuda")


def test_a_row_depends_on_nothing_else(poisoned: None) -> None:
    cases.check_invariances("triton", "cuda")


def test_offsets_past_2_to_the_31() -> None:
    n = 8192
    scores = torch.empty(1, 33, n, n, device="cuda")
    assert scores.numel() > 1 << 31
    last = scores[:, :, -2:]
    last.copy_(torch.rand_like(last))
    budgets = torch.full((2,), 900, dtype=torch.int32, device="cuda")
    options = {"first_row": n - 2, "floor": 0.2, "cap": 4.0}
    got = share_budgets(last, budgets, **options)  # type: ignore[arg-type]
    assert torch.equal(got, share_budgets(last.contiguous(), budgets, impl="reference", **options))  # type: ignore[arg-type]


def test_no_host_synchronisation() -> None:
    """From scores to the selection and its order: captured in a CUDA graph, replayed on other scores."""
    scores, budgets = (x.to("cuda") for x in cases.random_case("shares", 32, 64, 192))

    def everything() -> tuple[torch.Tensor, ...]:
        counts = share_budgets(scores, budgets, first_row=192, floor=0.2, cap=4.0)
        selection = select_blocks(scores, counts, first_row=192, max_blocks=256)
        return counts, selection.counts, tile_order(counts, 8), selection.indices

    everything()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    scores.copy_(scores.flip(1))
    graph.replay()
    wanted = everything()
    assert all(torch.equal(got, expected) for got, expected in zip(captured[:3], wanted[:3], strict=True))
    valid = torch.arange(256, device="cuda") < captured[0][..., None]
    assert torch.equal(captured[3][valid], wanted[3][valid])
    assert len(captured[0].unique()) > 20
