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

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from kernels._common.attention import HOPPER_BLOCK
from kernels._common.hopper_attention_gluon import diagonal_scores, issue_scores, launch, run_roles, send, store_lse
from kernels._common.hopper_gluon import advance, growth_declare, growth_note, growth_seen, row_max, row_sum_partial
from kernels._common.selection import BlockSelection


@gluon.jit
def load_blocks(
    k_desc, v_desc, own, kept, diagonal, count, n, head, kv_head, k_s, v_s, full, empty, stage, phase,
    STAGES: gl.constexpr, DENSE: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """count + 1 steps: K of block j (j < count), V of block j - 1. The diagonal block goes first."""
    TILE: gl.constexpr = k_desc.block_type.nbytes  # of V too
    # block and block1 are blocks j and j - 1; they start as different values: Triton finds what a loop carries
    # by comparing handles.
    block = diagonal
    block1 = block + 0
    for j in range(count + 1):
        following = j if DENSE else gl.load(kept + j, mask=j < count, other=0)
        mbarrier.wait(empty.index(stage), phase)
        if (j == 0) | (j == count):
            mbarrier.expect(full.index(stage), TILE)
        else:
            mbarrier.expect(full.index(stage), 2 * TILE)
        if j < count:
            tma.async_copy_global_to_shared(k_desc, [n, kv_head, block * 128, 0], full.index(stage), k_s.index(stage))
        if j > 0:
            tma.async_copy_global_to_shared(v_desc, [n, kv_head, block1 * 128, 0], full.index(stage), v_s.index(stage))
        stage, phase = advance(stage, phase, STAGES)
        block1 = block
        block = following
    return stage, phase


@gluon.jit
def attend(
    WARPGROUP: gl.constexpr, o_desc, lse, own, q, k_s, v_s, o_s, q_full, q_empty, full, empty,
    stage, phase, q_phase, n, head, kv_head, flat_head, row, count, n_queries, log2_scale,
    D: gl.constexpr, STAGES: gl.constexpr, WITH_LSE: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """64 query rows of one tile."""
    dtype: gl.constexpr = o_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_row_layout: gl.constexpr = gl.SliceLayout(1, o_layout)
    # Prologue: the diagonal block.
    mbarrier.wait(q_full.index(WARPGROUP), q_phase)
    q_phase ^= 1
    s, stage, phase = diagonal_scores(WARPGROUP, q, k_s, None, full, empty, stage, phase, D, STAGES, s_layout)
    m = row_max(s, row_layout)
    weights = gl.exp2(s * log2_scale - (m * log2_scale)[:, None])
    total = row_sum_partial(weights)
    o = gl.zeros([64, D], gl.float32, o_layout)
    p = gl.convert_layout(weights.to(dtype), p_layout)
    mbarrier.wait(full.index(stage), phase)
    for _ in range(count - 1):
        s = issue_scores(q, k_s, None, stage, D, s_layout)
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
        store_lse(WARPGROUP, lse, flat_head, row, n_queries, m * log2_scale, row_total, row_layout)
    inverse = gl.convert_layout(1.0 / row_total, o_row_layout)
    o = warpgroup_mma_wait(0, deps=[o_next])
    mbarrier.arrive(empty.index(stage))
    stage, phase = advance(stage, phase, STAGES)
    o = o * inverse[:, None]
    tma.store_wait(0)
    staged = o_s.index(WARPGROUP)
    staged.reshape([64, D]).store(o.to(dtype))
    send(WARPGROUP, o_desc, staged, n, head, row)
    return stage, phase, q_phase


# Lengths change from call to call: specialising on them (== 1, % 16 == 0) would only compile the kernel again.
@gluon.jit(do_not_specialize=["rows", "lanes", "row0", "n_queries", "max_blocks"])
def block_sparse_attention_hopper(
    q_desc, k_desc, v_desc, o_desc, lse, indices, counts, order, rows, lanes, row0, n_queries, max_blocks, log2_scale,
    D: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, DENSE: gl.constexpr,
    ORDERED: gl.constexpr, WITH_LSE: gl.constexpr,
):  # fmt: skip
    run_roles(
        q_desc, k_desc, v_desc, o_desc, lse, indices, counts, order, None,
        rows, lanes, row0, n_queries, max_blocks, log2_scale,
        D, KV_HEADS, GROUP, STAGES, DENSE, ORDERED, WITH_LSE, load_blocks, growth_declare, attend,
    )  # fmt: skip


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
    D = q.shape[-1]
    known = query_start + q.shape[2]  # keys past the last query are never read, whatever the extent holds there
    return launch(
        block_sparse_attention_hopper, q, k[:, :, :known], v[:, :, :known], (HOPPER_BLOCK, D), (),
        selection, query_start, scale, q.dtype, return_lse, stages=2 if D == 128 else 4,
    )  # fmt: skip
