# mypy: disable-error-code="no-untyped-def"
"""From logarithms to shares in Triton: the end of the estimators that weigh key blocks by rows of the query block.

A program walks the key blocks once and leaves a number for each of its rows and each block, base-2 logarithms, in a
scratch slot of its own; what is here reads the slot back. A slot is written and read by one program, mostly in L2.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(tile, row_tiles, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCKS_PER_TILE: tl.constexpr):
    """(prompt n, head, KV head, first query block) of a tile: all tiles of a KV head come before the next one's, whose
    keys stay in L2 meanwhile; the longest first."""
    lane = tile // (GROUP * row_tiles)
    kv_head = lane % KV_HEADS
    block0 = (row_tiles - 1 - tile // GROUP % row_tiles) * BLOCKS_PER_TILE
    return lane // KV_HEADS, kv_head * GROUP + tile % GROUP, kv_head, block0


@triton.jit
def load_keys(k, n, kv_head, token, k_stride_t, tokens, D: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """[BN, D padded] keys from `token` on; zeros past the last. k: descriptor, or the first key's pointer."""
    DP: tl.constexpr = triton.next_power_of_2(D)
    if TMA:
        keys = k.load([n, kv_head, token, 0]).reshape(BN, DP)
    else:
        t = token + tl.arange(0, BN)[:, None]
        d = tl.arange(0, DP)[None, :]
        keys = tl.load(k + t.to(tl.int64) * k_stride_t + d, mask=(t < tokens) & (d < D), other=0.0)
    return keys


@triton.jit
def mean_query(
    source, stride_t, token0, query_tokens, D: tl.constexpr, ROW: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """float32 [BM, D padded]: means of the queries [token0, token0 + ROW) that exist. token0: int [BM]."""
    d = tl.arange(0, triton.next_power_of_2(D))
    total = tl.zeros((BM, triton.next_power_of_2(D)), tl.float32)
    for u in range(ROW):
        exists = token0 + u < query_tokens
        member = (token0 + u).to(tl.int64)[:, None] * stride_t + d[None, :]
        total += tl.load(source + member, mask=exists[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    return total / tl.maximum(tl.minimum(token0 + ROW, query_tokens) - token0, 1)[:, None]


@triton.jit
def total_of_slot(slot, seen, BM: tl.constexpr, CHUNK: tl.constexpr):
    """float32 [BM]: log2 sum_j 2^slot[j, r] of each row. slot: [seen, BM], written by this program."""
    # What other threads of this program stored must be visible before it is read back.
    tl.debug_barrier()
    row = tl.arange(0, BM)
    j = tl.arange(0, CHUNK)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for first in range(0, seen, CHUNK):
        at = (first + j)[:, None] * BM + row[None, :]
        weight = tl.load(slot + at, mask=(first + j < seen)[:, None], other=float("-inf"))
        new_top = tl.maximum(top, tl.max(weight, axis=0))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(weight - new_top[None, :]), axis=0)
        top = new_top
    return top + tl.log2(total)


@triton.jit
def store_shares(
    slot, total, out, exists, block0, first_block, rows, row_stride, n_keys, seen,
    BM: tl.constexpr, ROWS_PER_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out[i, j] = max over the rows r of query block i of 2^(slot[j, r] - total[r]); -inf above the diagonal.

    slot: [seen, BM]; exists: bool [BM], which rows stand for a query; out: the head's own scores."""
    BLOCKS_PER_TILE: tl.constexpr = BM // ROWS_PER_BLOCK
    # As in total_of_slot, for those who add up the rows' totals as they go.
    tl.debug_barrier()
    row = tl.arange(0, BM)
    j = tl.arange(0, CHUNK)
    block = block0 + tl.arange(0, BLOCKS_PER_TILE)
    for first in range(0, n_keys, CHUNK):
        at = (first + j)[:, None] * BM + row[None, :]
        weight = tl.load(slot + at, mask=(first + j < seen)[:, None], other=float("-inf")).to(tl.float32)
        share = tl.where(exists[None, :], tl.exp2(weight - total[None, :]), 0.0)
        share = tl.max(tl.reshape(share, (CHUNK, BLOCKS_PER_TILE, ROWS_PER_BLOCK)), axis=2)
        share = tl.where((first + j)[:, None] <= (first_block + block)[None, :], share, float("-inf"))
        place = block.to(tl.int64)[None, :] * row_stride + (first + j)[:, None]
        tl.store(out + place, share, mask=(block < rows)[None, :] & (first + j < n_keys)[:, None])
    # The slot is free for the next tile only when every thread has read it.
    tl.debug_barrier()
