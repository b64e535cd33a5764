"""Bound scores in Triton (sm_80 and newer): one pass over the new keys, then matrix products of rows and bounds.

    bound   per (KV head, block): largest and smallest value of each channel in each span of keys. Reads keys once.
    score   per tile of rows: q_r . k <= relu(q_r) . upper - relu(-q_r) . lower, two products on tensor cores. The
            spans are walked twice, first for each row's log-sum-exp over the key blocks, then for the shares: to
            compute a bound again is cheaper than to write it down and read it back.

A row's arithmetic depends on nothing but the row: not on its tile, nor on where a chunk begins.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.block_scores.triton import empty_scores
from kernels.bound_scores import KeyBounds
from kernels.sizes import ceil_div

LOG2E = 1.4426950408889634


@triton.jit(do_not_specialize=["first_block", "key_tokens", "max_spans"])
def bound_kernel(
    k, upper, lower, k_stride_n, k_stride_h, k_stride_t, first_block, key_tokens, max_spans,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Program (KV head, new block, n). k: the first new key; key_tokens: how many are new."""
    SPANS: tl.constexpr = BLOCK // SPAN
    head = tl.program_id(0)
    n = tl.program_id(2).to(tl.int64)
    token = (tl.program_id(1) * BLOCK + tl.arange(0, SPANS) * SPAN)[:, None]
    d = tl.arange(0, triton.next_power_of_2(D))[None, :]
    source = k + n * k_stride_n + head.to(tl.int64) * k_stride_h + d
    top = tl.full((SPANS, triton.next_power_of_2(D)), float("-inf"), tl.float32)
    bottom = -top
    # Unrolled: all loads are in flight at once, and the comparisons stay inside a thread.
    for u in tl.static_range(0, SPAN):
        exists = (token + u < key_tokens) & (d < D)
        key = tl.load(source + (token + u).to(tl.int64) * k_stride_t, mask=exists, other=0.0).to(tl.float32)
        top = tl.where(exists, tl.maximum(top, key), top)
        bottom = tl.where(exists, tl.minimum(bottom, key), bottom)
    span = ((first_block + tl.program_id(1)) * SPANS + tl.arange(0, SPANS))[:, None]
    place = ((n * KV_HEADS + head) * max_spans + span).to(tl.int64) * D + d
    some = (token < key_tokens) & (d < D)
    tl.store(upper + place, top.to(upper.dtype.element_ty), mask=some)
    tl.store(lower + place, bottom.to(lower.dtype.element_ty), mask=some)


