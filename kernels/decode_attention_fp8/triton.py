"""fp8 decode attention in Triton: as kernels.decode_attention.triton, split over the keys, then merged.

Bandwidth decides, so keys and values are widened to float16 in registers (exact: e4m3 is a subset) and only they are
fp8: queries are divided by their largest magnitude, which float16 then holds to 11 bits, and probabilities are scaled
by 2^14. Rows of keys are loaded in the order in which the values are stored (kernels.fp8_heads), so that scores and
values agree on what a column is.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels._common.attention import LOG2E
from kernels._common.decode_triton import (
    NO_WINDOW,
    GroupTiles,
    allocate_shares,
    group_rows,
    group_share,
    group_tiles,
    merge,
)
from kernels._common.fp8 import HeadScales
from kernels._common.fp8_triton import key_at
from kernels._common.prefixes import Prefixes
from kernels._common.sizes import power_of_2

WEIGHT_BITS = tl.constexpr(14.0)


@triton.jit(do_not_specialize=["window"])
def share_kernel(
    q, k, vt, k_scale, v_scale, starts, lengths, partial, partial_lse, scale_log2, window,
    q_stride_s, q_stride_h, k_stride_h, k_stride_t, v_stride_h, v_stride_d,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SHARES: tl.constexpr, STRIDE: tl.constexpr,
    BG: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (share, KV head, document): normalised partial output [GROUP, D] and its base-2 log-sum-exp.

    STRIDE: from one head's first share to the next one's.
    """
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    share = tl.program_id(0)
    kv_head = tl.program_id(1)
    s = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + s)
    first = tl.maximum(length - window, 0)
    # Shares begin at multiples of 16 keys, the group in which values are permuted.
    origin = first // 16 * 16
    per_share = tl.cdiv(tl.cdiv(length - origin, SHARES), BN) * BN
    begin = origin + share * per_share
    end = tl.minimum(begin + per_share, length)

    g = tl.arange(0, BG)
    d = tl.arange(0, BLOCK_D)
    place = (s * KV_HEADS + kv_head) * GROUP + g
    if begin >= end:
        tl.store(partial_lse + place * STRIDE + share, tl.full((BG,), float("-inf"), tl.float32), mask=g < GROUP)
    else:
        inside = (g < GROUP)[:, None] & (d < D)[None, :]
        heads = kv_head * GROUP + g
        query = tl.load(q + s * q_stride_s + heads[:, None] * q_stride_h + d[None, :], mask=inside, other=0.0)
        query = query.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(query), axis=1), 1e-30)
        query = (query / largest[:, None]).to(tl.float16)
        factor = largest * (tl.load(k_scale + kv_head) * scale_log2)
        t = tl.arange(0, BN)
        start = tl.multiple_of(tl.load(starts + s), 16)
        k += kv_head.to(tl.int64) * k_stride_h + start * k_stride_t
        vt += kv_head.to(tl.int64) * v_stride_h + start
        v_rows = vt + d.to(tl.int64)[:, None] * v_stride_d
        top = tl.full((BG,), float("-inf"), tl.float32)
        total = tl.zeros((BG,), tl.float32)
        acc = tl.zeros((BG, BLOCK_D), tl.float32)
        # The group that holds the last key is read whole (its other values are finite), so that the mask and the
        # address are known to be constant and aligned over 16 bytes: otherwise Triton would load them one by one.
        last_group = (end + 15) // 16 * 16
        for at in tl.range(begin, end, BN, num_stages=STAGES):
            key = at + key_at(t)
            exists = (key >= first) & (key < end)
            keys = tl.load(
                k + key.to(tl.int64)[:, None] * k_stride_t + d[None, :],
                mask=exists[:, None] & (d < D)[None, :], other=0.0,
            )  # fmt: skip
            logits = tl.dot(query, keys.to(tl.float16).T) * factor[:, None]
            logits = tl.where(exists[None, :], logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, axis=1))
            # Finite: every step sees a key, also the one in whose first 16 keys a window begins.
            weights = tl.exp2(logits - (new_top - WEIGHT_BITS)[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(weights, axis=1)
            stored = at + t < last_group
            values = tl.load(v_rows + (at + t)[None, :], mask=(d < D)[:, None] & stored[None, :], other=0.0)
            acc = tl.dot(weights.to(tl.float16), values.to(tl.float16).T, acc * shrink[:, None])
            top = new_top
        target = partial + (place * STRIDE + share)[:, None] * D + d[None, :]
        tl.store(target, acc * (tl.load(v_scale + kv_head) / total)[:, None], mask=inside)
        tl.store(partial_lse + place * STRIDE + share, top - WEIGHT_BITS + tl.log2(total), mask=g < GROUP)


@triton.jit
def group_step(
    query, factor, k, v_rows, at, begin, end, last, top, total, acc, k_stride_t,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys [at, at + BN) of a share that ends at `last`. MASKED: not all queries see all of them."""
    t = tl.arange(0, BN)
    d = tl.arange(0, triton.next_power_of_2(D))
    key = at + key_at(t)
    k_mask = (d < D)[None, :]
    v_mask = (d < D)[:, None]
    if MASKED:
        k_mask = k_mask & (key < last)[:, None]
        v_mask = v_mask & (at + t < (last + 15) // 16 * 16)[None, :]  # groups are read whole, as in share_kernel
    keys = tl.load(k + key.to(tl.int64)[:, None] * k_stride_t + d[None, :], mask=k_mask, other=0.0)
    products = tl.dot(query, keys.to(tl.float16).T)
    if MASKED:
        seen = (key[None, :] >= begin[:, None]) & (key[None, :] < tl.minimum(end, last)[:, None])
        products = tl.where(seen, products, float("-inf"))
    new_top = tl.maximum(top, tl.max(products, axis=1) * factor)
    # A row may not have seen a key yet.
    level = tl.where(new_top > float("-inf"), new_top, 0.0) if MASKED else new_top
    weights = tl.exp2(products * factor[:, None] - (level - WEIGHT_BITS)[:, None])
    shrink = tl.exp2(top - level)
    total = total * shrink + tl.sum(weights, axis=1)
    values = tl.load(v_rows + (at + t)[None, :], mask=v_mask, other=0.0)
    acc = tl.dot(weights.to(tl.float16), values.to(tl.float16).T, acc * shrink[:, None])
    return new_top, total, acc


@triton.jit(do_not_specialize=["window", "rows", "groups"])
def group_kernel(
    q, k, vt, k_scale, v_scale, members, prefix_starts, prefix_lengths, lengths, partial, partial_lse, scale_log2,
    window, rows, groups, q_stride_s, q_stride_h, k_stride_h, k_stride_t, v_stride_h, v_stride_d, members_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SHARES: tl.constexpr, STRIDE: tl.constexpr,
    MEMBERS: tl.constexpr, TILES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (tile of a share, KV head), for every group: as share_kernel, BM queries over a share of a prefix."""
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    share = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    kv_head = tl.program_id(1)
    k += kv_head.to(tl.int64) * k_stride_h
    vt += kv_head.to(tl.int64) * v_stride_h
    d = tl.arange(0, BLOCK_D)
    group = 0
    while tl.load(members, mask=group < groups, other=-1) >= 0:
        row, g, begin, end, start = group_rows(
            members, prefix_starts, prefix_lengths, lengths, rows, tile * BM, window, MEMBERS, GROUP, BM
        )
        first, clear, last = group_share(begin, end, window, share, SHARES, BN, 16)
        there = end > 0
        head = kv_head * GROUP + g
        place = (row * (KV_HEADS * GROUP) + head) * STRIDE + share
        if first >= last:
            tl.store(partial_lse + place, tl.full((BM,), float("-inf"), tl.float32), mask=there)
        else:
            inside = there[:, None] & (d < D)[None, :]
            query = tl.load(
                q + row[:, None] * q_stride_s + head[:, None] * q_stride_h + d[None, :], mask=inside, other=0.0
            ).to(tl.float32)
            largest = tl.maximum(tl.max(tl.abs(query), axis=1), 1e-30)
            query = (query / largest[:, None]).to(tl.float16)
            factor = largest * (tl.load(k_scale + kv_head) * scale_log2)
            # Known to be aligned, which Triton cannot know of a maximum, and does not believe if it is told
            # (multiple_of): values would be loaded one by one.
            start = start // 16 * 16
            keys = k + start * k_stride_t
            v_rows = vt + start + d.to(tl.int64)[:, None] * v_stride_d
            top = tl.full((BM,), float("-inf"), tl.float32)
            total = tl.zeros((BM,), tl.float32)
            acc = tl.zeros((BM, BLOCK_D), tl.float32)
            for at in tl.range(first, clear, BN, num_stages=STAGES):
                top, total, acc = group_step(
                    query, factor, keys, v_rows, at, begin, end, last, top, total, acc, k_stride_t, D, BM, BN, False
                )
            for at in tl.range(clear, last, BN, num_stages=1):
                top, total, acc = group_step(
                    query, factor, keys, v_rows, at, begin, end, last, top, total, acc, k_stride_t, D, BM, BN, True
                )
            target = partial + place[:, None] * D + d[None, :]
            unit = tl.load(v_scale + kv_head) / tl.where(total > 0.0, total, 1.0)
            tl.store(target, acc * unit[:, None], mask=inside)
            tl.store(partial_lse + place, top - WEIGHT_BITS + tl.log2(total), mask=there)
        group += 1
        members += members_stride


def _group_tile(height: int, head_dim: int) -> dict[str, Any]:
    """Keys a step, and warps, with which nothing is spilled (tests/kernels/test_compile_fp8_attention.py)."""
    size = power_of_2(head_dim)
    if height <= 16 and size <= 128:
        return {"BN": 128, "STAGES": 3, "num_warps": 4}
    return {"BN": 64 if height * size <= 8192 else 32, "STAGES": 3, "num_warps": 8}


def _attend_to_prefixes(
    q: Tensor,
    k: Tensor,
    vt: Tensor,
    scales: HeadScales,
    lengths: Tensor,
    prefixes: Prefixes,
    tiles: GroupTiles,
    partial: Tensor,
    partial_lse: Tensor,
    scale: float,
    window: int | None,
) -> None:
    """The first shares of `partial`."""
    S, H, D = q.shape
    kv_heads = k.shape[0]
    members = prefixes.members
    group_kernel[(tiles.shares * tiles.count, kv_heads)](
        q, k, vt, scales.k, scales.v, members, prefixes.starts, prefixes.lengths, lengths, partial, partial_lse,
        scale * LOG2E, NO_WINDOW if window is None else window, S, members.shape[0],
        *q.stride()[:2], *k.stride()[:2], *vt.stride()[:2], members.stride(0),
        KV_HEADS=kv_heads, GROUP=H // kv_heads, D=D, SHARES=tiles.shares, STRIDE=partial.shape[2],
        MEMBERS=members.shape[1], TILES=tiles.count, BM=tiles.BM, **_group_tile(tiles.BM, D),
    )  # fmt: skip


def attend_to_own_keys(
    q: Tensor,
    k: Tensor,
    vt: Tensor,
    scales: HeadScales,
    starts: Tensor,
    lengths: Tensor,
    max_length: int,
    scale: float,
    window: int | None,
    before: int,
) -> tuple[Tensor, Tensor]:
    """What the shares of every row give (allocate_shares); the first `before`, those of prefixes, are not written."""
    S, H, D = q.shape
    kv_heads = k.shape[0]
    longest = max_length if window is None else min(max_length, window + 15)
    partial, partial_lse = allocate_shares(q, kv_heads, longest, before)
    shares = partial.shape[2]
    own_shares = partial[:, :, before:], partial_lse[:, :, before:]
    # 16 KiB of keys a step; three stages of keys and values leave room for two programs on a multiprocessor.
    block_d = triton.next_power_of_2(D)
    share_kernel[(shares - before, kv_heads, S)](
        q, k, vt, scales.k, scales.v, starts, lengths, *own_shares, scale * LOG2E,
        NO_WINDOW if window is None else window, *q.stride()[:2], *k.stride()[:2], *vt.stride()[:2],
        KV_HEADS=kv_heads, GROUP=H // kv_heads, D=D, SHARES=shares - before, STRIDE=shares,
        BG=max(16, triton.next_power_of_2(H // kv_heads)), BN=max(32, min(128, 16384 // block_d)), STAGES=3,
        num_warps=4,
    )  # fmt: skip
    return partial, partial_lse


def decode_attention_fp8(
    q: Tensor,
    k: Tensor,
    vt: Tensor,
    scales: HeadScales,
    starts: Tensor,
    lengths: Tensor,
    max_length: int,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    prefixes: Prefixes | None = None,
) -> Tensor:
    """See kernels.decode_attention_fp8."""
    tiles = None if prefixes is None else group_tiles(q, k.shape[0], prefixes, window, align=16)
    before = 0 if tiles is None else tiles.shares
    partial, partial_lse = attend_to_own_keys(q, k, vt, scales, starts, lengths, max_length, scale, window, before)
    if prefixes is not None and tiles is not None:
        _attend_to_prefixes(q, k, vt, scales, lengths, prefixes, tiles, partial, partial_lse, scale, window)
    return merge(partial, partial_lse, q.dtype, sinks, prefixes, before)
