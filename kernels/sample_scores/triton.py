"""The scores of sampled rows in Triton: the first half of flash attention, for a few rows of each query block.

A program owns a tile of rows (several query blocks' worth, so that the tensor cores are full), walks the key blocks
once, and leaves each row's base-2 logarithm of every block's weight in a scratch slot of its own; totals are added up
on the way. Then it reads the slot back: shares, and their maxima over the rows of each query block. A row's arithmetic
depends on nothing but the row: not on its tile, nor on where a chunk begins.
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
from kernels.sample_scores.reference import PEAKS
from kernels.sample_scores.triton_shares import load_keys, store_shares, tile_of

LOG2E = 1.4426950408889634
PROGRAMS_PER_MULTIPROCESSOR = 2
GROUPS = tl.constexpr(PEAKS)


@triton.jit
def _walk(
    query, position, k, n, kv_head, k_stride_t, tokens, first, last, factor, top, total, slot,
    D: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """slot[j, row] = log2 of the row's weight of key block j, first <= j < last; (top, total): the running log-sum."""
    row = tl.arange(0, BM)
    for j in range(first, last):
        token = j * BLOCK
        keys = load_keys(k, n, kv_head, token, k_stride_t, tokens, D, BLOCK, TMA)
        dots = tl.dot(query, keys.T)
        if MASKED:
            dots = tl.where((token + tl.arange(0, BLOCK))[None, :] <= position[:, None], dots, float("-inf"))
        # [BM, GROUPS]: within a thread.
        peaks = tl.max(tl.max(tl.reshape(dots, (BM, BLOCK // (2 * GROUPS), GROUPS, 2)), axis=3), axis=1)
        highest = tl.max(peaks, axis=1)
        # A row that sees nothing of the block: any finite reference does.
        base = tl.where(highest > float("-inf"), highest, 0.0)
        weight = tl.sum(tl.exp2((peaks - base[:, None]) * factor), axis=1)
        weight = base * factor + tl.log2(weight)
        tl.store(slot + j * BM + row, weight)
        new_top = tl.maximum(top, weight)
        total = total * tl.exp2(top - new_top) + tl.exp2(weight - new_top)
        top = new_top
    return top, total


@triton.jit(do_not_specialize=["query_tokens", "first_block", "rows", "n_keys", "tiles", "row_tiles", "slot_blocks"])
def sample_kernel(
    q, k, k_desc, q_scale, k_scale, scores, scratch, ticket, scale_log2,
    q_stride_n, q_stride_h, q_stride_t, k_stride_n, k_stride_h, k_stride_t,
    query_tokens, first_block, rows, n_keys, row_stride, tiles, row_tiles, slot_blocks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, EVERY: tl.constexpr,
    BM: tl.constexpr, CHUNK: tl.constexpr, TMA: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Persistent: programs draw tiles, all of a KV head's before the next one's (its keys stay in L2), longest first.

    scratch [programs, slot_blocks, BM]; ticket: a zeroed int32."""
    ROWS_PER_BLOCK: tl.constexpr = BLOCK // EVERY
    BLOCKS_PER_TILE: tl.constexpr = BM // ROWS_PER_BLOCK
    DP: tl.constexpr = triton.next_power_of_2(D)
    slot = scratch + tl.program_id(0).to(tl.int64) * slot_blocks * BM
    row = tl.arange(0, BM)
    d = tl.arange(0, DP)
    tile = tl.atomic_add(ticket, 1)
    while tile < tiles:
        n, head, kv_head, block0 = tile_of(tile, row_tiles, KV_HEADS, GROUP, BLOCKS_PER_TILE)
        token0 = block0 * BLOCK + row * EVERY
        exists = token0 < query_tokens
        last_token = tl.minimum(token0 + EVERY, query_tokens) - 1
        source = q + n.to(tl.int64) * q_stride_n + head.to(tl.int64) * q_stride_h
        place = last_token.to(tl.int64)[:, None] * q_stride_t + d[None, :]
        query = tl.load(source + place, mask=exists[:, None] & (d < D)[None, :], other=0.0)
        factor = scale_log2
        if FP8:
            own_scale = tl.load(q_scale + head)
            query = to_fp8(query, own_scale)
            factor *= own_scale * tl.load(k_scale + kv_head)
        position = first_block * BLOCK + last_token
        tokens = first_block * BLOCK + query_tokens
        keys = k
        if TMA:
            keys = k_desc
        else:
            keys += n.to(tl.int64) * k_stride_n + kv_head.to(tl.int64) * k_stride_h
        unmasked = first_block + block0
        seen = tl.minimum(unmasked + BLOCKS_PER_TILE, n_keys)
        # Finite, so that a block of which a row sees nothing leaves it in place.
        top = tl.full((BM,), -3.0e38, tl.float32)
        total = tl.zeros((BM,), tl.float32)
        top, total = _walk(
            query, position, keys, n, kv_head, k_stride_t, tokens, 0, unmasked, factor, top, total, slot,
            D, BLOCK, BM, False, TMA,
        )  # fmt: skip
        top, total = _walk(
            query, position, keys, n, kv_head, k_stride_t, tokens, unmasked, seen, factor, top, total, slot,
            D, BLOCK, BM, True, TMA,
        )  # fmt: skip
        out = scores + (n * (KV_HEADS * GROUP) + head).to(tl.int64) * rows * row_stride
        store_shares(
            slot, top + tl.log2(total), out, exists, block0, first_block, rows, row_stride, n_keys, seen,
            BM, ROWS_PER_BLOCK, CHUNK,
        )  # fmt: skip
        tile = tl.atomic_add(ticket, 1)


def choose_tile(element_size: int, head_dim: int, rows_per_block: int, hopper: bool) -> dict[str, Any]:
    """Rows of a tile, at least those of a query block, whose maximum is taken inside one; warps; depth of the loads.

    On Hopper two programs share a multiprocessor, one in its products while the other finds maxima: hence `maxnreg`.
    """
    rows = 64 if element_size == 4 or head_dim > 128 else 128
    key_bytes = head_dim * element_size
    stages = 3 if key_bytes <= 128 else 2 if key_bytes <= 512 else 1
    warps = 8 if rows == 128 or head_dim > 256 else 4
    tile = {"BM": max(rows_per_block, rows), "num_warps": warps, "num_stages": stages}
    return tile | {"maxnreg": 128} if hopper and rows == 128 else tile


def sample_scores(
    q: Tensor, k: Tensor, query_start: int, block_size: int, every: int, scale: float, scales: HeadScales | None
) -> Tensor:
    """See kernels.sample_scores.sample_scores. block_size in 16..128 and `every` must be powers of two.

    float32 inputs are multiplied in TF32: the shares' errors matter to near ties only."""
    if block_size not in (16, 32, 64, 128) or every & (every - 1):
        raise ValueError(
            f"the Triton path needs block_size 16, 32, 64 or 128 and a power of two as every, got {block_size}, {every}"
        )
    if q.stride(-1) != 1 or k.stride(-1) != 1:
        raise ValueError("the last dimension of q and k must be contiguous")
    N, H, query_tokens, D = q.shape
    kv_heads, device = k.shape[1], q.device
    n_rows, n_keys = ceil_div(query_tokens, block_size), ceil_div(query_start + query_tokens, block_size)
    hopper = kernels_device.capability(device) >= (9, 0)
    tile = choose_tile(k.element_size(), D, block_size // every, hopper)
    row_tiles = ceil_div(n_rows, tile["BM"] // (block_size // every))
    tiles = row_tiles * H * N
    programs = min(tiles, PROGRAMS_PER_MULTIPROCESSOR * kernels_device.multiprocessors(device))

    scores = empty_scores(N, H, n_rows, n_keys, device)
    scratch = torch.empty(programs, n_keys, tile["BM"], dtype=torch.float32, device=device)
    ticket = torch.zeros(1, dtype=torch.int32, device=device)
    tma = hopper and not tma_obstacle(k)
    k_desc: Any = k
    if tma:
        box = [1, 1, block_size, triton.next_power_of_2(D)]
        k_desc = TensorDescriptor(k, list(k.shape), tma_strides(k), box)
    sample_kernel[(programs,)](
        q, k, k_desc, scores if scales is None else scales.q, scores if scales is None else scales.k,
        scores, scratch, ticket, scale * LOG2E, *q.stride()[:3], *k.stride()[:3],
        query_tokens, query_start // block_size, n_rows, n_keys, scores.stride(2), tiles, row_tiles, n_keys,
        KV_HEADS=kv_heads, GROUP=H // kv_heads, D=D, BLOCK=block_size, EVERY=every, CHUNK=32,
        TMA=tma, FP8=scales is not None, **tile,
    )  # fmt: skip
    return scores
