"""Hopper path of block-sparse attention, written in Gluon: bfloat16 and float16, D 64 or 128, blocks of 128.

Structure: a producer warp streams K and V blocks through shared memory by TMA; two consumer warpgroups own 64
query rows each. A step issues S' = Q K'^T for the next block, then O += P V for the last one, and does the softmax
of S' while P V is in flight. Both share a stage of the ring, (K', V), with one full and one empty barrier: separate
rings for K and V cost 4% of the dense case. P stays in registers. The diagonal block goes first, so only a tile's
prologue masks, and the running maximum is finite from the start. Rescaling O is skipped in warps where no row maximum
grew (exact).

What the compilers do to such code, and cost time to find out:
- ptxas moves a wgmma wait up over independent arithmetic within a basic block (`deps=` and volatile asm do not stop
  it). Only a real branch does, such as the spin loop of an mbarrier wait: see the order in the main loop.
- Accumulators in flight across a loop edge, or the step unrolled twice: ptxas serialises every wgmma and says so
  only in `-v` text (C7512). The compile test reads it.
- Gluon finds loop-carried variables by comparing handles: `a = b = x` before a loop with `a = b; b = new` inside
  drops `a` without a warning.
- `mbarrier.arrive` is bar.sync plus one thread: few arrivals a step.
- Taking turns (ping-pong) with named barriers gains nothing: the warpgroups fall out of step by themselves.
"""

from __future__ import annotations

import torch
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
from kernels._common.hopper import (
    advance,
    count_turns,
    growth_declare,
    growth_note,
    growth_seen,
    log2_approx,
    opaque,
    row_max,
    row_sum_partial,
    tile_of,
)
from kernels._common.selection import BlockSelection
from kernels._common.tma import tma_strides

BLOCK = 128  # rows of a query block and of a key block
HALF = 64  # query rows of one consumer warpgroup
LOG2E = 1.4426950408889634


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, indices, counts, order, q_s, k_s, v_s,
    q_full, q_empty, full, empty, rows, lanes, row0, max_blocks,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, DENSE: gl.constexpr,
    ORDERED: gl.constexpr,
):  # fmt: skip
    """One warp: per tile the two halves of Q, then count + 1 steps: K of block j (j < count), V of block j - 1. The
    diagonal block goes first."""
    TILE: gl.constexpr = k_desc.block_type.nbytes  # of V too
    stage = 0
    phase = 1
    q_phase = 1
    for turn in range(count_turns(rows, lanes, GROUP)):
        there, n, head, kv_head, row = tile_of(turn, order, rows, lanes, KV_HEADS, GROUP, ORDERED)
        if there:
            if DENSE:
                count = row0 + row + 1
                kept = indices
            else:
                flat_row = (n * (KV_HEADS * GROUP) + head) * rows + row
                count = gl.load(counts + flat_row)
                kept = indices + flat_row.to(gl.int64) * max_blocks
            for half in gl.static_range(2):
                mbarrier.wait(q_empty.index(half), q_phase)
                mbarrier.expect(q_full.index(half), q_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    q_desc, [n, head, row * 128 + half * 64, 0], q_full.index(half), q_s.index(half)
                )
            q_phase ^= 1
            # block and block1 are blocks j and j - 1; they start as different values: Triton finds what a loop carries
            # by comparing handles.
            block = row0 + row
            block1 = block + 0
            for j in range(count + 1):
                following = j if DENSE else gl.load(kept + j, mask=j < count, other=0)
                mbarrier.wait(empty.index(stage), phase)
                if (j == 0) | (j == count):
                    mbarrier.expect(full.index(stage), TILE)
                else:
                    mbarrier.expect(full.index(stage), 2 * TILE)
                if j < count:
                    tma.async_copy_global_to_shared(
                        k_desc, [n, kv_head, block * 128, 0], full.index(stage), k_s.index(stage)
                    )
                if j > 0:
                    tma.async_copy_global_to_shared(
                        v_desc, [n, kv_head, block1 * 128, 0], full.index(stage), v_s.index(stage)
                    )
                stage, phase = advance(stage, phase, STAGES)
                block1 = block
                block = following


