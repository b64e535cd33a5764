# mypy: disable-error-code="no-untyped-def"
"""Tiles, keys and shares in Triton: what surrounds the walk over the key blocks.

A program walks the key blocks once and leaves a number for each of its rows and each block, base-2 logarithms, in a
scratch slot of its own; `store_shares` reads the slot back. A slot is written and read by one program, mostly in L2.
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
def store_shares(
    slot, total, out, exists, block0, first_block, rows, row_stride, n_keys, seen,
    BM: tl.constexpr, ROWS_PER_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out[i, j] = max over the rows r of query block i of 2^(slot[j, r] - total[r]); -inf above the diagonal.

    slot: [seen, BM]; exists: bool [BM], which rows stand for a query; out: the head's own scores."""
    BLOCKS_PER_TILE: tl.constexpr = BM // ROWS_PER_BLOCK
    # What other threads of this program stored must be visible before it is read back.
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
