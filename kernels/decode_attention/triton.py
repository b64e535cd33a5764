"""Decode attention in Triton: split over the keys, then merged. Each key and value is read once.

A program serves all query heads of one KV head (padded to 16 rows, what a tensor core takes) for one share of one
document's extent. The grid depends on the number of documents and on `max_length` only, so that a CUDA graph can be
captured; every document is cut into equally many shares of its own length, so that one long document alone fills the
GPU. Shares past a document's end leave a log-sum-exp of -inf, which the merge skips.

Where rows share a prefix, programs of a second kernel go over its shares, the queries of all its rows (or as many as a
tile holds; the tiles of a share are neighbours in the grid and find its keys in the L2 cache) against each key that is
read; the merge joins both kernels' shares.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.attention import LOG2E, dot_precision
from kernels._common.decode_triton import (
    NO_WINDOW,
    GroupTiles,
    allocate_shares,
    group_rows,
    group_share,
    group_tiles,
    merge,
)
from kernels._common.prefixes import Prefixes
from kernels._common.sizes import power_of_2


@triton.jit(do_not_specialize=["window"])
def share_kernel(
    q, k, v, starts, lengths, partial, partial_lse, scale_log2, window,
    q_stride_s, q_stride_h, k_stride_h, k_stride_t, v_stride_h, v_stride_t,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SHARES: tl.constexpr, STRIDE: tl.constexpr,
    BG: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (share, KV head, document): normalised partial output [GROUP, D] and its base-2 log-sum-exp.

    STRIDE: from one head's first share to the next one's.
    """
    share = tl.program_id(0)
    kv_head = tl.program_id(1)
    s = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + s)
    first = tl.maximum(length - window, 0)
    per_share = tl.cdiv(tl.cdiv(length - first, SHARES), BN) * BN
    begin = first + share * per_share
    end = tl.minimum(begin + per_share, length)

    g = tl.arange(0, BG)
    d = tl.arange(0, triton.next_power_of_2(D))
    place = (s * KV_HEADS + kv_head) * GROUP + g
    if begin >= end:
        tl.store(partial_lse + place * STRIDE + share, tl.full((BG,), float("-inf"), tl.float32), mask=g < GROUP)
    else:
        inside = (g < GROUP)[:, None] & (d < D)[None, :]
        heads = kv_head * GROUP + g
        query = tl.load(q + s * q_stride_s + heads[:, None] * q_stride_h + d[None, :], mask=inside, other=0.0)
        t = tl.arange(0, BN)
        start = tl.load(starts + s) + begin
        k += kv_head.to(tl.int64) * k_stride_h
        v += kv_head.to(tl.int64) * v_stride_h
        top = tl.full((BG,), float("-inf"), tl.float32)
        total = tl.zeros((BG,), tl.float32)
        acc = tl.zeros((BG, triton.next_power_of_2(D)), tl.float32)
        for at in tl.range(0, end - begin, BN, num_stages=STAGES):
            exists = at + t < end - begin
            mask = exists[:, None] & (d < D)[None, :]
            keys = tl.load(k + (start + at) * k_stride_t + t[:, None] * k_stride_t + d[None, :], mask=mask, other=0.0)
            logits = tl.dot(query, keys.T, input_precision=PRECISION) * scale_log2
            logits = tl.where(exists[None, :], logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, axis=1))
            weights = tl.exp2(logits - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(weights, axis=1)
            values = tl.load(v + (start + at) * v_stride_t + t[:, None] * v_stride_t + d[None, :], mask=mask, other=0.0)
            acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
            top = new_top
        target = partial + (place * STRIDE + share)[:, None] * D + d[None, :]
        tl.store(target, acc / total[:, None], mask=inside)
        tl.store(partial_lse + place * STRIDE + share, top + tl.log2(total), mask=g < GROUP)


@triton.jit
def group_step(
    query, k, v, at, begin, end, last, top, total, acc, scale_log2, k_stride_t, v_stride_t,
    D: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys [at, at + BN) of a share that ends at `last`. MASKED: not all queries see all of them."""
    key = at + tl.arange(0, BN)
    d = tl.arange(0, triton.next_power_of_2(D))
    mask = (d < D)[None, :]
    if MASKED:
        mask = mask & (key < last)[:, None]
    place = key.to(tl.int64)[:, None]
    keys = tl.load(k + place * k_stride_t + d[None, :], mask=mask, other=0.0)
    products = tl.dot(query, keys.T, input_precision=PRECISION)
    if MASKED:
        seen = (key[None, :] >= begin[:, None]) & (key[None, :] < tl.minimum(end, last)[:, None])
        products = tl.where(seen, products, float("-inf"))
    new_top = tl.maximum(top, tl.max(products, axis=1) * scale_log2)
    # A row may not have seen a key yet.
    level = tl.where(new_top > float("-inf"), new_top, 0.0) if MASKED else new_top
    weights = tl.exp2(products * scale_log2 - level[:, None])
    shrink = tl.exp2(top - level)
    total = total * shrink + tl.sum(weights, axis=1)
    values = tl.load(v + place * v_stride_t + d[None, :], mask=mask, other=0.0)
    if values.dtype == tl.float32:
        # The tensor cores cut off what does not fit when they add: a sum of its own for each step loses less. (A
        # multiply-add by name: Triton would make an addition to a product part of the product again.)
        products = tl.dot(weights, values, input_precision=PRECISION)
        acc = tl.fma(acc, shrink[:, None].broadcast_to(acc.shape), products)
    else:
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit(do_not_specialize=["window", "rows", "groups"])
def group_kernel(
    q, k, v, members, prefix_starts, prefix_lengths, lengths, partial, partial_lse, scale_log2, window, rows, groups,
    q_stride_s, q_stride_h, k_stride_h, k_stride_t, v_stride_h, v_stride_t, members_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SHARES: tl.constexpr, STRIDE: tl.constexpr,
    MEMBERS: tl.constexpr, TILES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of a share, KV head), for every group: as share_kernel, BM queries over a share of a prefix."""
    share = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    kv_head = tl.program_id(1)
    k += kv_head.to(tl.int64) * k_stride_h
    v += kv_head.to(tl.int64) * v_stride_h
    d = tl.arange(0, triton.next_power_of_2(D))
    group = 0
    while tl.load(members, mask=group < groups, other=-1) >= 0:
        row, g, begin, end, start = group_rows(
            members, prefix_starts, prefix_lengths, lengths, rows, tile * BM, window, MEMBERS, GROUP, BM
        )
        first, clear, last = group_share(begin, end, window, share, SHARES, BN, 1)
        there = end > 0
        head = kv_head * GROUP + g
        place = (row * (KV_HEADS * GROUP) + head) * STRIDE + share
        if first >= last:
            tl.store(partial_lse + place, tl.full((BM,), float("-inf"), tl.float32), mask=there)
        else:
            inside = there[:, None] & (d < D)[None, :]
            query = tl.load(
                q + row[:, None] * q_stride_s + head[:, None] * q_stride_h + d[None, :], mask=inside, other=0.0
            )
            keys = k + start * k_stride_t
            values = v + start * v_stride_t
            top = tl.full((BM,), float("-inf"), tl.float32)
            total = tl.zeros((BM,), tl.float32)
            acc = tl.zeros((BM, triton.next_power_of_2(D)), tl.float32)
            for at in tl.range(first, clear, BN, num_stages=STAGES):
                top, total, acc = group_step(
                    query, keys, values, at, begin, end, last, top, total, acc, scale_log2, k_stride_t, v_stride_t,
                    D, BN, PRECISION, False,
                )  # fmt: skip
            for at in tl.range(clear, last, BN, num_stages=1):
                top, total, acc = group_step(
                    query, keys, values, at, begin, end, last, top, total, acc, scale_log2, k_stride_t, v_stride_t,
                    D, BN, PRECISION, True,
                )  # fmt: skip
            target = partial + place[:, None] * D + d[None, :]
            tl.store(target, acc / tl.where(total > 0.0, total, 1.0)[:, None], mask=inside)
            tl.store(partial_lse + place, top + tl.log2(total), mask=there)
        group += 1
        members += members_stride


def _group_tile(height: int, element_size: int, head_dim: int) -> dict[str, Any]:
    """As _tile, for tiles of `height` queries: without spills (tests/kernels/test_compile_selection.py)."""
    many = height >= 128 or (power_of_2(head_dim) > 128 and (height > 16 or element_size == 4))
    return _tile(element_size, head_dim) | {"num_warps": 8 if many else 4}


def _attend_to_prefixes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
        q, k, v, members, prefixes.starts, prefixes.lengths, lengths, partial, partial_lse, scale * LOG2E,
        NO_WINDOW if window is None else window, S, members.shape[0],
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], members.stride(0),
        KV_HEADS=kv_heads, GROUP=H // kv_heads, D=D, SHARES=tiles.shares, STRIDE=partial.shape[2],
        MEMBERS=members.shape[1], TILES=tiles.count, BM=tiles.BM,
        PRECISION=dot_precision(q),
        **_group_tile(tiles.BM, q.element_size(), D),
    )  # fmt: skip


