"""fp8 heads in Triton: one pass over the data."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.fp8 import BIAS_HEADS, BIAS_PARTS, FP8, KEY_GROUP, HeadScales
from kernels._common.fp8_triton import key_at, place_of, to_fp8

GROUP = tl.constexpr(KEY_GROUP)
PARTS = tl.constexpr(BIAS_PARTS)
HEADS = tl.constexpr(BIAS_HEADS)
# Of a program. Transposed values are stored in runs of this many bytes: whole lines of the cache.
TOKENS = 128


@triton.jit(do_not_specialize=["tokens"])
def quantize_kernel(
    x, y, scale, mean, tokens, stride_n, stride_h, stride_t,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Program (head, token tile, n). y: [N, tokens, H, D], contiguous."""
    head = tl.program_id(0)
    n = tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, BLOCK_D)
    inside = (token < tokens)[:, None] & (d < D)[None, :]
    x += n * stride_n + head.to(tl.int64) * stride_h
    tile = tl.load(x + token.to(tl.int64)[:, None] * stride_t + d[None, :], inside, other=0.0)
    if mean is not None:
        tile = tile.to(tl.float32) - tl.load(mean + head * D + d, d < D, other=0.0)[None, :]
    row = (n * tokens + token) * tl.num_programs(0) + head
    tl.store(y + row[:, None] * D + d[None, :], to_fp8(tile, tl.load(scale + head)), inside)


