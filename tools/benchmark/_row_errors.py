"""Attention row by row against float64 of the same operands: does a kernel lose part of what it adds up?

Tensor cores that sum fp8 keep some 14 bits and cut off the rest, so that a sum over a whole row comes out too small, by
more with every key. It shows where values do not cancel (0.5 to 1.5) and weights are nearly even, and in long rows,
which an error that is pooled over all rows drowns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.block_selection import BlockSelection

BLOCK = 128
# Tokens whose rows are looked at, and the last one besides.
ROWS = (1023, 2558, 5000, 8191, 16_383, 25_001, 32_767, 50_002, 65_535, 98_303, 131_071)
BIAS_LIMIT, ERROR_LIMIT, LSE_LIMIT = 1e-3, 3e-3, 1e-3
# Rounding weights to e4m3 alone moves a row of n keys by some 2.7% / sqrt(n): rows of fewer are not judged.
MIN_KEYS = 1000

# Of a query head: q [Lq, D] and its k, v [>= known, D], the very numbers that the kernel reads, in any type.
# q, k, v of a head, and what is added to the scores of its keys before they are scaled, if anything is.
Operands = Callable[[int], tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class RowError:
    """One row, over all heads. keys: the fewest that a head sees. bias: mean of (got - true) / true; error: of the
    norms; lse: mean error of the log-sum-exp, 0 if none was given."""

    row: int
    keys: int
    bias: float
    error: float
    lse: float = 0.0

    def problem(self) -> str:
        """What is past its limit; empty if nothing is."""
        for name, value, limit in (
            ("mean signed error", self.bias, BIAS_LIMIT),
            ("relative error", self.error, ERROR_LIMIT),
            ("log-sum-exp off by", self.lse, LSE_LIMIT),
        ):
            if not abs(value) <= limit:  # NaN too
                return f"row {self.row}, {self.keys} keys: {name} {value:.2%}, allowed {limit:.1%}"
        return ""


def even_operands(
    heads: int, kv_heads: int, queries: int, dim: int, device: torch.device | str, *, start: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 q [1, H, queries, D] of the tokens from `start` on, and k, v [1, Hkv, start + queries, D].

    Columns of v differ in their mean, or all outputs of a long row would be rounded to 16 bits the same way: a bias of
    up to .2% that no kernel can avoid. Memory is laid out as a transformers layer makes it: views of [1, L, heads * D].
    """
    generator = torch.Generator(device).manual_seed(start + queries)

    def made(heads: int, tokens: int, draw: Callable[..., Tensor]) -> Tensor:
        return draw((1, tokens, heads, dim), generator=generator, device=device, dtype=torch.bfloat16).transpose(1, 2)

    known = start + queries
    q, k = made(heads, queries, torch.randn) * 0.3, made(kv_heads, known, torch.randn) * 0.3
    means = torch.linspace(1.0, 2.0, dim, device=device, dtype=torch.bfloat16)
    return q, k, (made(kv_heads, known, torch.rand) + 0.5) * means


def plain_operands(q: Tensor, k: Tensor, v: Tensor) -> Operands:
    """Those of attention in 16 bits: q [1, H, L, D], k and v [1, Hkv, L, D]."""
    group = q.shape[1] // k.shape[1]
    return lambda head: (q[0, head], k[0, head // group], v[0, head // group])


def rows_of(start: int, end: int) -> list[int]:
    """The tokens of [start, end) to look at."""
    return sorted({row for row in ROWS if start <= row < end} | {end - 1})


def row_errors(
    out: Tensor,
    operands: Operands,
    selection: BlockSelection | None = None,
    *,
    start: int = 0,
    window: int | None = None,
    block_size: int = BLOCK,
    lse: Tensor | None = None,
) -> list[RowError]:
    """Errors of chosen rows that see at least MIN_KEYS keys. Values must be positive, as `even_operands` makes them.

    out: [1, H, Lq, D], the tokens [start, start + Lq); lse: [1, H, Lq]. selection, window, block_size: the call's.
    """
    heads, end = out.shape[1], start + out.shape[2]
    rows = torch.tensor(rows_of(start, end), device=out.device)
    sums = torch.zeros(4, len(rows), dtype=torch.float64, device=out.device)
    fewest = torch.full_like(rows, end)
    for head in range(heads):
        q, k, v, *bias = operands(head)
        visible = visible_keys(rows, end, start, window, block_size, selection, head)
        scores = q[rows - start].double() @ k[:end].double().mT
        scores = (scores + sum(added[:end] for added in bias)) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~visible, -torch.inf)
        true = scores.softmax(-1) @ v[:end].double()
        got = out[0, head, rows - start].double()
        sums[0] += ((got - true) / true).mean(-1)
        sums[1] += (got - true).square().sum(-1)
        sums[2] += true.square().sum(-1)
        if lse is not None:
            sums[3] += lse[0, head, rows - start].double() - scores.logsumexp(-1)
        fewest = fewest.minimum(visible.sum(-1))
    found = zip(rows.tolist(), fewest.tolist(), *_means(sums, heads), strict=True)
    return [RowError(*figures) for figures in found if figures[1] >= MIN_KEYS]


def visible_keys(
    rows: Tensor,
    known: int,
    start: int,
    window: int | None,
    block_size: int,
    selection: BlockSelection | None,
    head: int,
) -> Tensor:
    """bool [rows, known] of one head."""
    keys = torch.arange(known, device=rows.device)
    visible = keys <= rows[:, None]
    if window is not None:
        visible &= keys > rows[:, None] - window
    if selection is not None:
        kept = torch.zeros(len(rows), -(-known // block_size), dtype=torch.bool, device=rows.device)
        for i, block in enumerate(((rows - start) // block_size).tolist()):
            kept[i, selection.indices[0, head, block, : int(selection.counts[0, head, block])].long()] = True
        visible &= kept.repeat_interleave(block_size, 1)[:, :known]
    return visible


def _means(sums: Tensor, heads: int) -> tuple[list[float], ...]:
    return (sums[0] / heads).tolist(), (sums[1] / sums[2]).sqrt().tolist(), (sums[3] / heads).tolist()


def problem_of(errors: Sequence[RowError]) -> str:
    """The first row's that is past its limits; empty if none is."""
    return next((problem for row in errors if (problem := row.problem())), "")


def worst_bias(errors: Sequence[RowError]) -> float | None:
    """The mean signed error of the worst row; None without rows."""
    return max((row.bias for row in errors), key=abs, default=None)
