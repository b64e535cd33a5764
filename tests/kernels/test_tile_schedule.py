"""The Hopper kernels' tile schedule, the kernels' own code run on plain numbers: every tile once, and even loads."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from kernels._common import hopper_gluon
from kernels.block_selection import tile_order

PROGRAMS = 132  # multiprocessors of an H100
TILE_COST = 2.5  # prologue and epilogue, in blocks


def tiles_of_programs(
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    batch: int,
    kv_heads: int,
    group: int,
    most: int = PROGRAMS,
    order: torch.Tensor | None = None,
) -> list[list[tuple[int, int, int]]]:
    """For each program (batch, head, query block) of its tiles, in turn. order: as BlockSelection has it."""
    flat = [] if order is None else order.flatten().tolist()
    programs = min(most, batch * kv_heads * group * rows)
    lanes = batch * kv_heads
    program = SimpleNamespace(id=0)
    language = SimpleNamespace(
        num_programs=lambda axis: programs,
        program_id=lambda axis: program.id,
        cdiv=lambda a, b: -(-a // b),
        where=lambda condition, a, b: a if condition else b,
        load=lambda place, mask, other: flat[place] if mask else other,
    )
    monkeypatch.setattr(hopper_gluon, "gl", language)
    loads = []
    for program.id in range(programs):
        turns = [
            hopper_gluon.tile_of.fn(turn, 0, rows, lanes, kv_heads, group, order is not None)
            for turn in range(hopper_gluon.count_turns.fn(rows, lanes, group))
        ]
        assert all(kv_head == head // group for there, _, head, kv_head, _ in turns if there)
        loads.append([(n, head, row) for there, n, head, _, row in turns if there])
    return loads


@pytest.mark.parametrize("rows", [1, 2, 33, 64, 101])
@pytest.mark.parametrize(("batch", "kv_heads", "group"), [(1, 8, 4), (1, 1, 8), (1, 4, 7), (2, 3, 5), (1, 32, 1)])
def test_every_tile_once(monkeypatch: pytest.MonkeyPatch, rows: int, batch: int, kv_heads: int, group: int) -> None:
    loads = tiles_of_programs(monkeypatch, rows, batch, kv_heads, group)
    everything = [(n, head, row) for n in range(batch) for head in range(kv_heads * group) for row in range(rows)]
    assert sorted(tile for load in loads for tile in load) == everything
    assert all(loads), "a program without a tile"


@pytest.mark.parametrize("density", [1.0, 0.25])
@pytest.mark.parametrize("tokens", [4096, 8192, 12288, 16384, 32768])
def test_loads_are_even(monkeypatch: pytest.MonkeyPatch, tokens: int, density: float) -> None:
    loads = tiles_of_programs(monkeypatch, tokens // 128, 1, 8, 4)
    costs = [
        sum(min(row + 1, max(8, math.ceil(density * (row + 1)))) + TILE_COST for _, _, row in load) for load in loads
    ]
    assert max(costs) <= 1.03 * sum(costs) / len(costs)


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize(("batch", "kv_heads", "group"), [(1, 8, 4), (1, 4, 7), (2, 3, 5), (1, 32, 1)])
def test_the_order_by_counts(monkeypatch: pytest.MonkeyPatch, rows: int, batch: int, kv_heads: int, group: int) -> None:
    """Every tile of a KV head once, counted as tile_of does, the largest first and ties as they came."""
    [load] = tiles_of_programs(monkeypatch, rows, batch, kv_heads, group, most=1)
    counts = torch.randint(1, 9, (batch, kv_heads * group, rows), generator=torch.Generator().manual_seed(rows))
    order = tile_order(counts.int(), kv_heads)
    assert order.dtype == torch.int32
    assert order.shape == (batch, kv_heads, group * rows)
    for lane, tiles in enumerate(order.flatten(0, 1).tolist()):
        size = [int(counts[tile]) for tile in load[lane * group * rows : (lane + 1) * group * rows]]
        assert tiles == sorted(range(group * rows), key=lambda tile: -size[tile])


def test_in_order_of_their_counts_loads_are_evener(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that keep between a fifth and four times of a row's budget, as where they share it."""
    rows, kv_heads, group = 128, 8, 4
    generator = torch.Generator().manual_seed(0)
    counts = (50 * torch.rand(1, kv_heads * group, rows, generator=generator).mul(3).sub(1.6).exp2()).int() + 1

    def worst(order: torch.Tensor | None) -> float:
        loads = tiles_of_programs(monkeypatch, rows, 1, kv_heads, group, order=order)
        assert sum(map(len, loads)) == len({tile for load in loads for tile in load}) == counts.numel()
        costs = [sum(float(counts[tile]) + TILE_COST for tile in load) for load in loads]
        return max(costs) / (sum(costs) / len(costs))

    assert worst(tile_order(counts, kv_heads)) < 1.1 < worst(None)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="H a multiple of 3 KV heads"):
        tile_order(torch.ones(1, 4, 2, dtype=torch.int32), 3)
