"""Block scores, block selection and decode attention under Triton's interpreter. Its matrix product misreads bfloat16,
so types here are float16 and float32; bfloat16 is tested on a GPU."""

from __future__ import annotations

import pytest
import torch

from kernels import device
from tests.kernels import selection_cases as cases
from tests.kernels.selection_cases import FP16, Decode, Scores

IMPLS = ["reference", "triton"]
SHAPES = [
    Scores(1),
    Scores(127, head_dim=96, every=32),
    Scores(128, dtype=FP16),
    Scores(97, batch=2, heads=2, block_size=16, stride=16, every=1),
    Scores(300, head_dim=128, block_size=128, stride=16, every=8, contiguous=True),
    Scores(5, block_size=64, stride=16, dtype=FP16),
    Scores(70, heads=2, kv_heads=1, head_dim=512, dtype=FP16),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_scores(case: Scores, impl: str, poisoned: None) -> None:
    cases.check_oam(case, impl, "cpu")
    cases.check_sample(case, impl, "cpu")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("blocks", [1, 2, 7])
@pytest.mark.parametrize("estimator", ["oam", "sample"])
def test_chunks_change_nothing(estimator: str, blocks: int, impl: str, poisoned: None) -> None:
    case = Scores(150, heads=2, kv_heads=1, block_size=16, stride=4, every=2)
    cases.check_chunks(case, impl, "cpu", blocks, estimator)


@pytest.mark.parametrize("impl", IMPLS)
def test_later_tokens_and_neighbours_change_nothing(impl: str, poisoned: None) -> None:
    cases.check_causal(Scores(110, batch=2, heads=2, kv_heads=1), impl, "cpu")


@pytest.mark.parametrize("impl", IMPLS)
def test_without_entries_above_the_diagonal(impl: str, poisoned: None) -> None:
    cases.check_unfilled(Scores(300, heads=4, kv_heads=2, block_size=16, stride=4), impl, "cpu")


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize(("rows", "first_row"), [(21, 0), (2, 260), (1, 0)])
def test_selection(kind: str, rows: int, first_row: int, poisoned: None) -> None:
    cases.check_selection(kind, rows, first_row, "triton", "cpu")


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_is_never_selected(impl: str, poisoned: None) -> None:
    # Where NaN begin, and where budgets change: a row takes the interpreter 40 ms.
    cases.check_selection_of_nan(impl, "cpu", parts=((48, 62), (108, 124), (138, 142)))


@pytest.mark.parametrize("impl", IMPLS)
def test_budgets_for_each_head(impl: str, poisoned: None) -> None:
    cases.check_selection_by_heads(impl, "cpu")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "case",
    [
        Decode((0, 1, 129, 700)),
        Decode((127, 128, 1000), head_dim=96, dtype=FP16, window=130, token_major=True),
        Decode((33,), heads=3, kv_heads=3, head_dim=256, window=5),
        Decode((0, 1, 129, 700), head_dim=64, sinks=True),
        Decode((300, 1), heads=2, kv_heads=1, head_dim=512),
        Decode((700, 3), dtype=FP16, window=128, token_major=True, sinks=True),
    ],
    ids=str,
)
def test_decode(case: Decode, impl: str, poisoned: None) -> None:
    cases.check_decode(case, impl, "cpu")


def test_more_shares_than_one_merging_step_takes(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    monkeypatch.setattr(device, "multiprocessors", lambda _: 132)
    cases.check_decode(Decode((0, 200, 9000), heads=2, kv_heads=1, head_dim=256), "triton", "cpu")


def test_powers_of_two_are_asked_for() -> None:
    q = torch.zeros(1, 1, 96, 64)
    with pytest.raises(ValueError, match="powers of two"):
        cases.oam(Scores(96, block_size=48, stride=8), q, q, q, "triton")
