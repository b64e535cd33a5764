"""Block selection in Triton: a warp finds each row's threshold exactly and writes the kept blocks.

Only blocks that are neither sink nor local nor diagonal compete. The least score that is kept is searched between the
row's least and greatest: every step counts the scores at or above a pivot, and the search stops when exactly as many
are left as are wanted. Pivots are interpolated (on the logit of the counts, which is nearly straight for bell-shaped
scores: 7 steps for a thousand blocks where halving takes 14); after one that left more than half, the next halves the
range in the spacing of floats, so that any row ends within 64 steps. A prefix sum places the kept indices.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.selection import BlockSelection
from kernels._common.sizes import power_of_2

# Inline assembly does not run under Triton's interpreter.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# Rows of one warp: six of them on each quarter of a multiprocessor, without spills. Longer rows need more.
REGISTERS = 80
REGISTERS_WIDE = 128


@triton.jit
def to_order(x):
    """Integers in the order of the floats x; -0 and +0 are one."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def from_order(order):
    magnitude = tl.abs(order)
    return tl.where(order < 0, magnitude | -0x80000000, magnitude).to(tl.float32, bitcast=True)


@triton.jit
def hits_from(x, pivot):
    """1.0 where x >= pivot, else 0.0; NaN is not. Floats, since a GPU adds them at twice the rate of integers."""
    if INTERPRETED:
        hits = (x >= pivot).to(tl.float32)
    else:
        # One instruction, where comparing and then choosing 0 or 1 makes two.
        hits = tl.inline_asm_elementwise(
            "set.ge.f32.f32 $0, $1, $2;", "=f,f,f", [x, pivot], dtype=tl.float32, is_pure=True, pack=1
        )
    return hits