@triton.jit(do_not_specialize=["tokens", "start", "rows"])
def bias_kernel(
    k, bias, q_scale, k_scale, k_shift, q_mean, tokens, start, rows, k_stride_h, k_stride_t,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, SHARING: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Program (KV head, token tile), for the SHARING query heads of the KV head."""
    kv_head = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, BLOCK_D)
    inside = (token < tokens)[:, None] & (d < D)[None, :]
    tile = tl.load(k + kv_head * k_stride_h + token.to(tl.int64)[:, None] * k_stride_t + d[None, :], inside, other=0.0)
    tile = tile.to(tl.float32)
    if k_shift is not None:
        tile -= tl.load(k_shift + kv_head * D + d, d < D, other=0.0)[None, :]
    for plane in range(PLANES):
        row = bias + ((kv_head * PLANES + plane) * rows + start + token) * (HEADS * PARTS)
        for column in tl.static_range(HEADS):
            there = plane * HEADS + column < SHARING
            head = kv_head * SHARING + tl.where(there, plane * HEADS + column, 0)
            mean = tl.load(q_mean + head * D + d, (d < D) & there, other=0.0)
            rest = tl.sum(tile * mean[None, :], 1) / (tl.load(q_scale + head) * tl.load(k_scale + kv_head))
            for part in tl.static_range(PARTS):
                # The weight is 2^8, 2^4, 1, 2^-4: BIAS_WEIGHTS.
                value = to_fp8(rest, 2.0 ** (8 - 4 * part))
                tl.store(row + (column * PARTS + part), value, token < tokens)
                rest -= value.to(tl.float32) * 2.0 ** (8 - 4 * part)


@triton.jit(do_not_specialize=["tokens", "start_group"])
def write_kernel(
    k, v, k_arena, vt_arena, k_scale, v_scale, k_shift, tokens, start_group,
    k_stride_h, k_stride_t, v_stride_h, v_stride_t,
    ka_stride_h, ka_stride_t, va_stride_h, va_stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Program (KV head, token tile). Rows of values are loaded in stored order, so that the transposed tile is stored
    in runs of TOKENS bytes."""
    head = tl.program_id(0).to(tl.int64)
    start = start_group * GROUP  # visibly a multiple of 16: wide stores need to know
    place = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, BLOCK_D)
    real = (d < D)[None, :]

    at = place.to(tl.int64)[:, None]
    inside = (place < tokens)[:, None] & real
    tile = tl.load(k + head * k_stride_h + at * k_stride_t + d[None, :], inside, other=0.0)
    if k_shift is not None:
        tile = tile.to(tl.float32) - tl.load(k_shift + head * D + d, d < D, other=0.0)[None, :]
    target = k_arena + head * ka_stride_h + (at + start) * ka_stride_t + d[None, :]
    tl.store(target, to_fp8(tile, tl.load(k_scale + head)), inside)

    key = key_at(place)
    inside = (key < tokens)[:, None] & real
    tile = tl.load(v + head * v_stride_h + key.to(tl.int64)[:, None] * v_stride_t + d[None, :], inside, other=0.0)
    stored = tl.trans(to_fp8(tile, tl.load(v_scale + head)))
    target = vt_arena + head * va_stride_h + d.to(tl.int64)[:, None] * va_stride_d + (place + start)[None, :]
    # Up to the whole group of 16: what was not loaded is zero.
    tl.store(target, stored, (d < D)[:, None] & (place < tl.cdiv(tokens, GROUP) * GROUP)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def append_kernel(
    k, v, k_arena, vt_arena, k_scale, v_scale, k_shift, slots, tokens, k_stride_s, k_stride_h, v_stride_s, v_stride_h,
    ka_stride_h, ka_stride_t, va_stride_h, va_stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Program (KV head, token). RUN: of how many tokens a group can get values in this launch, at most."""
    head = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + s)
    d = tl.arange(0, BLOCK_D)
    real = d < D
    key = tl.load(k + s * k_stride_s + head * k_stride_h + d, real, other=0.0)
    if k_shift is not None:
        key = key.to(tl.float32) - tl.load(k_shift + head * D + d, real, other=0.0)
    tl.store(k_arena + head * ka_stride_h + slot * ka_stride_t + d, to_fp8(key, tl.load(k_scale + head)), real)
    value = tl.load(v + s * v_stride_s + head * v_stride_h + d, real, other=0.0).to(tl.float32)
    within = tl.arange(0, GROUP)
    own = within == place_of(slot % GROUP)
    columns = tl.where(own[None, :], value[:, None], 0.0)
    target = vt_arena + head * va_stride_h + d.to(tl.int64)[:, None] * va_stride_d
    target += (slot // GROUP * GROUP + within)[None, :]
    # The group's first token clears the places of the others, but for those that other programs write meanwhile.
    cleared = (within >= 0) & (slot % GROUP == 0)
    for ahead in tl.static_range(1, RUN):
        following = tl.load(slots + s + ahead, mask=s + ahead < tokens, other=-1)
        cleared = cleared & ((within != place_of(ahead)) | (following != slot + ahead))
    written = own | cleared
    tl.store(target, to_fp8(columns, tl.load(v_scale + head)), real[:, None] & written[None, :])


def quantize_heads(x: Tensor, scale: Tensor, mean: Tensor | None) -> Tensor:
    """See kernels.fp8_heads."""
    N, H, L, D = x.shape
    y = torch.empty(N, L, H, D, dtype=FP8, device=x.device)
    quantize_kernel[(H, triton.cdiv(L, TOKENS), N)](
        x, y, scale, mean, L, *x.stride()[:3], D=D, BLOCK_D=triton.next_power_of_2(D), TOKENS=TOKENS, num_warps=8
    )
    return y.transpose(1, 2)


def key_bias(k: Tensor, scales: HeadScales, bias: Tensor, start: int) -> None:
    """See kernels.fp8_heads."""
    _, kv_heads, L, D = k.shape
    bias_kernel[(kv_heads, triton.cdiv(L, TOKENS))](
        k, bias, scales.q, scales.k, scales.k_shift, scales.q_mean, L, start, bias.shape[2], *k.stride()[1:3],
        D=D, BLOCK_D=triton.next_power_of_2(D), TOKENS=TOKENS, SHARING=len(scales.q) // kv_heads, PLANES=bias.shape[1],
        num_warps=8,
    )  # fmt: skip


def write_kv(k: Tensor, v: Tensor, scales: HeadScales, k_arena: Tensor, vt_arena: Tensor, start: int) -> None:
    """See kernels.fp8_heads."""
    _, heads, L, D = k.shape
    write_kernel[(heads, triton.cdiv(L, TOKENS))](
        k, v, k_arena, vt_arena, scales.k, scales.v, scales.k_shift, L, start // KEY_GROUP,
        *k.stride()[1:3], *v.stride()[1:3], *k_arena.stride()[:2], *vt_arena.stride()[:2],
        D=D, BLOCK_D=triton.next_power_of_2(D), TOKENS=TOKENS, num_warps=8,
    )  # fmt: skip


def append_kv(
    k: Tensor, v: Tensor, scales: HeadScales, k_arena: Tensor, vt_arena: Tensor, slots: Tensor, run: int = 1
) -> None:
    """See kernels.fp8_heads."""
    tokens, heads, D = k.shape
    append_kernel[(heads, tokens)](
        k, v, k_arena, vt_arena, scales.k, scales.v, scales.k_shift, slots, tokens, *k.stride()[:2], *v.stride()[:2],
        *k_arena.stride()[:2], *vt_arena.stride()[:2], D=D, BLOCK_D=triton.next_power_of_2(D),
        RUN=min(run, KEY_GROUP), num_warps=2,
    )  # fmt: skip
