"""Block selection in Triton: one program per row finds the budget's threshold exactly and writes the kept blocks.

Scores become integers of the same order. The keep-th largest is found by bisecting that order between the row's least
and greatest, counting at each step, and stopping as soon as exactly `keep` blocks lie above (10 to 14 steps as a
rule, at most 32). A prefix sum over the row then ranks ties and places the kept indices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.block_selection import BlockSelection

LEAST = tl.constexpr(-(2**31))  # below every score: blocks above the diagonal
FORCED = tl.constexpr(2**31 - 2)  # above every score: sink, local and diagonal blocks


@triton.jit
def _select_row(
    scores, budget, indices, counts, i, sink_blocks, local_blocks, max_blocks, WIDTH: tl.constexpr
):  # fmt: skip
    """Row i of one head; WIDTH > i. The four pointers are the row's own."""
    j = tl.arange(0, WIDTH)
    causal = j <= i
    forced = causal & ((j < sink_blocks) | (j > i - local_blocks))
    # Adding 0 turns -0 into +0; the exclusive or makes the order of negative floats that of integers.
    bits = (tl.load(scores + j, mask=causal, other=0.0) + 0.0).to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    free = causal & ~forced
    low = tl.min(tl.where(free, order, FORCED), axis=0)
    high = tl.max(tl.where(free, order, LEAST), axis=0)
    order = tl.where(forced, FORCED, tl.where(causal, order, LEAST))

    forced_count = tl.sum(forced.to(tl.int32), axis=0)
    keep = tl.minimum(tl.minimum(tl.maximum(tl.load(budget), forced_count), i + 1), max_blocks)
    # At least `keep` blocks are >= low, fewer are > high; widths in int64, since they pass 2^31.
    above_low = i + 1
    if keep <= forced_count:
        low = FORCED
        above_low = forced_count
        high = FORCED
    while (above_low > keep) & (low < high):
        middle = (low.to(tl.int64) + high.to(tl.int64) + 1) >> 1
        middle = middle.to(tl.int32)
        above = tl.sum((order >= middle).to(tl.int32), axis=0)
        if above >= keep:
            low = middle
            above_low = above
        else:
            high = middle - 1

    over = order > low
    tie = order == low
    ties_wanted = keep - tl.sum(over.to(tl.int32), axis=0)
    # One prefix sum for both counts: those over the threshold below bit 16, ties above it.
    rank = tl.cumsum(over.to(tl.int32) + (tie.to(tl.int32) << 16), axis=0)
    tie_rank = rank >> 16
    kept = over | (tie & (tie_rank <= ties_wanted))
    place = (rank & 0xFFFF) + tl.minimum(tie_rank, ties_wanted) - 1
    tl.store(indices + place, j, mask=kept)
    tl.store(counts, keep)


@triton.jit(do_not_specialize=["rows", "first_row", "sink_blocks", "local_blocks", "max_blocks"])
def select_kernel(
    scores, budgets, indices, counts, stride_n, stride_h, stride_row, H, rows, first_row,
    sink_blocks, local_blocks, max_blocks, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (n * H + h, row). Short rows use a narrower tile."""
    head = tl.program_id(0)
    # The longest rows first: their programs take the most steps.
    row = rows - 1 - tl.program_id(1)
    i = first_row + row
    place = head.to(tl.int64) * rows + row
    scores += (head // H).to(tl.int64) * stride_n + (head % H).to(tl.int64) * stride_h + row.to(tl.int64) * stride_row
    indices += place * max_blocks
    counts += place
    budgets += row
    if i < WIDTH // 4:
        _select_row(scores, budgets, indices, counts, i, sink_blocks, local_blocks, max_blocks, WIDTH // 4)
    elif i < WIDTH // 2:
        _select_row(scores, budgets, indices, counts, i, sink_blocks, local_blocks, max_blocks, WIDTH // 2)
    else:
        _select_row(scores, budgets, indices, counts, i, sink_blocks, local_blocks, max_blocks, WIDTH)


def select_blocks(
    scores: Tensor, budgets: Tensor, first_row: int, sink_blocks: int, local_blocks: int, max_blocks: int
) -> BlockSelection:
    """See kernels.block_selection.select_blocks. Rows of up to 65,535 key blocks."""
    N, H, rows, _ = scores.shape
    if first_row + rows > 0xFFFF:
        raise ValueError(f"the Triton path selects among at most 65535 key blocks, got {first_row + rows}")
    if scores.stride(-1) != 1:
        raise ValueError("the last dimension of scores must be contiguous")
    indices = torch.empty(N, H, rows, max_blocks, dtype=torch.int32, device=scores.device)
    counts = torch.empty(N, H, rows, dtype=torch.int32, device=scores.device)
    width = max(128, triton.next_power_of_2(first_row + rows))
    select_kernel[(N * H, rows)](
        scores, budgets, indices, counts, *scores.stride()[:3], H, rows, first_row,
        sink_blocks, local_blocks, max_blocks, WIDTH=width, num_warps=max(1, min(16, width // 1024)),
    )  # fmt: skip
    return BlockSelection(indices, counts)
