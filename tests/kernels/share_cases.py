"""The semantics of budgets shared among the heads of a query block, as checks that every implementation must pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.block_selection import share_budgets

FLOOR, CAP = 0.2, 4.0


def _shares(x: Tensor) -> Tensor:
    """Shares of attention of very different heads: some have it in few blocks, some in all."""
    sharpness = torch.linspace(0.2, 6.0, x.shape[1])[:, None, None]
    return (x * sharpness).softmax(-1)


def _with_nan(x: Tensor) -> Tensor:
    scores = _shares(x).masked_fill(x > 0.8, torch.nan)
    scores[:, 0] = torch.nan
    return scores


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "shares": _shares,
    "normal": lambda x: x,
    "ties": lambda x: (2 * x).round() / 2,
    "equal": lambda x: torch.full_like(x, 0.25),
    "zeros": lambda x: torch.where(x > 0, 0.0, -0.0),
    "underflow": lambda x: torch.exp(60 * x - 90),
    "hidden": lambda x: torch.where(x < 0.3, -torch.inf, x),
    "all hidden": lambda x: torch.full_like(x, -torch.inf),
    "infinite": lambda x: torch.where(x > 1, torch.inf, x),
    "nan": _with_nan,
    "all nan": lambda x: torch.full_like(x, torch.nan),
}


def random_case(
    kind: str, heads: int, rows: int, first_row: int, batch: int = 1, past: int = 0
) -> tuple[Tensor, Tensor]:
    """Scores [N, H, rows, first_row + rows + past] and budgets up to the whole row."""
    generator = torch.Generator().manual_seed(heads + rows)
    n = first_row + rows
    scores = KINDS[kind](torch.randn(batch, heads, rows, n + past, generator=generator))
    return scores, torch.randint(1, n // 2 + 2, (rows,), dtype=torch.int32, generator=generator)


def spelled_out(scores: Tensor, budgets: Tensor, first_row: int, sink: int, local: int) -> Tensor:
    """The definition row by row: the least threshold among all floats at which the count changes."""
    N, H, rows, _ = scores.shape
    counts = torch.zeros(N, H, rows, dtype=torch.int32)
    for n in range(N):
        for r in range(rows):
            i, budget = first_row + r, int(budgets[r])
            free = [j for j in range(i + 1) if sink <= j <= i - local]
            forced = i + 1 - len(free)
            own, most = (int((share * budgets[r].float()).ceil()) - forced for share in (FLOOR, CAP))
            own = max(0, min(own, len(free)))
            most = max(own, min(most, len(free)))
            budget = max(budget, forced)
            candidates = scores[n, :, r][:, free]

            def keep(t: float, x: Tensor = candidates, low: int = own, high: int = most, more: int = forced) -> Tensor:
                return more + (x > t).sum(-1).clamp(low, high)

            thresholds = candidates.unique().tolist()
            for t in [-torch.inf, *sorted(t for t in thresholds if t == t)]:
                if int(keep(t).sum()) <= H * min(budget, i + 1):
                    counts[n, :, r] = keep(t)
                    break
            if budget > i:
                counts[n, :, r] = i + 1
    return counts


def check_definition(kind: str, impl: str, device: str) -> None:
    """Against the definition, in rows from the first one, for random, tiny and boundless budgets."""
    for first_row in (0, 23):
        scores, random_budgets = random_case(kind, 3, 7, first_row, batch=2, past=3)
        tiny, boundless = torch.ones_like(random_budgets), torch.full_like(random_budgets, 1 << 30)
        for budgets, sink, local in ((random_budgets, 2, 1), (random_budgets, 0, 3), (tiny, 2, 3), (boundless, 4, 4)):
            wanted = spelled_out(scores, budgets, first_row, sink, local)
            got = _share(scores, budgets, impl, device, first_row=first_row, sink_blocks=sink, local_blocks=local)
            assert torch.equal(got, wanted)


def check_same(kind: str, heads: int, rows: int, first_row: int, impl: str, device: str) -> None:
    """Against the reference; columns above the diagonal hold NaN, rows lie in a wider tensor at an odd stride."""
    scores, budgets = random_case(kind, heads, rows, first_row, past=5)
    i, j = torch.arange(first_row, first_row + rows)[:, None], torch.arange(scores.shape[-1])
    spoiled = torch.nn.functional.pad(scores.masked_fill(j > i, torch.nan), (1, 0))[..., 1:]
    wanted = _share(scores, budgets, "reference", "cpu", first_row=first_row)
    assert torch.equal(_share(spoiled, budgets, impl, device, first_row=first_row), wanted)


def check_bounds(impl: str, device: str) -> None:
    """H budgets are used up exactly where scores are distinct; floor and cap hold; full rows are full."""
    H, rows, first_row = 8, 30, 40
    scores, budgets = random_case("shares", H, rows, first_row)
    budgets = budgets.clamp(min=8)
    budgets[3] = 1000
    counts = _share(scores, budgets, impl, device, first_row=first_row)
    causal = torch.arange(first_row + 1, first_row + rows + 1)
    assert torch.equal(counts.sum(1)[0], H * budgets.minimum(causal))
    floor = (FLOOR * budgets).ceil().clamp(min=8).minimum(causal)
    cap = (CAP * budgets).ceil().minimum(causal)
    assert ((floor <= counts) & (counts <= cap)).all()
    assert (counts[:, :, 3] == causal[3]).all()
    assert (counts.amax(1) > 2 * counts.amin(1)).any()
    # Every head's least kept and best dropped block, where neither bound holds it: one threshold parts them.
    i, j = torch.arange(first_row, first_row + rows)[:, None], torch.arange(scores.shape[-1])
    ranked = scores[0].masked_fill((j > i) | (j < 4) | (j > i - 4), -torch.inf).sort(-1, descending=True).values
    kept = (counts[0] - 8).long()[..., None]
    least = ranked.gather(-1, (kept - 1).clamp(min=0))[..., 0]
    best = ranked.gather(-1, kept.clamp(max=ranked.shape[-1] - 1))[..., 0]
    least, best = least.masked_fill(counts[0] <= floor, torch.inf), best.masked_fill(counts[0] >= cap, -torch.inf)
    assert (least.amin(0) > best.amax(0)).all()


def check_plain_cases(impl: str, device: str) -> None:
    """Heads alike share evenly; a head that has all the mass takes it up to the cap; equal scores keep the floor."""
    H, n, budget = 4, 101, 20
    budgets = torch.tensor([budget], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    alike = torch.rand(n, generator=generator).expand(1, H, 1, n).contiguous()
    assert _share(alike, budgets, impl, device, first_row=100).flatten().tolist() == [budget] * H

    hot = torch.full((1, H, 1, n), 1e-9) * torch.rand(1, H, 1, n, generator=generator)
    hot[:, 2] = 0.5 + torch.rand(n, generator=generator) / 2
    assert _share(hot, budgets, impl, device, first_row=100)[0, 2, 0] == H * budget - 3 * 8, "below its cap of 80"
    few = _share(hot, budgets, impl, device, first_row=100, sink_blocks=0, local_blocks=1)[0, :, 0]
    assert few.tolist() == [4, 4, H * budget - 3 * 4, 4], "the others keep their floor"
    capped = share_budgets(hot, budgets, first_row=100, floor=0.5, cap=1.5, impl="reference")
    assert _share(hot, budgets, impl, device, first_row=100, floor=0.5, cap=1.5).equal(capped)
    assert capped[0, 2, 0] == 30
    assert capped.sum() == H * budget, "what the cap denies one head goes to the others"
    fixed = _share(hot, budgets, impl, device, first_row=100, floor=1.0, cap=1.0)
    assert fixed.flatten().tolist() == [budget] * H

    equal = torch.full((1, H, 1, n), 0.01)
    only_own = _share(equal, torch.tensor([60], dtype=torch.int32), impl, device, first_row=100)
    assert only_own.flatten().tolist() == [12] * H


def check_invariances(impl: str, device: str) -> None:
    """A row depends on no other row, no batch neighbour and no later column; heads may come in any order."""
    scores, budgets = random_case("shares", 5, 24, 9, batch=3)
    whole = _share(scores, budgets, impl, device, first_row=9)
    for size in (1, 7):
        parts = [
            _share(scores[:, :, r : r + size, : 9 + r + size], budgets[r : r + size], impl, device, first_row=9 + r)
            for r in range(0, 24, size)
        ]
        assert torch.equal(torch.cat(parts, 2), whole)
    assert torch.equal(_share(scores[1:2], budgets, impl, device, first_row=9), whole[1:2])
    assert torch.equal(_share(scores.flip(1), budgets, impl, device, first_row=9), whole.flip(1))


def _share(scores: Tensor, budgets: Tensor, impl: str, device: str, **options: float) -> Tensor:
    options = {"floor": FLOOR, "cap": CAP} | options
    got = share_budgets(scores.to(device), budgets.to(device), impl=impl, **options)  # type: ignore[arg-type]
    assert got.dtype == torch.int32
    return got.cpu()
