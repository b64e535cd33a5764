"""Attention mass in Triton: a flash-style pass over a few rows of each query block that keeps log-sum-exps only.

A program owns a tile of rows (several query blocks' worth, so that the tensor cores are full) and walks the key blocks
once, leaving each row's base-2 log-sum-exp of every block in a scratch slot of its own (a few MiB in all, mostly in
L2). Then it reads the slot back: totals per row, shares, maxima over the rows of each query block.

The exponent needs a reference near the row's maximum, but finding each block's maximum costs as much as a quarter of
the exponentials. Instead the reference is what is known beforehand: the maximum of block 0 and the log-sum-exps so
far. It is exact as long as no block rises more than 2^127 above it; a row that does is computed again with maxima
(`SAFE`). A row's arithmetic depends on nothing but the row: not on its tile, nor on where a chunk begins.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import device as kernels_device
from kernels._common.fp8 import HeadScales
from kernels._common.fp8_triton import to_fp8
from kernels._common.scores import empty_scores
from kernels._common.sizes import ceil_div
from kernels._common.tma import tma_obstacle, tma_strides
from kernels.block_scores.triton_shares import load_keys, mean_query, store_shares, tile_of, total_of_slot

LOG2E = 1.4426950408889634
PROGRAMS_PER_MULTIPROCESSOR = 2
INF = tl.constexpr(float("inf"))


@triton.jit
def _walk(
    query, position, k, n, kv_head, k_stride_t, tokens, first, last, scale_log2, reference, failed, slot,
    D: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, SAFE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """slot[j, row] = log2-sum-exp2 of the row's scores in key blocks [first, last). SAFE: only of rows that failed."""
    row = tl.arange(0, BM)
    for j in range(first, last):
        total = tl.zeros((BM,), tl.float32)
        if SAFE:
            reference = tl.full((BM,), float("-inf"), tl.float32)
        for part in tl.static_range(0, BLOCK, BN):
            token = j * BLOCK + part
            keys = load_keys(k, n, kv_head, token, k_stride_t, tokens, D, BN, TMA)
            dots = tl.dot(query, keys.T)
            if MASKED:
                visible = (token + tl.arange(0, BN))[None, :] <= position[:, None]
            if SAFE:
                masked = dots
                if MASKED:
                    masked = tl.where(visible, dots, float("-inf"))
                top = tl.maximum(reference, tl.max(masked, axis=1) * scale_log2)
                # Nothing visible yet: any finite reference does.
                shrink = tl.where(reference > float("-inf"), tl.exp2(reference - top), 0.0)
                reference = top
                total *= shrink
            base = reference
            if SAFE:
                base = tl.where(reference > float("-inf"), reference, 0.0)
            weights = tl.exp2(tl.fma(dots, scale_log2, -base[:, None]))
            if MASKED:
                weights = tl.where(visible, weights, 0.0)
            total += tl.sum(weights, axis=1)
        mass = base + tl.log2(total)
        if SAFE:
            tl.store(slot + j * BM + row, mass, mask=failed)
        else:
            tl.store(slot + j * BM + row, mass)
            overflow = mass == INF
            failed = failed | overflow
            reference = tl.where(overflow, reference, tl.maximum(reference, mass))
    return reference, failed


