# mypy: disable-error-code="no-untyped-def"
"""Hopper path of fp8 decode attention behind shared prefixes, written in Gluon: D 64 or 128, queries in bfloat16.

A program takes one share of every prefix, for one KV head and up to 128 queries of the rows behind it: a warp streams
blocks of 128 keys and values through a ring by TMA, and each of one or two warpgroups multiplies them with 64 queries.
Both products run on the fp8 tensor cores, so that nothing is widened and stored again:

- a bfloat16 query is the sum of two e4m3 numbers, exactly (8 bits of significand: 4 and 4), and so are scores: Q K^T
  is summed over both parts, with the same keys;
- a probability is split into two as well, which leaves it an error of 2^-9, that of bfloat16.

Hopper's fp8 tensor cores keep about 14 bits of a sum (kernels.block_sparse_attention_fp8.gluon): P V of a block starts
at zero and is added in float32. P is scaled by the block's own maximum, not by that of all blocks so far, so that keys
whose weight is small beside a distant large one do not vanish below e4m3's smallest number.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels import device
from kernels._common.attention import LOG2E
from kernels._common.decode_triton import MIN_SHARE, GroupTiles, merge
from kernels._common.fp8 import HeadScales
from kernels._common.hopper_fp8_gluon import halves, weights_operand
from kernels._common.hopper_gluon import advance, log2_approx, row_max
from kernels._common.prefixes import Prefixes
from kernels._common.sizes import ceil_div, power_of_2
from kernels._common.tma import tma_strides
from kernels.decode_attention_fp8.triton import attend_to_own_keys

WARPGROUP_QUERIES = 64
BLOCK = 128  # keys of a step
WEIGHT_BITS = gl.constexpr(8.0)  # P times 2^8: e4m3 then covers 2^-17 .. 1 of the block's largest
FLOOR = gl.constexpr(-1e30)  # stands for the maximum of no scores: finite, so that differences are


@gluon.jit
def prefix_of(
    line, prefix_starts, prefix_lengths, rows, share, SHARES: gl.constexpr, MEMBERS: gl.constexpr, SIZE: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Of a group of rows, by its line of the members' table: where its prefix starts, how many keys every row and any
    row sees, and the keys [first, last) of a share. SIZE: MEMBERS rounded up to a power of two, at least 32."""
    i = gl.arange(0, SIZE, gl.BlockedLayout([SIZE // 32], [32], [WARPS], [0]))
    row = gl.load(line + i, mask=i < MEMBERS, other=-1)
    real = (row >= 0) & (row < rows)
    end = gl.load(prefix_lengths + row, mask=real, other=0)
    longest = gl.max(end, axis=0)
    shortest = gl.min(gl.where(end > 0, end, longest), axis=0)
    start = gl.max(gl.where(end > 0, gl.load(prefix_starts + row, mask=real, other=0), 0), axis=0)
    per_share = gl.cdiv(gl.cdiv(longest, SHARES), 128) * 128
    first = share * per_share
    return start.to(gl.int32), shortest, longest, first, gl.minimum(first + per_share, longest)


@gluon.jit
def produce(
    k_desc, v_desc, members, prefix_starts, prefix_lengths, k_s, v_s, full, empty, rows, groups, members_stride,
    SHARES: gl.constexpr, MEMBERS: gl.constexpr, SIZE: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: the blocks of this program's share of every prefix, keys and values in one stage."""
    share = gl.program_id(0) // TILES
    kv_head = gl.program_id(1)
    stage = 0
    phase = 1
    group = 0
    while gl.load(members, mask=group < groups, other=-1) >= 0:
        start, _, _, first, last = prefix_of(
            members, prefix_starts, prefix_lengths, rows, share, SHARES, MEMBERS, SIZE, 1
        )
        for at in range(first, last, 128):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [kv_head, start + at, 0], full.index(stage), k_s.index(stage))
            tma.async_copy_global_to_shared(v_desc, [kv_head, 0, start + at], full.index(stage), v_s.index(stage))
            stage, phase = advance(stage, phase, STAGES)
        group += 1
        members += members_stride


@gluon.jit
def split_queries(
    q, line, rows, first_query, kv_head, hi_s, lo_s, q_stride_s, q_stride_h,
    MEMBERS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, ROW_LAYOUT: gl.constexpr,
):  # fmt: skip
    """64 queries as sums of two e4m3 numbers in shared memory, and by which power of two, [64], they are too large."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [512 // D, D // 16], [4, 1], [1, 0])
    query = first_query + gl.arange(0, 64, gl.SliceLayout(1, layout))
    member = query // GROUP
    row = gl.load(line + member, mask=member < MEMBERS, other=-1)
    place = row.to(gl.int64) * q_stride_s + (kv_head * GROUP + query % GROUP) * q_stride_h
    d = gl.arange(0, D, gl.SliceLayout(0, layout))
    x = gl.load(q + place[:, None] + d[None, :], mask=((row >= 0) & (row < rows))[:, None], other=0.0).to(gl.float32)
    largest = gl.maximum(gl.max(gl.abs(x), axis=1), 1e-30)
    # The largest comes to lie in [128, 256).
    unit = (largest.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True) * 0.0078125
    x = x * (1.0 / unit)[:, None]
    hi = x.to(gl.float8e4nv)
    hi_s.store(hi)
    lo_s.store((x - hi.to(gl.float32)).to(gl.float8e4nv))
    fence_async_shared()
    return gl.convert_layout(unit, ROW_LAYOUT)


@gluon.jit
def pack_split(p):
    """Half of P, float32 in accumulator layout -> what `pack_fp8` of block-sparse attention makes of it, and the same
    of what rounding left over."""
    GROUPS: gl.constexpr = p.shape[1] // 16
    even, odd = gl.split(p.reshape([64, GROUPS, 2, 4, 2]).permute([0, 1, 3, 2, 4]))
    p0, p8 = gl.split(even)
    p1, p9 = gl.split(odd)
    return gl.inline_asm_elementwise(
        "{ .reg .b16 lo, hi; .reg .b32 x, y; "
        "cvt.rn.satfinite.e4m3x2.f32 lo, $3, $2; cvt.rn.satfinite.e4m3x2.f32 hi, $5, $4; mov.b32 $0, {lo, hi}; "
        "cvt.rn.f16x2.f32 x, $3, $2; cvt.rn.f16x2.e4m3x2 y, lo; sub.rn.f16x2 x, x, y; "
        "cvt.rn.satfinite.e4m3x2.f16x2 lo, x; "
        "cvt.rn.f16x2.f32 x, $5, $4; cvt.rn.f16x2.e4m3x2 y, hi; sub.rn.f16x2 x, x, y; "
        "cvt.rn.satfinite.e4m3x2.f16x2 hi, x; mov.b32 $1, {lo, hi}; }",
        "=r,=r,r,r,r,r",
        [p0, p1, p8, p9],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def row_sum(p, LAYOUT: gl.constexpr):
    """As row_max."""
    x = gl.sum(p.reshape([64, 8, 2, 4, 2]), axis=1)
    x = gl.sum(x, axis=3)
    x = gl.sum(x, axis=1)
    return gl.convert_layout(gl.sum(x, axis=1), LAYOUT)


@gluon.jit
def clear_behind(value, columns, D: gl.constexpr):
    """Zero the columns of V^T [D, 128] from `columns` on: nobody wrote there, so they may be NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    column = gl.arange(0, 128, gl.SliceLayout(0, layout))
    bits = value.load(layout).to(gl.int8, bitcast=True)
    bits = gl.where((column < columns)[None, :], bits, gl.zeros_like(bits))
    value.store(bits.to(gl.float8e4nv, bitcast=True))
    fence_async_shared()


@gluon.jit
def consume(
    WARPGROUP: gl.constexpr, q, k_scale, v_scale, members, prefix_starts, prefix_lengths, partial, partial_lse,
    q_s, k_s, v_s, full, empty, scale_log2, rows, groups, q_stride_s, q_stride_h, members_stride,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, SHARES: gl.constexpr, STRIDE: gl.constexpr,
    MEMBERS: gl.constexpr, SIZE: gl.constexpr, TILES: gl.constexpr, WARPGROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 queries of every group."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    out_layout: gl.constexpr = gl.SliceLayout(1, o_layout)
    share = gl.program_id(0) // TILES
    kv_head = gl.program_id(1)
    first_query = (gl.program_id(0) % TILES * WARPGROUPS + WARPGROUP) * 64
    query = first_query + gl.arange(0, 64, row_layout)
    head = kv_head * GROUP + query % GROUP
    hi_s = q_s.index(2 * WARPGROUP)
    lo_s = q_s.index(2 * WARPGROUP + 1)
    column = gl.arange(0, 128, gl.SliceLayout(0, s_layout))
    stage = 0
    phase = 0
    group = 0
    while gl.load(members, mask=group < groups, other=-1) >= 0:
        _, shortest, longest, first, last = prefix_of(
            members, prefix_starts, prefix_lengths, rows, share, SHARES, MEMBERS, SIZE, 4
        )
        row = gl.load(members + query // GROUP, mask=query // GROUP < MEMBERS, other=-1)
        end = gl.load(prefix_lengths + row, mask=(row >= 0) & (row < rows), other=0)
        place = (row.to(gl.int64) * (KV_HEADS * GROUP) + head) * STRIDE + share
        if first >= last:
            gl.store(partial_lse + place, gl.full([64], -float("inf"), gl.float32, row_layout), mask=end > 0)
        else:
            unit = split_queries(
                q, members, rows, first_query, kv_head, hi_s, lo_s, q_stride_s, q_stride_h,
                MEMBERS, GROUP, D, row_layout,
            )  # fmt: skip
            factor = unit * (gl.load(k_scale + kv_head) * scale_log2)
            m = gl.full([64], FLOOR, gl.float32, row_layout)
            total = gl.zeros([64], gl.float32, row_layout)
            o = gl.zeros([64, D], gl.float32, o_layout)
            for at in range(first, last, 128):
                mbarrier.wait(full.index(stage), phase)
                key = k_s.index(stage).reshape([128, D]).permute((1, 0))
                # The small parts first, while the sum is small: it loses less of them.
                s = warpgroup_mma(lo_s, key, gl.zeros([64, 128], gl.float32, s_layout), use_acc=False, is_async=True)
                s = warpgroup_mma(hi_s, key, s, is_async=True)
                s = warpgroup_mma_wait(0, deps=[s])
                if at + 128 > shortest:
                    s = gl.where((at + column)[None, :] < end[:, None], s, -float("inf"))
                top = gl.maximum(row_max(s, row_layout) * factor, FLOOR)
                m_next = gl.maximum(m, top)
                p = gl.exp2(s * factor[:, None] - (top - WEIGHT_BITS)[:, None])
                gain = gl.exp2(top - m_next)
                shrink = gl.exp2(m - m_next)
                m = m_next
                total = total * shrink + row_sum(p, row_layout) * gain
                p_a, p_b = halves(p)
                hi_a, lo_a = pack_split(p_a)
                hi_b, lo_b = pack_split(p_b)
                value = v_s.index(stage).reshape([D, 128])
                if at + 128 > longest:
                    clear_behind(value, (longest + 15) // 16 * 16 - at, D)
                value = value.permute((1, 0))
                zero = gl.zeros([64, D], gl.float32, o_layout)
                more = warpgroup_mma(weights_operand(lo_a, lo_b, o_layout), value, zero, use_acc=False, is_async=True)
                more = warpgroup_mma(weights_operand(hi_a, hi_b, o_layout), value, more, is_async=True)
                more = warpgroup_mma_wait(0, deps=[more])
                mbarrier.arrive(empty.index(stage))
                stage, phase = advance(stage, phase, STAGES)
                shrink_rows = gl.convert_layout(shrink, out_layout)[:, None].broadcast_to([64, D])
                o = gl.fma(o, shrink_rows, more * gl.convert_layout(gain, out_layout)[:, None])
            inverse = gl.load(v_scale + kv_head) / gl.where(total > 0.0, total, 1.0)
            o = o * gl.convert_layout(inverse, out_layout)[:, None]
            d = gl.arange(0, D, gl.SliceLayout(0, o_layout))
            target = partial + gl.convert_layout(place, out_layout)[:, None] * D + d[None, :]
            gl.store(target, o, mask=(gl.convert_layout(end, out_layout) > 0)[:, None])
            gl.store(partial_lse + place, m - WEIGHT_BITS + log2_approx(total), mask=end > 0)
        group += 1
        members += members_stride


@gluon.jit(do_not_specialize=["rows", "groups"])
def group_kernel(
    k_desc, v_desc, q, k_scale, v_scale, members, prefix_starts, prefix_lengths, partial, partial_lse, scale_log2,
    rows, groups, q_stride_s, q_stride_h, members_stride,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, SHARES: gl.constexpr, STRIDE: gl.constexpr,
    MEMBERS: gl.constexpr, SIZE: gl.constexpr, TILES: gl.constexpr, WARPGROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Program (tile of a share, KV head), every group of rows: as group_kernel in Triton."""
    q_layout: gl.constexpr = gl.NVMMASharedLayout(D, element_bitwidth=8, rank=2)
    q_s = gl.allocate_shared_memory(gl.float8e4nv, [2 * WARPGROUPS, 64, D], q_layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)  # noqa: RUF005
    v_s = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)  # noqa: RUF005
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=WARPGROUPS)
    fence_async_shared()
    if WARPGROUPS == 2:
        gl.warp_specialize([
            (consume, (0, q, k_scale, v_scale, members, prefix_starts, prefix_lengths, partial, partial_lse,
                       q_s, k_s, v_s, full, empty, scale_log2, rows, groups, q_stride_s, q_stride_h, members_stride,
                       KV_HEADS, GROUP, D, SHARES, STRIDE, MEMBERS, SIZE, TILES, WARPGROUPS, STAGES)),
            (consume, (1, q, k_scale, v_scale, members, prefix_starts, prefix_lengths, partial, partial_lse,
                       q_s, k_s, v_s, full, empty, scale_log2, rows, groups, q_stride_s, q_stride_h, members_stride,
                       KV_HEADS, GROUP, D, SHARES, STRIDE, MEMBERS, SIZE, TILES, WARPGROUPS, STAGES)),
            (produce, (k_desc, v_desc, members, prefix_starts, prefix_lengths, k_s, v_s, full, empty, rows, groups,
                       members_stride, SHARES, MEMBERS, SIZE, TILES, STAGES)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (0, q, k_scale, v_scale, members, prefix_starts, prefix_lengths, partial, partial_lse,
                       q_s, k_s, v_s, full, empty, scale_log2, rows, groups, q_stride_s, q_stride_h, members_stride,
                       KV_HEADS, GROUP, D, SHARES, STRIDE, MEMBERS, SIZE, TILES, WARPGROUPS, STAGES)),
            (produce, (k_desc, v_desc, members, prefix_starts, prefix_lengths, k_s, v_s, full, empty, rows, groups,
                       members_stride, SHARES, MEMBERS, SIZE, TILES, STAGES)),
        ], [1], [24])  # fmt: skip


def _group_tiles(q: Tensor, kv_heads: int, prefixes: Prefixes) -> GroupTiles:
    """For queries q [S, H, D]: one program a multiprocessor, or two of one warpgroup."""
    queries = prefixes.members.shape[1] * (q.shape[1] // kv_heads)
    height = WARPGROUP_QUERIES if queries <= WARPGROUP_QUERIES else 2 * WARPGROUP_QUERIES
    count = ceil_div(queries, height)
    fill = device.multiprocessors(q.device) * (2 * WARPGROUP_QUERIES // height) // (kv_heads * count)
    return GroupTiles(height, count, max(1, min(fill, ceil_div(prefixes.max_length, MIN_SHARE))))


def _descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(columns, element_bitwidth=8, rank=3)
    return TensorDescriptor(tensor, list(tensor.shape), tma_strides(tensor), [1, rows, columns], layout)


def _attend_to_prefixes(
    q: Tensor,
    k: Tensor,
    vt: Tensor,
    scales: HeadScales,
    prefixes: Prefixes,
    tiles: GroupTiles,
    partial: Tensor,
    partial_lse: Tensor,
    scale: float,
) -> None:
    """The first shares of `partial`."""
    S, H, D = q.shape
    kv_heads = k.shape[0]
    members = prefixes.members
    warpgroups = tiles.BM // WARPGROUP_QUERIES
    # Of one warpgroup, two programs fit a multiprocessor.
    room: dict[str, int] = {"STAGES": 4} if warpgroups == 2 else {"STAGES": 3, "maxnreg": 128}
    group_kernel[(tiles.shares * tiles.count, kv_heads)](
        _descriptor(k, BLOCK, D), _descriptor(vt, D, BLOCK), q, scales.k, scales.v, members, prefixes.starts,
        prefixes.lengths, partial, partial_lse, scale * LOG2E, S, members.shape[0],
        *q.stride()[:2], members.stride(0),
        KV_HEADS=kv_heads, GROUP=H // kv_heads, D=D, SHARES=tiles.shares, STRIDE=partial.shape[2],
        MEMBERS=members.shape[1], SIZE=max(32, power_of_2(members.shape[1])), TILES=tiles.count,
        WARPGROUPS=warpgroups, num_warps=4, **room,
    )  # fmt: skip


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
    """See kernels.decode_attention_fp8, which has checked that there are prefixes and no window. The rows' own keys,
    few of them, are read by the Triton kernel."""
    assert prefixes is not None
    tiles = _group_tiles(q, k.shape[0], prefixes)
    partial, partial_lse = attend_to_own_keys(
        q, k, vt, scales, starts, lengths, max_length, scale, window, tiles.shares
    )
    _attend_to_prefixes(q, k, vt, scales, prefixes, tiles, partial, partial_lse, scale)
    return merge(partial, partial_lse, q.dtype, sinks, prefixes, tiles.shares)
