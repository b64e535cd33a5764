"""Rotary position embedding in Triton: a program turns a group of heads of one token, with cos and sin read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rotate_heads(
    x, y, cos, sin, first_head, heads, stride_h, D: tl.constexpr, R: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """x, y, cos, sin point at one token; y's heads are D apart. HALF >= R / 2 and REST >= D - R are tile widths."""
    head = first_head + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    inside = (head < heads)[:, None] & (column < R // 2)[None, :]
    real = column < R // 2
    source = x + head.to(tl.int64)[:, None] * stride_h + column[None, :]
    target = y + head[:, None] * D + column[None, :]
    dtype = x.dtype.element_ty
    work = cos.dtype.element_ty  # q's dtype or float32: each product is rounded to it, as torch does
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + R // 2, mask=inside, other=0.0).to(tl.float32)
    cos1 = tl.load(cos + column, mask=real, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos + R // 2 + column, mask=real, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin + column, mask=real, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin + R // 2 + column, mask=real, other=0.0).to(tl.float32)[None, :]
    turned1 = (first * cos1).to(work).to(tl.float32) - (second * sin1).to(work).to(tl.float32)
    turned2 = (second * cos2).to(work).to(tl.float32) + (first * sin2).to(work).to(tl.float32)
    tl.store(target, turned1.to(work).to(dtype), mask=inside)
    tl.store(target + R // 2, turned2.to(work).to(dtype), mask=inside)
    if R < D:
        tail = tl.arange(0, REST)
        kept = (head < heads)[:, None] & (tail < D - R)[None, :]
        rest = tl.load(x + head.to(tl.int64)[:, None] * stride_h + R + tail[None, :], mask=kept, other=0.0)
        tl.store(y + head[:, None] * D + R + tail[None, :], rest, mask=kept)


@triton.jit(do_not_specialize=["L"])
def rope_kernel(
    q, k, cos, sin, q_out, k_out, L, H, H_kv, qs_n, qs_h, qs_l, ks_n, ks_h, ks_l, cs_n, cs_l, sn_n, sn_l,
    D: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Program (token of all N * L, head group): the groups of q first, then those of k. Outputs [N, L, heads, D]."""
    token = tl.program_id(0)
    n = (token // L).to(tl.int64)
    t = (token % L).to(tl.int64)
    group = tl.program_id(1)
    cos += n * cs_n + t * cs_l
    sin += n * sn_n + t * sn_l
    q_groups = tl.cdiv(H, HEADS)
    if group < q_groups:
        rotate_heads(
            q + n * qs_n + t * qs_l, q_out + token.to(tl.int64) * H * D, cos, sin, group * HEADS, H, qs_h,
            D, R, HEADS, HALF, REST,
        )  # fmt: skip
    else:
        rotate_heads(
            k + n * ks_n + t * ks_l, k_out + token.to(tl.int64) * H_kv * D, cos, sin, (group - q_groups) * HEADS, H_kv,
            ks_h, D, R, HEADS, HALF, REST,
        )  # fmt: skip


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See kernels.rope.apply_rope."""
    N, H, L, D = q.shape
    H_kv, R = k.shape[1], cos.shape[2]
    q_out = torch.empty(N, L, H, D, dtype=q.dtype, device=q.device)
    k_out = torch.empty(N, L, H_kv, D, dtype=k.dtype, device=k.device)
    if N * L:
        half = triton.next_power_of_2(R // 2)
        # About 2048 pairs a program.
        heads = max(1, min(2048 // half, triton.next_power_of_2(H)))
        shared = (0, cos.stride(1)) if cos.shape[0] == 1 else cos.stride()[:2]
        shared_sin = (0, sin.stride(1)) if sin.shape[0] == 1 else sin.stride()[:2]
        rope_kernel[(N * L, triton.cdiv(H, heads) + triton.cdiv(H_kv, heads))](
            q, k, cos, sin, q_out, k_out, L, H, H_kv, *q.stride()[:3], *k.stride()[:3], *shared, *shared_sin,
            D=D, R=R, HEADS=heads, HALF=half, REST=triton.next_power_of_2(max(1, D - R)), num_warps=4,
        )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)