@triton.jit(do_not_specialize=["query_tokens", "first_block", "rows", "n_keys", "tiles", "row_tiles", "slot_blocks"])
def mass_kernel(
    q, k, k_desc, q_scale, k_scale, scores, scratch, ticket, scale_log2,
    q_stride_n, q_stride_h, q_stride_t, k_stride_n, k_stride_h, k_stride_t,
    query_tokens, first_block, rows, n_keys, row_stride, tiles, row_tiles, slot_blocks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROW: tl.constexpr,
    MEAN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, TMA: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Persistent: programs draw tiles, all of a KV head's before the next one's (its keys stay in L2), longest first.

    ROW: queries that a row stands for. scratch [programs, slot_blocks, BM]; ticket: a zeroed int32."""
    ROWS_PER_BLOCK: tl.constexpr = BLOCK // ROW
    BLOCKS_PER_TILE: tl.constexpr = BM // ROWS_PER_BLOCK
    DP: tl.constexpr = triton.next_power_of_2(D)
    slot = scratch + tl.program_id(0).to(tl.int64) * slot_blocks * BM
    row = tl.arange(0, BM)
    d = tl.arange(0, DP)
    tile = tl.atomic_add(ticket, 1)
    while tile < tiles:
        n, head, kv_head, block0 = tile_of(tile, row_tiles, KV_HEADS, GROUP, BLOCKS_PER_TILE)
        token0 = block0 * BLOCK + row * ROW
        last_token = tl.minimum(token0 + ROW, query_tokens) - 1
        source = q + n.to(tl.int64) * q_stride_n + head.to(tl.int64) * q_stride_h
        if MEAN:
            query = mean_query(source, q_stride_t, token0, query_tokens, D, ROW, BM)
        else:
            sampled = last_token.to(tl.int64)[:, None] * q_stride_t + d[None, :]
            query = tl.load(source + sampled, mask=(token0 < query_tokens)[:, None] & (d < D)[None, :], other=0.0)
        factor = scale_log2
        if FP8:
            own_scale = tl.load(q_scale + head)
            query = to_fp8(query, own_scale)
            factor *= own_scale * tl.load(k_scale + kv_head)
        else:
            query = query.to(q.dtype.element_ty)

        position = first_block * BLOCK + last_token
        tokens = first_block * BLOCK + query_tokens
        keys = k
        if TMA:
            keys = k_desc
        else:
            keys += n.to(tl.int64) * k_stride_n + kv_head.to(tl.int64) * k_stride_h
        begin = load_keys(keys, n, kv_head, 0, k_stride_t, tokens, D, BN, TMA)
        dots = tl.dot(query, begin.T)
        dots = tl.where(tl.arange(0, BN)[None, :] <= position[:, None], dots, float("-inf"))
        reference = tl.max(dots, axis=1) * factor
        failed = row < 0
        unmasked = first_block + block0
        seen = tl.minimum(unmasked + BLOCKS_PER_TILE, n_keys)
        reference, failed = _walk(
            query, position, keys, n, kv_head, k_stride_t, tokens, 0, unmasked, factor, reference, failed, slot,
            D, BLOCK, BM, BN, False, False, TMA,
        )  # fmt: skip
        reference, failed = _walk(
            query, position, keys, n, kv_head, k_stride_t, tokens, unmasked, seen, factor, reference, failed, slot,
            D, BLOCK, BM, BN, True, False, TMA,
        )  # fmt: skip
        if tl.max(failed.to(tl.int32), axis=0) > 0:
            _walk(
                query, position, keys, n, kv_head, k_stride_t, tokens, 0, seen, factor, reference, failed, slot,
                D, BLOCK, BM, BN, True, True, TMA,
            )  # fmt: skip
        out = scores + (n * (KV_HEADS * GROUP) + head).to(tl.int64) * rows * row_stride
        total = total_of_slot(slot, seen, BM, CHUNK)
        store_shares(
            slot, total, out, token0 < query_tokens, block0, first_block, rows, row_stride, n_keys, seen,
            BM, ROWS_PER_BLOCK, CHUNK,
        )  # fmt: skip
        tile = tl.atomic_add(ticket, 1)


def _tile(element_size: int, head_dim: int, block_size: int, rows_per_block: int, hopper: bool) -> dict[str, Any]:
    """Rows (BM) and keys (BN) of a step. On Hopper 4 warps hold 128 x 64 scores, and two programs share a
    multiprocessor: one is in its matrix product while the other is in its exponentials."""
    if element_size == 4:
        # At least rows_per_block rows: a query block's maximum is taken inside one tile.
        stages = 2 if head_dim <= 128 else 1
        return {"BM": max(rows_per_block, 64), "BN": min(block_size, 32), "num_warps": 4, "num_stages": stages}
    wide = head_dim > 128
    roomy = hopper and not wide
    return {
        "BM": max(rows_per_block, 64 if wide else 128),
        "BN": min(block_size, 64),
        "num_warps": 4 if roomy else 8,
        "num_stages": 3 if roomy else 2,
    }


def mass_scores(
    q: Tensor,
    k: Tensor,
    query_start: int,
    block_size: int,
    group: int,
    rows: str,
    scale: float,
    scales: HeadScales | None = None,
) -> Tensor:
    """See kernels.block_scores.mass_scores. block_size in 16..128 and group must be powers of two.

    float32 inputs are multiplied in TF32: the shares' errors matter to near ties only."""
    if block_size not in (16, 32, 64, 128) or group & (group - 1):
        raise ValueError(
            f"the Triton path needs block_size 16, 32, 64 or 128 and a power of two as group, got {block_size}, {group}"
        )
    if q.stride(-1) != 1 or k.stride(-1) != 1:
        raise ValueError("the last dimension of q and k must be contiguous")
    N, H, query_tokens, D = q.shape
    kv_heads, device = k.shape[1], q.device
    n_rows, n_keys = ceil_div(query_tokens, block_size), ceil_div(query_start + query_tokens, block_size)
    hopper = kernels_device.capability(device) >= (9, 0)
    tile = _tile(k.element_size(), D, block_size, block_size // group, hopper)
    row_tiles = ceil_div(n_rows, tile["BM"] // (block_size // group))
    tiles = row_tiles * H * N
    programs = min(tiles, PROGRAMS_PER_MULTIPROCESSOR * kernels_device.multiprocessors(device))

    scores = empty_scores(N, H, n_rows, n_keys, device)
    scratch = torch.empty(programs, n_keys, tile["BM"], dtype=torch.float32, device=device)
    ticket = torch.zeros(1, dtype=torch.int32, device=device)
    tma = hopper and not tma_obstacle(k)
    k_desc: Any = k
    if tma:
        box = [1, 1, tile["BN"], triton.next_power_of_2(D)]
        k_desc = TensorDescriptor(k, list(k.shape), tma_strides(k), box)
    mass_kernel[(programs,)](
        q, k, k_desc, scores if scales is None else scales.q, scores if scales is None else scales.k,
        scores, scratch, ticket, scale * LOG2E, *q.stride()[:3], *k.stride()[:3],
        query_tokens, query_start // block_size, n_rows, n_keys, scores.stride(2), tiles, row_tiles, n_keys,
        KV_HEADS=kv_heads, GROUP=H // kv_heads, D=D, BLOCK=block_size, ROW=group, MEAN=rows == "mean", CHUNK=32,
        TMA=tma, FP8=scales is not None, **tile,
    )  # fmt: skip
    return scores
