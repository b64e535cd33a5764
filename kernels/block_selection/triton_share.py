# mypy: disable-error-code="no-untyped-def"
"""Budgets shared among the heads of a query block in Triton: a program finds one row's threshold for all its heads.

It is bisected over the floats in their order, nearly a logarithmic scale of shares: every step counts each head's
scores at or above a pivot, within its bounds, and the search stops when exactly as many are left as are wanted (shares
of random logits, 32 heads and 256 to 8192 blocks: 16 to 29 steps), never after more than 32. What 32 heads have in a
thousand columns stays in registers; further columns are read again in each step, from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.sizes import power_of_2
from kernels.block_selection.triton import from_order, hits_from

# A row's scores that stay in registers: 64 to a thread of 16 warps.
RESIDENT = 32 * 1024
# Of them in one piece: 4 to a thread. Further columns are read in so many pieces at a time.
PIECE = 32 * 64
FAR = tl.constexpr(4)
# The least finite float and the first NaN in the order of floats: t >= -inf is where x > t begins to be x >= pivot.
FIRST = tl.constexpr(-0x7F7FFFFF)
LAST = tl.constexpr(0x7F800001)


@triton.jit
def _load(scores, stride_h, H, begin, free, HEADS: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr):
    """[PIECES, HEADS, COLUMNS] of the free blocks from `begin`, NaN past them: a warp has whole rows of pieces, so that
    counting a head's hits takes it few exchanges between threads."""
    head = tl.arange(0, HEADS)[None, :, None]
    j = tl.arange(0, PIECES)[:, None, None] * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    inside = (head < H) & (j < free - begin)
    return tl.load(scores + begin + head.to(tl.int64) * stride_h + j, mask=inside, other=float("nan"))


@triton.jit(
    do_not_specialize=["H", "rows", "first_row", "sink_blocks", "local_blocks"],
    do_not_specialize_on_alignment=["budgets"],  # a chunk's are a part of its prompt's
)
def share_kernel(
    scores, budgets, counts, stride_n, stride_h, stride_row, H, rows, first_row, sink_blocks, local_blocks, floor, cap,
    HEADS: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """Program (p, n): a row, the longest first. MORE: rows may be longer than PIECES * COLUMNS."""
    row = rows - 1 - tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, HEADS)
    counts += (n * H + head) * rows + row
    causal = first_row + row + 1
    # Blocks [sinks, sinks + free) compete.
    sinks = tl.minimum(causal, sink_blocks)
    free = tl.maximum(causal - local_blocks, sinks) - sinks
    forced = causal - free
    asked = tl.load(budgets + row)
    budget = tl.maximum(asked, forced)
    if budget >= causal:
        tl.store(counts, tl.full((HEADS,), 0, tl.int32) + causal, mask=head < H)
    else:
        shares = asked.to(tl.float32)
        least = tl.minimum(tl.maximum(tl.ceil(floor * shares), 0.0), causal.to(tl.float32)).to(tl.int32)
        limit = tl.minimum(tl.maximum(tl.ceil(cap * shares), 0.0), causal.to(tl.float32)).to(tl.int32)
        own = tl.minimum(tl.maximum(least - forced, 0), free)
        most = tl.minimum(tl.maximum(limit - forced, own), free)
        wanted = H * (budget - forced)

        scores += n * stride_n + row.to(tl.int64) * stride_row + sinks
        x = _load(scores, stride_h, H, 0, free, HEADS, PIECES, COLUMNS)
        # Invariant: from `high` on the heads keep `kept`, which has room; below `low` there is none.
        low = forced * 0 + FIRST
        high = forced * 0 + LAST
        kept = tl.full((HEADS,), 0, tl.int32) + own
        total = H * own
        while (low < high) & (total != wanted):
            # Half way, rounded down, without overflow.
            middle = (low & high) + ((low ^ high) >> 1)
            pivot = from_order(middle)
            hits = tl.sum(hits_from(x, pivot), axis=0)
            if MORE:
                for begin in range(PIECES * COLUMNS, free, FAR * COLUMNS):
                    far = _load(scores, stride_h, H, begin, free, HEADS, FAR, COLUMNS)
                    hits += tl.sum(hits_from(far, pivot), axis=0)
            count = tl.minimum(tl.maximum(tl.sum(hits, axis=1).to(tl.int32), own), most)
            sum_of_heads = tl.sum(tl.where(head < H, count, 0), axis=0)
            if sum_of_heads <= wanted:
                high = middle
                kept = count
                total = sum_of_heads
            else:
                low = middle + 1
        tl.store(counts, forced + kept, mask=head < H)


def share_budgets(
    scores: Tensor, budgets: Tensor, first_row: int, sink_blocks: int, local_blocks: int, floor: float, cap: float
) -> Tensor:
    """See kernels.block_selection.share_budgets."""
    if scores.stride(-1) != 1:
        raise ValueError("the last dimension of scores must be contiguous")
    N, H, rows, _ = scores.shape
    counts = torch.empty(N, H, rows, dtype=torch.int32, device=scores.device)
    heads, longest = power_of_2(H), power_of_2(first_row + rows)
    columns = max(32, min(128, PIECE // heads))
    pieces = max(1, min(RESIDENT // heads, longest) // columns)
    resident = heads * pieces * columns
    share_kernel[(rows, N)](
        scores, budgets.contiguous(), counts, *scores.stride()[:3], H, rows, first_row, sink_blocks, local_blocks,
        floor, cap, HEADS=heads, PIECES=pieces, COLUMNS=columns, MORE=longest > pieces * columns,
        num_warps=max(4, min(16, resident // 2048)),
    )  # fmt: skip
    return counts
