"""Bound scores in Triton (sm_80 and newer): one pass over the new keys, then matrix products of rows and bounds.

    bound   per (KV head, block): largest and smallest value of each channel in each span of keys. Reads keys once.
    score   per tile of rows: q_r . k <= relu(q_r) . upper - relu(-q_r) . lower, two products on tensor cores. The
            spans are walked once; what each row could see in a key block waits in a scratch slot for the row's
            log-sum-exp. That a bound is read back costs a tenth of what computing it again would.

A row's arithmetic depends on nothing but the row: not on its tile, nor on where a chunk begins.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import device as kernels_device
from kernels._common.scores import empty_scores
from kernels._common.sizes import ceil_div
from kernels._common.tma import tma_obstacle, tma_strides
from kernels.block_scores.triton_shares import mean_query, store_shares, tile_of
from kernels.bound_scores import KeyBounds

LOG2E = 1.4426950408889634
# Below float16's largest value: a block so far above block 0 takes all of its row.
MOST = tl.constexpr(60000.0)


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
def _load_bounds(bounds, n, kv_head, span, spans, D: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """[BN, D padded] bounds of the spans from `span` on. bounds: descriptor, or the KV head's pointer."""
    DP: tl.constexpr = triton.next_power_of_2(D)
    if TMA:
        tile = bounds.load([n, kv_head, span, 0]).reshape(BN, DP)
    else:
        s = span + tl.arange(0, BN)[:, None]
        d = tl.arange(0, DP)[None, :]
        tile = tl.load(bounds + s.to(tl.int64) * D + d, mask=(s < spans) & (d < D), other=0.0)
    return tile