def _tile(element_size: int, head_dim: int) -> dict[str, Any]:
    """16 KiB of keys a step: three stages of keys and values leave room for two programs on a multiprocessor."""
    row = element_size * power_of_2(head_dim)
    return {"BN": max(16, min(128, 16384 // row)), "STAGES": 3 if row <= 1024 else 1, "num_warps": 4}


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_length: int,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    prefixes: Prefixes | None = None,
) -> Tensor:
    """See kernels.decode_attention."""
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        raise ValueError("the last dimension of q, k and v must be contiguous")
    S, H, D = q.shape
    kv_heads = k.shape[0]
    longest = max_length if window is None else min(max_length, window)
    tiles = None if prefixes is None else group_tiles(q, kv_heads, prefixes, window, align=1)
    before = 0 if tiles is None else tiles.shares
    partial, partial_lse = allocate_shares(q, kv_heads, longest, before)
    shares = partial.shape[2]
    own_shares = partial[:, :, before:], partial_lse[:, :, before:]
    share_kernel[(shares - before, kv_heads, S)](
        q, k, v, starts, lengths, *own_shares, scale * LOG2E, NO_WINDOW if window is None else window,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        KV_HEADS=kv_heads, GROUP=H // kv_heads, D=D, SHARES=shares - before, STRIDE=shares,
        BG=max(16, power_of_2(H // kv_heads)),
        PRECISION=dot_precision(q), **_tile(q.element_size(), D),
    )  # fmt: skip
    if prefixes is not None and tiles is not None:
        _attend_to_prefixes(q, k, v, lengths, prefixes, tiles, partial, partial_lse, scale, window)
    return merge(partial, partial_lse, q.dtype, sinks, prefixes, before)