@triton.jit
def _count_from(x, pivot):
    """How many of x [WIDTH] are >= pivot; NaN is not."""
    # Floats inside a thread, integers between threads.
    in_thread = tl.sum(tl.reshape(hits_from(x, pivot), (x.shape[0] // 32, 32)), axis=0)
    return tl.sum(in_thread.to(tl.int32), axis=0)


@triton.jit
def _logit(count, n):
    """Of the share count / n, kept finite."""
    return tl.log2((count + 0.5) / (n - count + 0.5))


@triton.jit
def _search(x, keep, n):
    """The least score that is kept of a row x [WIDTH], which holds n scores and NaN elsewhere.

    Returns (threshold, count): x >= threshold holds count times, count = keep; or count > keep, and then those above
    the threshold are fewer than keep. NaN scores are never kept: count may fall short of keep then."""
    low = to_order(tl.min(x, axis=0))
    high = to_order(tl.max(x, axis=0))
    # Invariant: at least keep scores are >= low (above_low of them), fewer than keep are > high (above_high).
    above_low = n
    above_high = n * 0
    logit_low = _logit(n, n)
    logit_high = -logit_low
    logit_keep = _logit(keep, n)
    halve = n < 0
    while (above_low > keep) & (low < high):
        least = from_order(low)
        share = (logit_low - logit_keep) / (logit_low - logit_high)
        guess = to_order(least + (from_order(high) - least) * share)
        # Half way, rounded up, without overflow. Between infinities a guess may be anything: it is clamped.
        half = (low | high) - ((low ^ high) >> 1)
        middle = tl.where(halve, half, tl.minimum(tl.maximum(guess, low + 1), high))
        count = _count_from(x, from_order(middle))
        before = above_low - above_high
        logit_count = _logit(count, n)
        if count >= keep:
            low = middle
            above_low = count
            logit_low = logit_count
        else:
            high = middle - 1
            above_high = count
            logit_high = logit_count
        halve = ((above_low - above_high) * 2 > before) & (halve == 0)
    threshold = from_order(low)
    if above_low == n:
        # Not counted yet; scores that are NaN make it less.
        above_low = _count_from(x, threshold)
    return threshold, above_low


@triton.jit
def _drop_last_ties(x, threshold, keep, j):
    """x with NaN for all but the first ties at the threshold, so that keep scores are left at or above it."""
    tied = x == threshold
    missing = keep - tl.sum((x > threshold).to(tl.int32), axis=0)
    # The greatest end with at most `missing` ties before it.
    end = missing * 0
    beyond = end + x.shape[0]
    while end < beyond:
        middle = (end + beyond + 1) >> 1
        before = tl.sum((tied & (j < middle)).to(tl.int32), axis=0)
        end = tl.where(before <= missing, middle, end)
        beyond = tl.where(before <= missing, beyond, middle - 1)
    return tl.where(tied & (j >= end), float("nan"), x)


@triton.jit
def _ranks(kept):
    """int32 [WIDTH]: how many of kept [WIDTH] hold up to and including each place."""
    if kept.shape[0] > 1024:
        ranks = tl.cumsum(kept.to(tl.int32), axis=0)
    else:
        # Within a warp. Prefix sums of four runs of 32 share an integer, a byte each: a quarter of the exchanges
        # between threads.
        RUNS: tl.constexpr = kept.shape[0] // 128
        byte = 8 * tl.arange(0, 4)
        packed = tl.sum(tl.reshape(kept.to(tl.int32), (RUNS, 4, 32)) << byte[None, :, None], axis=1)
        within = (tl.cumsum(packed, axis=1)[:, None, :] >> byte[None, :, None]) & 255
        totals = (tl.sum(packed, axis=1)[:, None] >> byte[None, :]) & 255
        flat = tl.reshape(totals, (RUNS * 4,))
        before = tl.reshape(tl.cumsum(flat, axis=0) - flat, (RUNS, 4))
        ranks = tl.reshape(within + before[:, :, None], (kept.shape[0],))
    return ranks


@triton.jit
def _select_row(
    scores, budget, indices, counts, i, sink_blocks, local_blocks, max_blocks, WIDTH: tl.constexpr
):  # fmt: skip
    """Row i of one head; WIDTH > i. The four pointers are the row's own."""
    # Blocks [sinks, free_end) compete.
    sinks = tl.minimum(i + 1, sink_blocks)
    free_end = tl.maximum(i + 1 - local_blocks, sinks)
    free = free_end - sinks
    forced = i + 1 - free
    keep = tl.minimum(tl.maximum(tl.load(budget), forced), tl.minimum(i + 1, max_blocks))
    j = tl.arange(0, WIDTH)
    if keep > i:
        tl.store(indices + j, j, mask=j <= i)
        tl.store(counts, keep)
    else:
        keep_free = tl.maximum(keep - forced, 0)
        taken = keep_free
        if keep_free > 0:
            x = tl.load(scores + sinks + j, mask=j < free, other=float("nan"))
            threshold, count = _search(x, keep_free, free)
            if count > keep_free:
                x = _drop_last_ties(x, threshold, keep_free, j)
            taken = tl.minimum(count, keep_free)
            kept = x >= threshold
            tl.store(indices + (sinks - 1) + _ranks(kept), sinks + j, mask=kept)
        at = tl.arange(0, 32)
        for _ in range(0, forced, 32):
            slot = tl.where(at < sinks, at, at + taken)
            block = tl.where(at < sinks, at, at + free)
            tl.store(indices + slot, block, mask=(at < forced) & (slot < max_blocks))
            at += 32
        tl.store(counts, forced + taken)


@triton.jit(
    do_not_specialize=["stride_budget", "H", "rows", "first_row", "sink_blocks", "local_blocks", "max_blocks"],
    do_not_specialize_on_alignment=["budgets"],  # a chunk's are a part of its prompt's
)
def select_kernel(
    scores, budgets, indices, counts, stride_n, stride_h, stride_row, stride_budget, H, rows, first_row,
    sink_blocks, local_blocks, max_blocks, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (p, n * H + h): a row, the longest first: they take the most steps. Short rows use a narrower tile."""
    head = tl.program_id(1)
    row = rows - 1 - tl.program_id(0)
    i = first_row + row
    place = head.to(tl.int64) * rows + row
    scores += (head // H).to(tl.int64) * stride_n + (head % H).to(tl.int64) * stride_h + row.to(tl.int64) * stride_row
    budgets += head.to(tl.int64) * stride_budget + row
    indices += place * max_blocks
    counts += place
    if i < WIDTH // 4:
        _select_row(scores, budgets, indices, counts, i, sink_blocks, local_blocks, max_blocks, WIDTH // 4)
    elif i < WIDTH // 2:
        _select_row(scores, budgets, indices, counts, i, sink_blocks, local_blocks, max_blocks, WIDTH // 2)
    else:
        _select_row(scores, budgets, indices, counts, i, sink_blocks, local_blocks, max_blocks, WIDTH)


def select_blocks(
    scores: Tensor, budgets: Tensor, first_row: int, sink_blocks: int, local_blocks: int, max_blocks: int
) -> BlockSelection:
    """See kernels.block_selection.select_blocks."""
    if scores.stride(-1) != 1:
        raise ValueError("the last dimension of scores must be contiguous")
    N, H, rows, _ = scores.shape
    indices = torch.empty(N, H, rows, max_blocks, dtype=torch.int32, device=scores.device)
    counts = torch.empty(N, H, rows, dtype=torch.int32, device=scores.device)
    width = max(512, power_of_2(first_row + rows))
    select_kernel[(rows, N * H)](
        scores, budgets.contiguous(), indices, counts, *scores.stride()[:3], rows if budgets.ndim == 3 else 0, H, rows,
        first_row, sink_blocks, local_blocks, max_blocks, WIDTH=width, num_warps=max(1, min(16, width // 1024)),
        maxnreg=REGISTERS if width <= 1024 else REGISTERS_WIDE,
    )  # fmt: skip
    return BlockSelection(indices, counts)
