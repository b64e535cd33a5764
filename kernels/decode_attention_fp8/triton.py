"""fp8 decode attention in Triton: as kernels.decode_attention.triton, split over the keys, then merged.

Bandwidth decides, so keys and values are widened to float16 in registers (exact: e4m3 is a subset) and only they are
fp8: queries are divided by their largest magnitude, which float16 then holds to 11 bits, and probabilities are scaled
by 2^14. Rows of keys are loaded in the order in which the values are stored (kernels.fp8_heads), so that scores and
values agree on what a column is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels._common.attention import LOG2E
from kernels._common.decode_triton import NO_WINDOW, allocate_shares, merge
from kernels._common.fp8 import HeadScales
from kernels._common.fp8_triton import key_at

WEIGHT_BITS = tl.constexpr(14.0)


@triton.jit(do_not_specialize=["window"])
def share_kernel(
    q, k, vt, k_scale, v_scale, starts, lengths, partial, partial_lse, scale_log2, window,
    q_stride_s, q_stride_h, k_stride_h, k_stride_t, v_stride_h, v_stride_d,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SHARES: tl.constexpr,
    BG: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (share, KV head, document): normalised partial output [GROUP, D] and its base-2 log-sum-exp."""
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
        tl.store(partial_lse + place * SHARES + share, tl.full((BG,), float("-inf"), tl.float32), mask=g < GROUP)
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
        target = partial + (place * SHARES + share)[:, None] * D + d[None, :]
        tl.store(target, acc * (tl.load(v_scale + kv_head) / total)[:, None], mask=inside)
        tl.store(partial_lse + place * SHARES + share, top - WEIGHT_BITS + tl.log2(total), mask=g < GROUP)


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
) -> Tensor:
    """See kernels.decode_attention_fp8."""
    S, H, D = q.shape
    kv_heads = k.shape[0]
    partial, partial_lse = allocate_shares(q, kv_heads, max_length if window is None else min(max_length, window + 15))
    shares = partial.shape[2]
    # 16 KiB of keys a step; three stages of keys and values leave room for two programs on a multiprocessor.
    block_d = triton.next_power_of_2(D)
    share_kernel[(shares, kv_heads, S)](
        q, k, vt, scales.k, scales.v, starts, lengths, partial, partial_lse, scale * LOG2E,
        NO_WINDOW if window is None else window, *q.stride()[:2], *k.stride()[:2], *vt.stride()[:2],
        KV_HEADS=kv_heads, GROUP=H // kv_heads, D=D, SHARES=shares,
        BG=max(16, triton.next_power_of_2(H // kv_heads)), BN=max(32, min(128, 16384 // block_d)), STAGES=3,
        num_warps=4,
    )  # fmt: skip
    return merge(partial, partial_lse, q.dtype, sinks)
