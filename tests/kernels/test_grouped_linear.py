"""Products with the weights of each row's expert: the reference, the tiles, and what is refused."""

from __future__ import annotations

import pytest
import torch

from kernels.grouped_linear import group_rows, grouped_linear
from kernels.quantize import quantize_rows
from tests.kernels import grouped_cases as cases
from tests.kernels.grouped_cases import Case


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_reference(case: Case, poisoned: None) -> None:
    cases.check(case, "reference", "cpu")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(
    ("tokens", "top", "experts", "lopsided"),
    [(1, 1, 1, False), (1, 8, 128, False), (16, 8, 128, False), (17, 8, 128, False), (400, 2, 5, False),
     (400, 2, 5, True), (4096, 4, 8, False), (4096, 4, 8, True)],
)  # fmt: skip
def test_tiles_hold_every_row_once(tokens: int, top: int, experts: int, lopsided: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ids = torch.rand(tokens, experts).argsort(-1)[:, :top].to(dtype)
    if lopsided:
        ids = torch.full_like(ids, experts - 2)
    groups = group_rows(ids, experts)
    seen: list[int] = []
    for expert, first, end in zip(
        groups.tile_expert.tolist(), groups.tile_first.tolist(), groups.tile_end.tolist(), strict=True
    ):
        rows = groups.order[first : max(first, min(end, first + groups.tile_rows))]
        assert (ids.reshape(-1)[rows.long()] == expert).all()
        seen += rows.tolist()
    assert sorted(seen) == list(range(tokens * top))


def test_what_does_not_fit_is_refused() -> None:
    weight, scale, x, ids, bias, factors = cases.operands(Case(4, 8, 2, 32, 64), "cpu")
    rows, groups = quantize_rows(x), group_rows(ids, 8)
    with pytest.raises(ValueError, match="integer ids"):
        group_rows(ids.float(), 8)
    with pytest.raises(ValueError, match="groups are of 9 experts, weight of 8"):
        grouped_linear(weight, scale, rows, group_rows(ids, 9))
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        grouped_linear(weight.float(), scale, rows, groups)
    with pytest.raises(ValueError, match="multiples of 16, got 32 and 56"):
        grouped_linear(weight[..., :56].contiguous(), scale, rows, groups)
    with pytest.raises(ValueError, match=r"rows must be \[M, 64\] with M dividing the 8 rows"):
        grouped_linear(weight, scale, quantize_rows(x[:3]), groups)
    with pytest.raises(ValueError, match=r"bias must be contiguous \[8, 32\]"):
        grouped_linear(weight, scale, rows, groups, bias=bias[:, :16])
    with pytest.raises(ValueError, match=r"factors must be contiguous \[8\]"):
        grouped_linear(weight, scale, rows, groups, factors=factors[:4])
    with pytest.raises(ValueError, match=r"scale must be contiguous float32 \[8, 32\]"):
        grouped_linear(weight, scale[:, :16], rows, groups)
