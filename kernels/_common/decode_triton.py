# mypy: disable-error-code="no-untyped-def"
"""What the decode kernels share: how many shares a document is cut into, and the merging of what the shares give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import device as kernels_device
from kernels._common import attention
from kernels._common.prefixes import Prefixes
from kernels._common.sizes import ceil_div, power_of_2

# A share of fewer keys would spend its time on starting up.
MIN_SHARE = 256
PROGRAMS_PER_MULTIPROCESSOR = 2
NO_WINDOW = 2**31 - 1
LOG2E = tl.constexpr(attention.LOG2E)


@triton.jit
def merge_kernel(
    partial, partial_lse, sinks, prefix_lengths, out, out_stride_s, out_stride_h,
    D: tl.constexpr, SHARES: tl.constexpr, PREFIX_SHARES: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Program (head, document): the shares' outputs weighted by their parts of the softmax; zeros if there are none.

    sinks: a natural logit for each head, one more part of the softmax whose output is zero. prefix_lengths: of the
    documents; the first PREFIX_SHARES shares were written for those alone that have a prefix. None leaves no trace in
    the compiled code.
    """
    head = tl.program_id(0)
    s = tl.program_id(1).to(tl.int64)
    share = tl.arange(0, triton.next_power_of_2(SHARES))
    d = tl.arange(0, triton.next_power_of_2(D))
    place = (s * tl.num_programs(0) + head) * SHARES + share
    written = share < SHARES
    if prefix_lengths is not None:
        has_prefix = tl.load(prefix_lengths + s) > 0
        written = written & (has_prefix | (share >= PREFIX_SHARES))
    lse = tl.load(partial_lse + place, mask=written, other=float("-inf"))
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
        written = share < SHARES
        if prefix_lengths is not None:
            written = written & (has_prefix | (share >= PREFIX_SHARES))
        lse = tl.load(partial_lse + place, mask=written, other=float("-inf"))
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


@triton.jit
def group_rows(
    members, prefix_starts, prefix_lengths, lengths, rows, first, window,
    MEMBERS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Queries [first, first + BM) of a group, its rows' heads behind one another: of each the row, the head in its KV
    head's group and the keys [begin, end) of the prefix that it sees (none where there is no query); and where the
    prefix starts.

    members: the group's rows. rows: of the batch.
    """
    m = first + tl.arange(0, BM)
    member = m // GROUP
    row = tl.load(members + member, mask=member < MEMBERS, other=-1)
    real = (row >= 0) & (row < rows)
    end = tl.load(prefix_lengths + row, mask=real, other=0)
    begin = tl.maximum(end + tl.load(lengths + row, mask=real, other=0) - window, 0)
    start = tl.max(tl.where(end > 0, tl.load(prefix_starts + row, mask=real, other=0), 0), axis=0)
    return row.to(tl.int64), m % GROUP, begin, end, start


@triton.jit
def group_share(begin, end, window, share, SHARES: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr):
    """The keys [first, last) of a share of a prefix, and `clear`: whole steps up to there are seen by every query.

    A prefix is cut by its own length, whatever stands behind it, and whole steps that no window reaches are left out.
    begin, end: what each query sees. All three are multiples of ALIGN, but for `last`.
    """
    longest = tl.max(end, axis=0)
    # The first key that anybody could see: rows may see stretches of different lengths (drafts).
    shortest = tl.min(tl.where(end > 0, end, longest), axis=0)
    origin = tl.maximum(shortest - window, 0) // ALIGN * ALIGN
    per_share = tl.cdiv(tl.cdiv(longest - origin, SHARES), BN) * BN
    first = origin + share * per_share
    last = tl.minimum(first + per_share, longest)
    seen = tl.min(tl.where(end > 0, begin, longest), axis=0)
    first += tl.maximum(seen - first, 0) // BN * BN
    all_begun = tl.max(tl.where(end > 0, begin, 0), axis=0)
    clear = first + tl.where(all_begun > first, 0, tl.maximum(tl.minimum(shortest, last) - first, 0) // BN * BN)
    return first, clear, last


@dataclass(frozen=True)
class GroupTiles:
    """How the queries of a group of rows are cut: `count` tiles of BM queries of one KV head, and shares of the prefix.

    Not by the rows that are there, but by those that a group can have.
    """

    BM: int
    count: int
    shares: int


def group_tiles(q: Tensor, kv_heads: int, prefixes: Prefixes, window: int | None, align: int) -> GroupTiles:
    """For queries q [S, H, D]."""
    queries = prefixes.members.shape[1] * (q.shape[1] // kv_heads)
    # A tile's accumulator is held in registers, and float32's products in three parts each.
    most = 128 if power_of_2(q.shape[2]) <= 128 else 32 if q.element_size() < 4 else 16
    height = min(most, max(16, power_of_2(queries)))
    count = ceil_div(queries, height)
    longest = prefixes.max_length if window is None else min(prefixes.max_length, window + align - 1)
    return GroupTiles(height, count, count_shares(kv_heads * count, longest, q.device))


def allocate_shares(q: Tensor, kv_heads: int, longest: int, before: int = 0) -> tuple[Tensor, Tensor]:
    """What the shares of q [S, H, D] give: outputs float32 [S, H, shares, D], base-2 log-sum-exps [S, H, shares].

    before: shares of prefixes, which come first.
    """
    S, H, D = q.shape
    shares = before + count_shares(kv_heads, longest, q.device)
    return (
        torch.empty(S, H, shares, D, dtype=torch.float32, device=q.device),
        torch.empty(S, H, shares, dtype=torch.float32, device=q.device),
    )


def merge(
    partial: Tensor,
    partial_lse: Tensor,
    dtype: torch.dtype,
    sinks: Tensor | None = None,
    prefixes: Prefixes | None = None,
    prefix_shares: int = 0,
) -> Tensor:
    """[S, H, D] in `dtype` from what the shares gave (`allocate_shares`) and the heads' sinks [H]."""
    S, H, shares, D = partial.shape
    out = torch.empty(S, H, D, dtype=dtype, device=partial.device)
    part = min(power_of_2(shares), 8192 // power_of_2(D))
    merge_kernel[(H, S)](
        partial, partial_lse, sinks, None if prefixes is None else prefixes.lengths, out, *out.stride()[:2],
        D=D, SHARES=shares, PREFIX_SHARES=prefix_shares, PART=part, num_warps=4 if D <= 256 else 8,
    )  # fmt: skip
    return out