@triton.jit
def _block_bounds(
    positive, negative, position, upper, lower, n, kv_head, block, spans, factor,
    D: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[BM, BN / spans of a block]: base-2 bounds of the rows in the key blocks from `block` on; -inf where a row sees
    nothing."""
    SPANS: tl.constexpr = BLOCK // SPAN
    span = block * SPANS
    bounds = tl.dot(positive, _load_bounds(upper, n, kv_head, span, spans, D, BN, TMA).T)
    bounds = tl.dot(negative, _load_bounds(lower, n, kv_head, span, spans, D, BN, TMA).T, bounds)
    if MASKED:
        token = (span + tl.arange(0, BN)) * SPAN
        bounds = tl.where(token[None, :] <= position[:, None], bounds, float("-inf"))
    return tl.max(tl.reshape(bounds, (BM, BN // SPANS, SPANS)), axis=2) * factor


@triton.jit
def _walk(
    positive, negative, position, upper, lower, n, kv_head, first, last, spans, factor, reference, top, total, slot,
    D: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """slot[j, row] = base-2 bound of the row in key block j less that in block 0, for the blocks [first, last).

    reference: the bound in block 0; top, total: running maximum of what is stored, and the sum of 2^(it - maximum);
    float32 [BM], returned as they are afterwards."""
    WIDTH: tl.constexpr = BN // (BLOCK // SPAN)
    row = tl.arange(0, BM)
    for block in range(first, last, WIDTH):
        most = _block_bounds(
            positive, negative, position, upper, lower, n, kv_head, block, spans, factor,
            D, BLOCK, SPAN, BM, BN, MASKED, TMA,
        )  # fmt: skip
        j = block + tl.arange(0, WIDTH)
        if block == 0:
            reference = tl.max(tl.where((j == 0)[None, :], most, float("-inf")), axis=1)
        kept = tl.minimum(most - reference[:, None], MOST).to(slot.dtype.element_ty)
        tl.store(slot + j[None, :] * BM + row[:, None], kept, mask=(j < last)[None, :])
        most = kept.to(tl.float32)  # a row's shares sum up to 1 only if they are of what is read back
        new_top = tl.maximum(top, tl.max(most, axis=1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(most - new_top[:, None]), axis=1)
        top = new_top
    return reference, top, total


@triton.jit(do_not_specialize=["query_tokens", "first_block", "rows", "n_keys", "tiles", "row_tiles", "max_spans"])
def score_kernel(
    q, upper, lower, scores, scratch, ticket, factor, q_stride_n, q_stride_h, q_stride_t,
    query_tokens, first_block, rows, n_keys, row_stride, tiles, row_tiles, max_spans,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
    ROW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Persistent: programs draw tiles of BM rows, several query blocks' worth, so that the tensor cores are full.

    ROW: queries that a row stands for. BN: spans of a step. scratch [programs, n_keys, BM]; ticket: a zeroed int32.
    """
    ROWS_PER_BLOCK: tl.constexpr = BLOCK // ROW
    BLOCKS_PER_TILE: tl.constexpr = BM // ROWS_PER_BLOCK
    WIDTH: tl.constexpr = BN // (BLOCK // SPAN)
    slot = scratch + tl.program_id(0).to(tl.int64) * n_keys * BM
    spans = tl.cdiv(first_block * BLOCK + query_tokens, SPAN)
    tile = tl.atomic_add(ticket, 1)
    while tile < tiles:
        n, head, kv_head, block0 = tile_of(tile, row_tiles, KV_HEADS, GROUP, BLOCKS_PER_TILE)
        token0 = block0 * BLOCK + tl.arange(0, BM) * ROW
        source = q + n.to(tl.int64) * q_stride_n + head.to(tl.int64) * q_stride_h
        query = mean_query(source, q_stride_t, token0, query_tokens, D, ROW, BM)
        positive = tl.maximum(query, 0.0).to(q.dtype.element_ty)
        negative = tl.minimum(query, 0.0).to(q.dtype.element_ty)
        position = first_block * BLOCK + tl.minimum(token0 + ROW, query_tokens) - 1
        tops = upper
        bottoms = lower
        if not TMA:
            tops += (n * KV_HEADS + kv_head).to(tl.int64) * max_spans * D
            bottoms += (n * KV_HEADS + kv_head).to(tl.int64) * max_spans * D
        # Every row sees all of the key blocks before the tile's first one.
        unmasked = (first_block + block0) // WIDTH * WIDTH
        seen = tl.minimum(first_block + block0 + BLOCKS_PER_TILE, n_keys)
        reference = tl.zeros((BM,), tl.float32)
        top = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        reference, top, total = _walk(
            positive, negative, position, tops, bottoms, n, kv_head, 0, unmasked, spans, factor, reference, top, total,
            slot, D, BLOCK, SPAN, BM, BN, False, TMA,
        )  # fmt: skip
        reference, top, total = _walk(
            positive, negative, position, tops, bottoms, n, kv_head, unmasked, seen, spans, factor, reference, top,
            total, slot, D, BLOCK, SPAN, BM, BN, True, TMA,
        )  # fmt: skip
        out = scores + (n * (KV_HEADS * GROUP) + head).to(tl.int64) * rows * row_stride
        store_shares(
            slot, top + tl.log2(total), out, token0 < query_tokens, block0, first_block, rows, row_stride, n_keys, seen,
            BM, ROWS_PER_BLOCK, CHUNK,
        )  # fmt: skip
        tile = tl.atomic_add(ticket, 1)


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
    hopper = kernels_device.capability(q.device) >= (9, 0)
    tile = _tile(k.element_size(), D, block_size // group, block_size // span, hopper)
    row_tiles = ceil_div(n_rows, tile["BM"] // (block_size // group))
    tiles = row_tiles * H * N
    programs = min(tiles, kernels_device.multiprocessors(q.device))

    scores = empty_scores(N, H, n_rows, n_keys, q.device)
    # Less those of block 0, which attention favours, bounds are exact in float16 to 1% of any share that matters.
    stored = torch.float32 if q.dtype == torch.float32 else torch.float16
    scratch = torch.empty(programs, n_keys, tile["BM"], dtype=stored, device=q.device)
    ticket = torch.zeros(1, dtype=torch.int32, device=q.device)
    sides: list[Any] = [bounds.upper, bounds.lower]
    tma = hopper and not tma_obstacle(bounds.upper)
    if tma:
        box = [1, 1, tile["BN"], triton.next_power_of_2(D)]
        sides = [TensorDescriptor(side, list(side.shape), tma_strides(side), box) for side in sides]
    score_kernel[(programs,)](
        q, *sides, scores, scratch, ticket, scale * LOG2E, *q.stride()[:3],
        query_tokens, query_start // block_size, n_rows, n_keys, scores.stride(2), tiles, row_tiles, max_spans,
        KV_HEADS=kv_heads, GROUP=H // kv_heads, D=D, BLOCK=block_size, SPAN=span, ROW=group, CHUNK=32, TMA=tma, **tile,
    )  # fmt: skip
    return scores


def _tile(element_size: int, head_dim: int, rows_per_block: int, spans_per_block: int, hopper: bool) -> dict[str, Any]:
    """Rows (BM) and spans (BN) of a step: at least a query block's rows, whose maximum is taken in one tile, and 16
    spans, the narrowest product of tensor cores here."""
    if element_size == 4 or head_dim > 128:
        stages = 1 if element_size * head_dim > 512 else 2
        return {"BM": max(rows_per_block, 64), "BN": max(spans_per_block, 32), "num_warps": 4, "num_stages": stages}
    stages = 3 if hopper else 2
    return {"BM": max(rows_per_block, 128), "BN": max(spans_per_block, 64), "num_warps": 8, "num_stages": stages}
