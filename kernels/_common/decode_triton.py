# mypy: disable-error-code="no-untyped-def"
"""What the decode kernels share: how many shares a document is cut into, and the merging of what the shares give."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import device as kernels_device
from kernels._common import attention
from kernels._common.sizes import ceil_div, power_of_2

# A share of fewer keys would spend its time on starting up.
MIN_SHARE = 256
PROGRAMS_PER_MULTIPROCESSOR = 2
NO_WINDOW = 2**31 - 1
LOG2E = tl.constexpr(attention.LOG2E)


@triton.jit
def merge_kernel(
    partial, partial_lse, sinks, out, out_stride_s, out_stride_h,
    D: tl.constexpr, SHARES: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Program (head, document): the shares' outputs weighted by their parts of the softmax; zeros if there are none.

    sinks: a natural logit for each head, one more part of the softmax whose output is zero; None leaves no trace in the
    compiled code.
    """
    head = tl.program_id(0)
    s = tl.program_id(1).to(tl.int64)
    share = tl.arange(0, triton.next_power_of_2(SHARES))
    d = tl.arange(0, triton.next_power_of_2(D))
    place = (s * tl.num_programs(0) + head) * SHARES + share
    lse = tl.load(partial_lse + place, mask=share < SHARES, other=float("-inf"))
    top = tl.max(lse, axis=0)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    total = tl.sum(tl.where(lse > float("-inf"), tl.exp2(lse - top), 0.0), axis=0)
    if sinks is not None:
        total += tl.where(sink > float("-inf"), tl.exp2(sink - top), 0.0)
    result = tl.zeros((triton.next_power_of_2(D),), tl.float32)
    # PART shares at a time: all of them would not fit the registers where one KV head fills the GPU.
    for first in tl.static_range(0, SHARES, PART):
        share = first + tl.arange(0, PART)
        place = (s * tl.num_programs(0) + head) * SHARES + share
        lse = tl.load(partial_lse + place, mask=share < SHARES, other=float("-inf"))
        used = lse > float("-inf")
        weight = tl.where(used, tl.exp2(lse - top), 0.0)
        parts = tl.load(partial + place[:, None] * D + d[None, :], mask=used[:, None] & (d < D)[None, :], other=0.0)
        result += tl.sum(parts * weight[:, None], axis=0)
    result /= tl.where(total > 0.0, total, 1.0)
    target = out + s * out_stride_s + head * out_stride_h + d
    tl.store(target, result.to(out.dtype.element_ty), mask=d < D)


def count_shares(kv_heads: int, longest: int, device: torch.device) -> int:
    """Programs for one KV head of one document: enough that a document alone fills the GPU."""
    fill = ceil_div(PROGRAMS_PER_MULTIPROCESSOR * kernels_device.multiprocessors(device), kv_heads)
    return max(1, min(fill, ceil_div(longest, MIN_SHARE)))


def allocate_shares(q: Tensor, kv_heads: int, longest: int) -> tuple[Tensor, Tensor]:
    """What the shares of q [S, H, D] give: outputs float32 [S, H, shares, D], base-2 log-sum-exps [S, H, shares]."""
    S, H, D = q.shape
    shares = count_shares(kv_heads, longest, q.device)
    return (
        torch.empty(S, H, shares, D, dtype=torch.float32, device=q.device),
        torch.empty(S, H, shares, dtype=torch.float32, device=q.device),
    )


def merge(partial: Tensor, partial_lse: Tensor, dtype: torch.dtype, sinks: Tensor | None = None) -> Tensor:
    """[S, H, D] in `dtype` from what the shares gave (`allocate_shares`) and the heads' sinks [H]."""
    S, H, shares, D = partial.shape
    out = torch.empty(S, H, D, dtype=dtype, device=partial.device)
    part = min(power_of_2(shares), 8192 // power_of_2(D))
    merge_kernel[(H, S)](
        partial, partial_lse, sinks, out, *out.stride()[:2], D=D, SHARES=shares, PART=part, num_warps=4,
    )  # fmt: skip
    return out