@gluon.jit
def consume(
    WARPGROUP: gl.constexpr, o_desc, lse, counts, order, q_s, k_s, v_s, o_s,
    q_full, q_empty, full, empty, rows, lanes, row0, n_queries, log2_scale,
    D: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, DENSE: gl.constexpr,
    ORDERED: gl.constexpr, WITH_LSE: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 query rows of every tile."""
    dtype: gl.constexpr = o_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_row_layout: gl.constexpr = gl.SliceLayout(1, o_layout)
    key_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    stage = 0
    phase = 0
    q_phase = 0
    q = q_s.index(WARPGROUP).reshape([64, D])
    no_scores = gl.zeros([64, 128], gl.float32, s_layout)
    no_output = gl.zeros([64, D], gl.float32, o_layout)
    growth_declare(WARPGROUP)
    for turn in range(count_turns(rows, lanes, GROUP)):
        there, n, head, kv_head, row = tile_of(turn, order, rows, lanes, KV_HEADS, GROUP, ORDERED)
        if there:
            flat_head = n * (KV_HEADS * GROUP) + head
            count = row0 + row + 1 if DENSE else gl.load(counts + (flat_head * rows + row))
            # Prologue: the diagonal block. Its causal mask also hides the keys past the last token, which TMA
            # has filled with zeros: they lie behind every query of the prompt.
            mbarrier.wait(q_full.index(WARPGROUP), q_phase)
            q_phase ^= 1
            mbarrier.wait(full.index(stage), phase)
            key = k_s.index(stage).reshape([128, D]).permute((1, 0))
            s = warpgroup_mma(q, key, no_scores, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(empty.index(stage))
            stage, phase = advance(stage, phase, STAGES)
            local = gl.arange(0, 64, row_layout) + opaque(WARPGROUP * 64)
            s = gl.where(local[:, None] >= gl.arange(0, 128, key_layout)[None, :], s, -float("inf"))
            m = row_max(s, row_layout)
            weights = gl.exp2(s * log2_scale - (m * log2_scale)[:, None])
            total = row_sum_partial(weights)
            o = no_output
            p = gl.convert_layout(weights.to(dtype), p_layout)
            mbarrier.wait(full.index(stage), phase)
            for _ in range(count - 1):
                key = k_s.index(stage).reshape([128, D]).permute((1, 0))
                s = warpgroup_mma(q, key, no_scores, use_acc=False, is_async=True)
                o_next = warpgroup_mma(p, v_s.index(stage).reshape([128, D]), o, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s])
                m_next = growth_note(m, gl.maximum(m, row_max(s, row_layout)), WARPGROUP)
                shrink = gl.exp2((m - m_next) * log2_scale)
                m = m_next
                weights = gl.exp2(s * log2_scale - (m_next * log2_scale)[:, None])
                shrink_total = gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))
                total = total * shrink_total[:, None] + row_sum_partial(weights)
                # This wait's spin loop also keeps ptxas from hoisting the wgmma wait above the softmax.
                current = stage
                stage, phase = advance(stage, phase, STAGES)
                mbarrier.wait(full.index(stage), phase)
                o = warpgroup_mma_wait(0, deps=[o_next])
                mbarrier.arrive(empty.index(current))
                if growth_seen(WARPGROUP) != 0:
                    o = o * gl.convert_layout(shrink, o_row_layout)[:, None]
                p = gl.convert_layout(weights.to(dtype), p_layout)
            # Epilogue: the last P V, normalisation, output.
            mbarrier.arrive(q_empty.index(WARPGROUP))
            o_next = warpgroup_mma(p, v_s.index(stage).reshape([128, D]), o, is_async=True)
            row_total = gl.convert_layout(gl.sum(total, axis=1), row_layout)
            if WITH_LSE:
                query = row * 128 + WARPGROUP * 64 + gl.arange(0, 64, row_layout)
                natural = (m * log2_scale + log2_approx(row_total)) * 0.6931471805599453
                gl.store(lse + flat_head.to(gl.int64) * n_queries + query, natural, mask=query < n_queries)
            inverse = gl.convert_layout(1.0 / row_total, o_row_layout)
            o = warpgroup_mma_wait(0, deps=[o_next])
            mbarrier.arrive(empty.index(stage))
            stage, phase = advance(stage, phase, STAGES)
            o = o * inverse[:, None]
            tma.store_wait(0)
            staged = o_s.index(WARPGROUP)
            staged.reshape([64, D]).store(o.to(dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(o_desc, [n, head, row * 128 + WARPGROUP * 64, 0], staged)
    tma.store_wait(0)


# Lengths change from call to call: specialising on them (== 1, % 16 == 0) would only compile the kernel again.
@gluon.jit(do_not_specialize=["rows", "lanes", "row0", "n_queries", "max_blocks"])
def block_sparse_attention_hopper(
    q_desc, k_desc, v_desc, o_desc, lse, indices, counts, order, rows, lanes, row0, n_queries, max_blocks, log2_scale,
    D: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, DENSE: gl.constexpr,
    ORDERED: gl.constexpr, WITH_LSE: gl.constexpr,
):  # fmt: skip
    """Shared memory, barriers (full = data has landed, empty = both warpgroups are done with it), three roles."""
    q_s = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, 64, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, 128, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, 128, D], v_desc.layout)
    o_s = gl.allocate_shared_memory(o_desc.dtype, [2, 1, 1, 64, D], o_desc.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for half in gl.static_range(2):
        mbarrier.init(q_full.index(half), count=1)
        mbarrier.init(q_empty.index(half), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    # The producer warp is padded to four: 12 warps with 168 registers at entry, then 240 / 240 / 24.
    gl.warp_specialize([
        (consume, (0, o_desc, lse, counts, order, q_s, k_s, v_s, o_s, q_full, q_empty, full, empty,
                   rows, lanes, row0, n_queries, log2_scale,
                   D, KV_HEADS, GROUP, STAGES, DENSE, ORDERED, WITH_LSE)),
        (consume, (1, o_desc, lse, counts, order, q_s, k_s, v_s, o_s, q_full, q_empty, full, empty,
                   rows, lanes, row0, n_queries, log2_scale,
                   D, KV_HEADS, GROUP, STAGES, DENSE, ORDERED, WITH_LSE)),
        (produce, (q_desc, k_desc, v_desc, indices, counts, order, q_s, k_s, v_s, q_full, q_empty, full, empty,
                   rows, lanes, row0, max_blocks, KV_HEADS, GROUP, STAGES, DENSE, ORDERED)),
    ], [4, 1], [240, 24])  # fmt: skip


def _descriptor(tensor: Tensor, tokens: int) -> TensorDescriptor:
    box = [1, 1, tokens, tensor.shape[-1]]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(tensor, list(tensor.shape), tma_strides(tensor), box, layout)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection | None,
    query_start: int,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """See kernels.block_sparse_attention, which has checked shapes, types, strides and the device."""
    N, H, Lq, D = q.shape
    kv_heads = k.shape[1]
    rows = -(-Lq // BLOCK)
    known = query_start + Lq  # keys past the last query are never read, whatever the extent holds there
    out = torch.empty(N, Lq, H, D, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(N, H, Lq, dtype=torch.float32, device=q.device) if return_lse else None
    # Stand-ins keep the pointer types when there is no selection or no lse to write: never dereferenced.
    unused = out if selection is None else selection.counts
    indices = unused if selection is None else selection.indices.contiguous()
    counts = unused if selection is None else selection.counts.contiguous()
    order = None if selection is None else selection.order
    block_sparse_attention_hopper[(min(device.multiprocessors(q.device), N * H * rows),)](
        _descriptor(q, HALF),
        _descriptor(k[:, :, :known], BLOCK),
        _descriptor(v[:, :, :known], BLOCK),
        _descriptor(out, HALF),
        out if lse is None else lse,
        indices,
        counts,
        counts if order is None else order,
        rows,
        N * kv_heads,
        query_start // BLOCK,
        Lq,
        indices.shape[-1],
        scale * LOG2E,
        D=D,
        KV_HEADS=kv_heads,
        GROUP=H // kv_heads,
        STAGES=2 if D == 128 else 4,
        DENSE=selection is None,
        ORDERED=order is not None,
        WITH_LSE=return_lse,
        num_warps=4,
    )
    return out, lse
