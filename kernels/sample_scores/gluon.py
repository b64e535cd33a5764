# mypy: disable-error-code="no-untyped-def"
"""Hopper path of the sampled rows' scores, written in Gluon: D 64 or 128, blocks of 128.

A producer warp streams the keys through shared memory by TMA; four consumer warpgroups own 64 sampled rows each, so
that 16 KB of fp8 keys from L2 serve 256 rows. Rows of the heads that share the keys come before those of later tokens:
with four heads a KV head, the warpgroups of a tile see the same keys. What bounds the kernel is what comes after the
products, so that is kept short:
- fp8 products are summed in float16. Two values share a register, and one instruction takes the maxima of both; four
  warpgroups fit. Each row's queries are scaled by a power of two of their own, small enough that no product of them and
  any e4m3 keys leaves float16 (Cauchy-Schwarz).
- The four lanes that hold a row hold one group of keys each (PEAKS): a maximum exchanges nothing.
- A row's total is taken when its weights are read back, once, and not as they are written, by four lanes alike.

A product is issued and waited for at once: the other warpgroups' products keep the tensor cores busy meanwhile. (An
asynchronous one has Gluon take the float16 pairs apart before the wait, and ptxas then serialises every wgmma: C7514.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels import device
from kernels._common.fp8 import HeadScales
from kernels._common.hopper_gluon import advance, log2_approx
from kernels._common.scores import empty_scores
from kernels._common.sizes import ceil_div
from kernels._common.tma import tma_strides

BLOCK = 128
WARPGROUPS = 4
HALF = 64  # rows of a warpgroup
LOG2E = 1.4426950408889634
LARGEST_FP8 = 448.0
LARGEST_FP16 = 65504.0
# Triton 3.7 renamed it.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def tile_of(turn, tiles, lane_tiles, KV_HEADS: gl.constexpr):
    """This CTA's tile in a turn -> (whether there is one, prompt, KV head, the tile's first unit).

    A unit is what a warpgroup owns: 64 sampled rows of one head. Units of a KV head are counted by rows, then by heads.
    All tiles of a KV head come before the next one's, whose keys stay in L2 meanwhile, the longest first; turns
    alternate in direction."""
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    place = gl.where(turn % 2 == 0, place, programs - 1 - place)
    tile = turn * programs + place
    lane = tile // lane_tiles
    return tile < tiles, lane // KV_HEADS, lane % KV_HEADS, 4 * (lane_tiles - 1 - tile % lane_tiles)


@gluon.jit
def blocks_seen(unit, first_block, n_keys, GROUP: gl.constexpr, BLOCKS_PER_UNIT: gl.constexpr):
    """Key blocks that any row of a tile sees, from its first unit."""
    return gl.minimum(first_block + ((unit + 3) // GROUP + 1) * BLOCKS_PER_UNIT, n_keys)


@gluon.jit
def produce(
    k_desc, k_s, full, empty, tiles, lane_tiles, first_block, n_keys,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCKS_PER_UNIT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: the key blocks that any row of the tile sees, in order."""
    stage = 0
    phase = 1
    for turn in range(gl.cdiv(tiles, gl.num_programs(0))):
        there, n, kv_head, unit = tile_of(turn, tiles, lane_tiles, KV_HEADS)
        if there:
            for j in range(blocks_seen(unit, first_block, n_keys, GROUP, BLOCKS_PER_UNIT)):
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(full.index(stage), k_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(k_desc, [n, kv_head, j * 128, 0], full.index(stage), k_s.index(stage))
                stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def pair_max(a, b):
    """The larger of two float16 tensors' elements, two at a time."""
    return gl.inline_asm_elementwise("max.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def upper_and_lower(x, PAIRS: gl.constexpr):
    """[64, PAIRS, 4, 2] in columns -> both halves of the PAIRS: registers are renamed only."""
    return gl.split(x.reshape([64, 2, PAIRS // 2, 4, 2]).permute([0, 2, 3, 4, 1]))


@gluon.jit
def row_peaks(s):
    """[64, 128] scores -> float32 [64, 4]: the largest of each row and lane."""
    if s.dtype == gl.float16:
        a, b = upper_and_lower(s, 16)
        a, b = upper_and_lower(pair_max(a, b), 8)
        a, b = upper_and_lower(pair_max(a, b), 4)
        a, b = upper_and_lower(pair_max(a, b), 2)
        even, odd = gl.split(pair_max(a, b).reshape([64, 4, 2]))
        peaks = gl.maximum(even.to(gl.float32), odd.to(gl.float32))
    else:
        x = gl.max(s.reshape([64, 8, 2, 4, 2]), axis=1)
        peaks = gl.max(gl.max(x, axis=3), axis=1)
    return peaks


@gluon.jit
def weigh(
    q, k_s, full, empty, stage, phase, slot, factor, position, j,
    D: gl.constexpr, ROWS: gl.constexpr, S_LAYOUT: gl.constexpr, MASKED: gl.constexpr, FP8: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """slot[j, row] = log2 of the row's weight of key block j."""
    zero = gl.zeros([64, 128], gl.float16 if FP8 else gl.float32, S_LAYOUT)
    mbarrier.wait(full.index(stage), phase)
    key = k_s.index(stage).reshape([128, D]).permute((1, 0))
    s = warpgroup_mma(q, key, zero, use_acc=False)
    mbarrier.arrive(empty.index(stage))
    stage, phase = advance(stage, phase, STAGES)
    if MASKED:
        key_position = j * 128 + gl.arange(0, 128, gl.SliceLayout(0, S_LAYOUT))
        s = gl.where(key_position[None, :] <= position[:, None], s, -float("inf"))
    peaks = row_peaks(s)
    row_layout: gl.constexpr = gl.SliceLayout(1, peaks.type.layout)
    scaled = peaks * gl.convert_layout(factor, row_layout)[:, None]
    base = gl.max(scaled, axis=1)
    if MASKED:  # of a block of which the row sees nothing: any finite one does
        base = gl.where(base > -float("inf"), base, 0.0)
    weight = base + log2_approx(gl.sum(gl.exp2(scaled - base[:, None]), axis=1))
    gl.store(slot + j * ROWS + gl.arange(0, 64, row_layout), weight)
    return stage, phase


@gluon.jit
def store_shares(
    slot, out, exists_from, block0, first_block, rows, row_stride, n_keys, seen,
    ROWS: gl.constexpr, ROWS_PER_BLOCK: gl.constexpr,
):  # fmt: skip
    """out[i, j] = max over the rows r of query block i of 2^(slot[j, r] - log2 sum_j 2^slot[j, r]); -inf for j > i.

    exists_from: rows from this one on stand for no query."""
    CHUNK: gl.constexpr = 32
    BLOCKS: gl.constexpr = 64 // ROWS_PER_BLOCK
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    j_layout: gl.constexpr = gl.SliceLayout(1, layout)
    row_layout: gl.constexpr = gl.SliceLayout(0, layout)
    out_layout: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, 4], [0, 1])
    # What other threads of this warpgroup stored must be visible before it is read back.
    barrier()
    row = gl.arange(0, 64, row_layout)
    top = gl.full([CHUNK, 64], -float("inf"), gl.float32, layout)
    total = gl.zeros([CHUNK, 64], gl.float32, layout)
    for first in range(0, seen, CHUNK):
        j = first + gl.arange(0, CHUNK, j_layout)
        weight = gl.load(slot + j[:, None] * ROWS + row[None, :], mask=(j < seen)[:, None], other=-float("inf"))
        # Finite, so that a place that has seen nothing yet subtracts no infinity from another.
        new_top = gl.maximum(gl.maximum(top, weight), -3.0e38)
        total = total * gl.exp2(top - new_top) + gl.exp2(weight - new_top)
        top = new_top
    highest = gl.max(top, axis=0)
    total_log = highest + log2_approx(gl.sum(total * gl.exp2(top - highest[None, :]), axis=0))
    exists = row < exists_from
    for first in range(0, n_keys, CHUNK):
        j = first + gl.arange(0, CHUNK, j_layout)
        weight = gl.load(slot + j[:, None] * ROWS + row[None, :], mask=(j < seen)[:, None], other=-float("inf"))
        share = gl.where(exists[None, :], gl.exp2(weight - total_log[None, :]), 0.0)
        share = gl.max(share.reshape([CHUNK, BLOCKS, ROWS_PER_BLOCK]), axis=2)
        share = gl.convert_layout(share, out_layout)
        j_out = first + gl.arange(0, CHUNK, gl.SliceLayout(1, out_layout))
        block = block0 + gl.arange(0, BLOCKS, gl.SliceLayout(0, out_layout))
        share = gl.where(j_out[:, None] <= (first_block + block)[None, :], share, -float("inf"))
        place = block.to(gl.int64)[None, :] * row_stride + j_out[:, None]
        gl.store(out + place, share, mask=(block < rows)[None, :] & (j_out < n_keys)[:, None])
    # The slot is free for the next tile only when every thread has read it.
    barrier()


@gluon.jit
def consume(
    WARPGROUP: gl.constexpr, q_ptr, q_scale, k_scale, scores, scratch, q_s, k_s, full, empty,
    tiles, lane_tiles, first_block, rows, n_keys, row_stride, query_tokens, stride_n, stride_h, stride_t, log2_scale,
    D: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, EVERY: gl.constexpr, STAGES: gl.constexpr,
    FP8: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 sampled rows of every tile. LIMIT: the largest norm of a row of e4m3 queries."""
    ROWS: gl.constexpr = 256
    ROWS_PER_BLOCK: gl.constexpr = 128 // EVERY
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32 if FP8 else 16])
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    q_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    q_row: gl.constexpr = gl.SliceLayout(1, q_layout)
    slot = scratch + gl.program_id(0).to(gl.int64) * n_keys * ROWS + WARPGROUP * 64
    q_mine = q_s.index(WARPGROUP)
    stage = 0
    phase = 0
    for turn in range(gl.cdiv(tiles, gl.num_programs(0))):
        there, n, kv_head, first_unit = tile_of(turn, tiles, lane_tiles, KV_HEADS)
        if there:
            unit = first_unit + WARPGROUP
            head = kv_head * GROUP + unit % GROUP
            first_row = unit // GROUP * 64  # counted in sampled rows; past the last unit no row exists
            token0 = (first_row + gl.arange(0, 64, q_row)) * EVERY
            last_token = gl.minimum(token0 + EVERY, query_tokens) - 1
            source = q_ptr + n.to(gl.int64) * stride_n + head.to(gl.int64) * stride_h
            place = last_token.to(gl.int64)[:, None] * stride_t + gl.arange(0, D, gl.SliceLayout(0, q_layout))[None, :]
            query = gl.load(source + place, mask=(token0 < query_tokens)[:, None], other=0.0)
            if FP8:
                own_scale = gl.load(q_scale + head)
                values = query.to(gl.float32) / own_scale
                norm = gl.sqrt(gl.sum(values * values, axis=1))
                lift = gl.exp2(gl.ceil(log2_approx(gl.maximum(norm / LIMIT, 1.0))))
                values = values / lift[:, None]  # no larger than LIMIT: nothing to saturate
                q_mine.store(values.to(gl.float8e4nv))
                factor = gl.convert_layout(lift, s_row) * (own_scale * gl.load(k_scale + kv_head) * log2_scale)
            else:
                q_mine.store(query)
                factor = gl.full([64], 1.0, gl.float32, s_row) * log2_scale
            fence_async_shared()
            position = first_block * 128 + gl.convert_layout(last_token, s_row)
            seen = blocks_seen(first_unit, first_block, n_keys, GROUP, 64 // ROWS_PER_BLOCK)
            unmasked = first_block + first_unit // GROUP * (64 // ROWS_PER_BLOCK)
            for j in range(unmasked):
                stage, phase = weigh(
                    q_mine, k_s, full, empty, stage, phase, slot, factor, position, j,
                    D, ROWS, s_layout, False, FP8, STAGES,
                )  # fmt: skip
            for j in range(unmasked, seen):
                stage, phase = weigh(
                    q_mine, k_s, full, empty, stage, phase, slot, factor, position, j,
                    D, ROWS, s_layout, True, FP8, STAGES,
                )  # fmt: skip
            out = scores + (n * (KV_HEADS * GROUP) + head).to(gl.int64) * rows * row_stride
            store_shares(
                slot, out, gl.cdiv(query_tokens, EVERY) - first_row, first_row // ROWS_PER_BLOCK, first_block, rows,
                row_stride, n_keys, seen, ROWS, ROWS_PER_BLOCK,
            )  # fmt: skip


# Lengths change from call to call: specialising on them would only compile the kernel again.
@gluon.jit(do_not_specialize=["tiles", "lane_tiles", "first_block", "rows", "n_keys", "query_tokens"])
def sample_scores_hopper(
    q_ptr, k_desc, q_scale, k_scale, scores, scratch, tiles, lane_tiles, first_block, rows, n_keys, row_stride,
    query_tokens, stride_n, stride_h, stride_t, log2_scale,
    D: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, EVERY: gl.constexpr, STAGES: gl.constexpr,
    FP8: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """scratch: float32 [programs, n_keys, 256]."""
    q_layout: gl.constexpr = gl.NVMMASharedLayout(D if FP8 else 128, element_bitwidth=8 if FP8 else 16, rank=2)
    q_s = gl.allocate_shared_memory(k_desc.dtype, [4, 64, D], q_layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, 128, D], k_desc.layout)
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=4)
    fence_async_shared()
    gl.warp_specialize([
        (consume, (0, q_ptr, q_scale, k_scale, scores, scratch, q_s, k_s, full, empty,
                   tiles, lane_tiles, first_block, rows, n_keys, row_stride, query_tokens, stride_n, stride_h, stride_t,
                   log2_scale, D, KV_HEADS, GROUP, EVERY, STAGES, FP8, LIMIT)),
        (consume, (1, q_ptr, q_scale, k_scale, scores, scratch, q_s, k_s, full, empty,
                   tiles, lane_tiles, first_block, rows, n_keys, row_stride, query_tokens, stride_n, stride_h, stride_t,
                   log2_scale, D, KV_HEADS, GROUP, EVERY, STAGES, FP8, LIMIT)),
        (consume, (2, q_ptr, q_scale, k_scale, scores, scratch, q_s, k_s, full, empty,
                   tiles, lane_tiles, first_block, rows, n_keys, row_stride, query_tokens, stride_n, stride_h, stride_t,
                   log2_scale, D, KV_HEADS, GROUP, EVERY, STAGES, FP8, LIMIT)),
        (consume, (3, q_ptr, q_scale, k_scale, scores, scratch, q_s, k_s, full, empty,
                   tiles, lane_tiles, first_block, rows, n_keys, row_stride, query_tokens, stride_n, stride_h, stride_t,
                   log2_scale, D, KV_HEADS, GROUP, EVERY, STAGES, FP8, LIMIT)),
        (produce, (k_desc, k_s, full, empty, tiles, lane_tiles, first_block, n_keys,
                   KV_HEADS, GROUP, 64 // (128 // EVERY), STAGES)),
    ], [4, 4, 4, 1], [112, 112, 112, 24])  # fmt: skip


def sample_scores(
    q: Tensor, k: Tensor, query_start: int, block_size: int, every: int, scale: float, scales: HeadScales | None
) -> Tensor:
    """See kernels.sample_scores.sample_scores, which has checked shapes, types, strides and the device."""
    N, H, query_tokens, D = q.shape
    kv_heads, fp8 = k.shape[1], scales is not None
    known = query_start + query_tokens
    n_rows, n_keys = ceil_div(query_tokens, BLOCK), ceil_div(known, BLOCK)
    units = H // kv_heads * ceil_div(n_rows * (BLOCK // every), HALF)
    lane_tiles = ceil_div(units, WARPGROUPS)
    tiles = lane_tiles * kv_heads * N
    programs = min(tiles, device.multiprocessors(q.device))
    scores = empty_scores(N, H, n_rows, n_keys, q.device)
    scratch = torch.empty(programs, n_keys, WARPGROUPS * HALF, dtype=torch.float32, device=q.device)
    k = k[:, :, :known]
    bits = 8 * k.element_size()
    layout = gl.NVMMASharedLayout(min(128, D * bits // 8), element_bitwidth=bits, rank=4)
    sample_scores_hopper[(programs,)](
        q,
        TensorDescriptor(k, list(k.shape), tma_strides(k), [1, 1, BLOCK, D], layout),
        scores if scales is None else scales.q,
        scores if scales is None else scales.k,
        scores,
        scratch,
        tiles,
        lane_tiles,
        query_start // BLOCK,
        n_rows,
        n_keys,
        scores.stride(2),
        query_tokens,
        *q.stride()[:3],
        scale * LOG2E,
        D=D,
        KV_HEADS=kv_heads,
        GROUP=H // kv_heads,
        EVERY=every,
        STAGES=6 if fp8 else 3,
        FP8=fp8,
        LIMIT=LARGEST_FP16 / (LARGEST_FP8 * math.sqrt(D)),
        num_warps=4,
    )
    return scores
