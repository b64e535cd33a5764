"""Decode attention in Triton: split over the keys, then merged. Each key and value is read once.

A program serves all query heads of one KV head (padded to 16 rows, what a tensor core takes) for one share of one
document's extent. The grid depends on the number of documents and on `max_length` only, so that a CUDA graph can be
captured; every document is cut into equally many shares of its own length, so that one long document alone fills the
GPU. Shares past a document's end leave a log-sum-exp of -inf, which the merge skips.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.attention import LOG2E
from kernels._common.decode_triton import NO_WINDOW, allocate_shares, merge
from kernels._common.sizes import power_of_2


@triton.jit(do_not_specialize=["window"])
def share_kernel(
    q, k, v, starts, lengths, partial, partial_lse, scale_log2, window,
    q_stride_s, q_stride_h, k_stride_h, k_stride_t, v_stride_h, v_stride_t,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SHARES: tl.constexpr,
    BG: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (share, KV head, document): normalised partial output [GROUP, D] and its base-2 log-sum-exp."""
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
        tl.store(partial_lse + place * SHARES + share, tl.full((BG,), float("-inf"), tl.float32), mask=g < GROUP)
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
        target = partial + (place * SHARES + share)[:, None] * D + d[None, :]
        tl.store(target, acc / total[:, None], mask=inside)
        tl.store(partial_lse + place * SHARES + share, top + tl.log2(total), mask=g < GROUP)


def _tile(element_size: int, head_dim: int) -> dict[str, Any]:
    """16 KiB of keys a step: three stages of keys and values leave room for two programs on a multiprocessor."""
    row = element_size * power_of_2(head_dim)
    return {"BN": max(16, min(128, 16384 // row)), "STAGES": 3, "num_warps": 4}


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
) -> Tensor:
    """See kernels.decode_attention."""
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        raise ValueError("the last dimension of q, k and v must be contiguous")
    S, H, D = q.shape
    kv_heads = k.shape[0]
    partial, partial_lse = allocate_shares(q, kv_heads, max_length if window is None else min(max_length, window))
    shares = partial.shape[2]
    share_kernel[(shares, kv_heads, S)](
        q, k, v, starts, lengths, partial, partial_lse, scale * LOG2E, NO_WINDOW if window is None else window,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        KV_HEADS=kv_heads, GROUP=H // kv_heads, D=D, SHARES=shares,
        BG=max(16, power_of_2(H // kv_heads)),
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", **_tile(q.element_size(), D),
    )  # fmt: skip
    return merge(partial, partial_lse, q.dtype, sinks)