@triton.jit
def _block_bounds(
    positive, negative, position, upper, lower, block, spans, factor,
    D: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """[BM, WIDTH]: base-2 bounds of the rows in the key blocks from `block` on; -inf where a row sees nothing."""
    SPANS: tl.constexpr = BLOCK // SPAN
    span = block * SPANS + tl.arange(0, WIDTH * SPANS)
    d = tl.arange(0, triton.next_power_of_2(D))[None, :]
    at = span.to(tl.int64)[:, None] * D + d
    exists = d < D
    if MASKED:
        exists &= (span < spans)[:, None]
    bounds = tl.dot(positive, tl.load(upper + at, mask=exists, other=0.0).T)
    bounds = tl.dot(negative, tl.load(lower + at, mask=exists, other=0.0).T, bounds) * factor
    if MASKED:
        bounds = tl.where((span * SPAN)[None, :] <= position[:, None], bounds, float("-inf"))
    return tl.max(tl.reshape(bounds, (BM, WIDTH, SPANS)), axis=2)


@triton.jit
def _add_blocks(top, total, bounds):
    """Running maximum and sum of exponentials of each row, with the blocks of `bounds` added."""
    new_top = tl.maximum(top, tl.max(bounds, axis=1))
    return new_top, total * tl.exp2(top - new_top) + tl.sum(tl.exp2(bounds - new_top[:, None]), axis=1)


@triton.jit
def _store_shares(
    out, bounds, all_keys, block0, block, first_block, rows, row_stride, n_keys,
    BM: tl.constexpr, WIDTH: tl.constexpr, ROWS_PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest share of each query block's rows, for the key blocks from `block` on."""
    query_block = block0 + tl.arange(0, BM // ROWS_PER_BLOCK)
    share = tl.reshape(bounds - all_keys[:, None], (BM // ROWS_PER_BLOCK, ROWS_PER_BLOCK, WIDTH))
    share = tl.exp2(tl.max(share, axis=1))
    j = block + tl.arange(0, WIDTH)
    causal = j[None, :] <= (first_block + query_block)[:, None]
    place = query_block.to(tl.int64)[:, None] * row_stride + j[None, :]
    tl.store(out + place, share, mask=causal & (query_block < rows)[:, None] & (j < n_keys)[None, :])


@triton.jit(do_not_specialize=["query_tokens", "first_block", "rows", "n_keys", "row_tiles", "max_spans"])
def score_kernel(
    q, upper, lower, scores, factor, q_stride_n, q_stride_h, q_stride_t,
    query_tokens, first_block, rows, n_keys, row_stride, row_tiles, max_spans,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
    ROW: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A program makes the scores of BM rows, several query blocks' worth, so that the tensor cores are full.

    ROW: queries that a row stands for. WIDTH: key blocks of a step. All tiles of a KV head come before the next one's
    (its bounds stay in L2), longest first. scores: -inf wherever nothing is stored.
    """
    ROWS_PER_BLOCK: tl.constexpr = BLOCK // ROW
    DP: tl.constexpr = triton.next_power_of_2(D)
    tile = tl.program_id(0)
    kv_head = tile // (GROUP * row_tiles)  # of all prompts of the batch
    n = (kv_head // KV_HEADS).to(tl.int64)
    head = kv_head % KV_HEADS * GROUP + tile % GROUP
    block0 = (row_tiles - 1 - tile // GROUP % row_tiles) * (BM // ROWS_PER_BLOCK)
    token0 = block0 * BLOCK + tl.arange(0, BM) * ROW
    last_token = tl.minimum(token0 + ROW, query_tokens) - 1
    d = tl.arange(0, DP)[None, :]
    source = q + n * q_stride_n + head.to(tl.int64) * q_stride_h
    query = tl.zeros((BM, DP), tl.float32)
    for u in range(ROW):
        exists = (token0 + u < query_tokens)[:, None] & (d < D)
        member = source + (token0 + u).to(tl.int64)[:, None] * q_stride_t + d
        query += tl.load(member, mask=exists, other=0.0).to(tl.float32)
    query = query / tl.maximum(last_token - token0 + 1, 1)[:, None]
    positive = tl.maximum(query, 0.0).to(upper.dtype.element_ty)
    negative = tl.minimum(query, 0.0).to(upper.dtype.element_ty)
    position = first_block * BLOCK + last_token
    upper += kv_head.to(tl.int64) * max_spans * D
    lower += kv_head.to(tl.int64) * max_spans * D
    spans = tl.cdiv(first_block * BLOCK + query_tokens, SPAN)
    # Every row sees all of the key blocks before the tile's first one.
    unmasked = (first_block + block0) // WIDTH * WIDTH
    seen = tl.minimum(first_block + block0 + BM // ROWS_PER_BLOCK, n_keys)

    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for block in range(0, unmasked, WIDTH):
        bounds = _block_bounds(
            positive, negative, position, upper, lower, block, spans, factor, D, BLOCK, SPAN, BM, WIDTH, False
        )
        top, total = _add_blocks(top, total, bounds)
    for block in range(unmasked, seen, WIDTH):
        bounds = _block_bounds(
            positive, negative, position, upper, lower, block, spans, factor, D, BLOCK, SPAN, BM, WIDTH, True
        )
        top, total = _add_blocks(top, total, bounds)
    # A row that stands for no query has no share of anything.
    all_keys = tl.where(token0 < query_tokens, top + tl.log2(total), float("inf"))
    out = scores + (n * KV_HEADS * GROUP + head) * rows * row_stride
    for block in range(0, unmasked, WIDTH):
        bounds = _block_bounds(
            positive, negative, position, upper, lower, block, spans, factor, D, BLOCK, SPAN, BM, WIDTH, False
        )
        _store_shares(
            out, bounds, all_keys, block0, block, first_block, rows, row_stride, n_keys, BM, WIDTH, ROWS_PER_BLOCK
        )
    for block in range(unmasked, seen, WIDTH):
        bounds = _block_bounds(
            positive, negative, position, upper, lower, block, spans, factor, D, BLOCK, SPAN, BM, WIDTH, True
        )
        _store_shares(
            out, bounds, all_keys, block0, block, first_block, rows, row_stride, n_keys, BM, WIDTH, ROWS_PER_BLOCK
        )


def bound_scores(
    q: Tensor,
    k: Tensor,
    query_start: int,
    block_size: int,
    group: int,
    span: int,
    scale: float,
    bounds: KeyBounds,
    key_start: int = 0,
) -> Tensor:
    """See kernels.bound_scores.bound_scores. block_size in 16..128, group and span must be powers of two.

    float32 inputs are multiplied in TF32: the shares' errors matter to near ties only."""
    if block_size not in (16, 32, 64, 128) or group & (group - 1) or span & (span - 1):
        raise ValueError(
            "the Triton path needs block_size 16, 32, 64 or 128 and powers of two as group and span, got "
            f"{block_size}, {group}, {span}"
        )
    if q.stride(-1) != 1 or k.stride(-1) != 1:
        raise ValueError("the last dimension of q and k must be contiguous")
    N, H, query_tokens, D = q.shape
    kv_heads, end = k.shape[1], query_start + query_tokens
    first_new, max_spans = bounds.blocks, bounds.upper.shape[2]
    begin = first_new * block_size
    if begin < end:
        new_keys = k[:, :, begin - key_start :]
        bound_kernel[(kv_heads, ceil_div(end - begin, block_size), N)](
            new_keys, bounds.upper, bounds.lower, *k.stride()[:3], first_new, end - begin, max_spans,
            KV_HEADS=kv_heads, D=D, BLOCK=block_size, SPAN=span,
        )  # fmt: skip
        bounds.blocks = end // block_size

    n_rows, n_keys = ceil_div(query_tokens, block_size), ceil_div(end, block_size)
    tile = _tile(k.element_size(), D, block_size // group, block_size // span)
    row_tiles = ceil_div(n_rows, tile["BM"] // (block_size // group))
    scores = empty_scores(N, H, n_rows, n_keys, q.device).fill_(-torch.inf)
    score_kernel[(row_tiles * H * N,)](
        q, bounds.upper, bounds.lower, scores, scale * LOG2E, *q.stride()[:3],
        query_tokens, query_start // block_size, n_rows, n_keys, scores.stride(2), row_tiles, max_spans,
        KV_HEADS=kv_heads, GROUP=H // kv_heads, D=D, BLOCK=block_size, SPAN=span, ROW=group, **tile,
    )  # fmt: skip
    return scores


def _tile(element_size: int, head_dim: int, rows_per_block: int, spans_per_block: int) -> dict[str, Any]:
    """Rows (BM) and key blocks (WIDTH) of a step: at least a query block's rows, whose maximum is taken in one tile,
    and 16 spans, the narrowest product of tensor cores here."""
    small = element_size == 4 or head_dim > 128
    spans = 32 if small else 64
    return {
        "BM": max(rows_per_block, 64 if small else 128),
        "WIDTH": max(1, spans // spans_per_block),
        "num_warps": 4 if small else 8,
        "num_stages": 2,
    }
