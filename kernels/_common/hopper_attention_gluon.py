# mypy: disable-error-code="no-untyped-def"
"""What the two Hopper attention kernels (16 bits and fp8) have in common: their roles, their tiles, their launch.

A kernel gives two functions, chosen when it is compiled: `load_blocks` streams the key and value blocks of a tile
through the ring of stages (the producer warp), `attend` computes a tile's 64 rows (each of two consumer warpgroups).
Import it only where a Hopper kernel will run or compile.
"""

from __future__ import annotations

from typing import Any

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
from kernels._common.attention import HOPPER_BLOCK, LOG2E, allocate_output
from kernels._common.hopper_gluon import advance, count_turns, log2_approx, opaque, tile_of
from kernels._common.selection import BlockSelection
from kernels._common.sizes import ceil_div
from kernels._common.tma import tma_strides

HALF = 64  # query rows of one consumer warpgroup


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, indices, counts, order, own, q_s, k_s, v_s, q_full, q_empty, full, empty,
    rows, lanes, row0, max_blocks,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, DENSE: gl.constexpr,
    ORDERED: gl.constexpr, LOAD_BLOCKS: gl.constexpr,
):  # fmt: skip
    """One warp: per tile the two halves of Q, then what LOAD_BLOCKS streams: the diagonal block (its number), then
    those kept, `count` in all. It returns the ring's next stage and phase."""
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
            stage, phase = LOAD_BLOCKS(
                k_desc, v_desc, own, kept, row0 + row, count, n, head, kv_head, k_s, v_s, full, empty, stage, phase,
                STAGES, DENSE, GROUP,
            )  # fmt: skip


@gluon.jit
def consume(
    WARPGROUP: gl.constexpr, o_desc, lse, counts, order, own, q_s, k_s, v_s, o_s,
    q_full, q_empty, full, empty, rows, lanes, row0, n_queries, log2_scale,
    D: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, DENSE: gl.constexpr,
    ORDERED: gl.constexpr, WITH_LSE: gl.constexpr, DECLARE: gl.constexpr, ATTEND: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 query rows of every tile, by ATTEND. It waits for its half of Q, takes the blocks off the ring
    as LOAD_BLOCKS put them there, writes output and lse, and returns the next stage, phase and phase of Q."""
    stage = 0
    phase = 0
    q_phase = 0
    q = q_s.index(WARPGROUP).reshape([64, D])
    DECLARE(WARPGROUP)
    for turn in range(count_turns(rows, lanes, GROUP)):
        there, n, head, kv_head, row = tile_of(turn, order, rows, lanes, KV_HEADS, GROUP, ORDERED)
        if there:
            flat_head = n * (KV_HEADS * GROUP) + head
            count = row0 + row + 1 if DENSE else gl.load(counts + (flat_head * rows + row))
            stage, phase, q_phase = ATTEND(
                WARPGROUP, o_desc, lse, own, q, k_s, v_s, o_s, q_full, q_empty, full, empty,
                stage, phase, q_phase, n, head, kv_head, flat_head, row, count, n_queries, log2_scale,
                D, STAGES, WITH_LSE, GROUP,
            )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def run_roles(
    q_desc, k_desc, v_desc, o_desc, lse, indices, counts, order, own,
    rows, lanes, row0, n_queries, max_blocks, log2_scale,
    D: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, DENSE: gl.constexpr,
    ORDERED: gl.constexpr, WITH_LSE: gl.constexpr,
    LOAD_BLOCKS: gl.constexpr, DECLARE: gl.constexpr, ATTEND: gl.constexpr,
):  # fmt: skip
    """Shared memory, barriers (full = data has landed, empty = both warpgroups are done with it), three roles.

    own: handed on to LOAD_BLOCKS and ATTEND, which alone know it. DECLARE: what a consumer declares before its tiles.
    """
    q_s = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, 64, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, 128, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)  # noqa: RUF005
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
        (consume, (0, o_desc, lse, counts, order, own, q_s, k_s, v_s, o_s,
                   q_full, q_empty, full, empty, rows, lanes, row0, n_queries, log2_scale,
                   D, KV_HEADS, GROUP, STAGES, DENSE, ORDERED, WITH_LSE, DECLARE, ATTEND)),
        (consume, (1, o_desc, lse, counts, order, own, q_s, k_s, v_s, o_s,
                   q_full, q_empty, full, empty, rows, lanes, row0, n_queries, log2_scale,
                   D, KV_HEADS, GROUP, STAGES, DENSE, ORDERED, WITH_LSE, DECLARE, ATTEND)),
        (produce, (q_desc, k_desc, v_desc, indices, counts, order, own, q_s, k_s, v_s, q_full, q_empty, full, empty,
                   rows, lanes, row0, max_blocks, KV_HEADS, GROUP, STAGES, DENSE, ORDERED, LOAD_BLOCKS)),
    ], [4, 1], [240, 24])  # fmt: skip


# ---------------------------------------------------------------- parts of a tile
@gluon.jit
def issue_scores(q, k_s, bias, stage, D: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Q K^T of the block in a stage, float32 [64, 128], in flight.

    bias: None, or weights [64, 32] and parts [stages, 128, 32] of what is added for each key, in shared memory:
    one more product, with which the sum begins."""
    key = k_s.index(stage).reshape([128, D]).permute((1, 0))
    s = gl.zeros([64, 128], gl.float32, S_LAYOUT)
    if bias is None:
        s = warpgroup_mma(q, key, s, use_acc=False, is_async=True)
    else:
        weights, parts = bias
        s = warpgroup_mma(weights, parts.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)
        s = warpgroup_mma(q, key, s, is_async=True)
    return s


@gluon.jit
def diagonal_scores(
    WARPGROUP: gl.constexpr, q, k_s, bias, full, empty, stage, phase,
    D: gl.constexpr, STAGES: gl.constexpr, S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Masked scores of the tile's first block, the diagonal one, and the next stage and phase.

    The causal mask also hides the keys past the last token, which TMA has filled with zeros: they lie behind every
    query of the prompt."""
    mbarrier.wait(full.index(stage), phase)
    s = warpgroup_mma_wait(0, deps=[issue_scores(q, k_s, bias, stage, D, S_LAYOUT)])
    mbarrier.arrive(empty.index(stage))
    stage, phase = advance(stage, phase, STAGES)
    local = gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT)) + opaque(WARPGROUP * 64)
    s = gl.where(local[:, None] >= gl.arange(0, 128, gl.SliceLayout(0, S_LAYOUT))[None, :], s, -float("inf"))
    return s, stage, phase


@gluon.jit
def store_lse(WARPGROUP: gl.constexpr, lse, flat_head, row, n_queries, top, total, LAYOUT: gl.constexpr):
    """Natural log-sum-exp of 64 rows from top + log2(total), both [64]."""
    query = row * 128 + WARPGROUP * 64 + gl.arange(0, 64, LAYOUT)
    natural = (top + log2_approx(total)) * 0.6931471805599453
    gl.store(lse + flat_head.to(gl.int64) * n_queries + query, natural, mask=query < n_queries)


@gluon.jit
def send(WARPGROUP: gl.constexpr, o_desc, staged, n, head, row):
    """Start the copy of 64 finished rows from shared memory."""
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [n, head, row * 128 + WARPGROUP * 64, 0], staged)


# ---------------------------------------------------------------- launch
def _descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    size = tensor.element_size()
    layout = gl.NVMMASharedLayout(min(128, columns * size), element_bitwidth=8 * size, rank=4)
    return TensorDescriptor(tensor, list(tensor.shape), tma_strides(tensor), [1, 1, rows, columns], layout)


def launch(
    kernel: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    value_box: tuple[int, int],
    own: tuple[Any, ...],
    selection: BlockSelection | None,
    query_start: int,
    scale: float,
    dtype: torch.dtype,
    return_lse: bool,
    stages: int,
) -> tuple[Tensor, Tensor | None]:
    """Run `kernel` on q [N, H, Lq, D], on k and v cut to the tokens that may be read, and give (out in `dtype`, lse).

    value_box: the last two dimensions of a block of v. own: further arguments, after `order`. stages: of the ring.
    """
    N, H, Lq, D = q.shape
    kv_heads = k.shape[1]
    rows = ceil_div(Lq, HOPPER_BLOCK)
    out, lse = allocate_output(q, dtype, return_lse)
    # Stand-ins keep the pointer types when there is no selection or no lse to write: never dereferenced.
    unused = out if selection is None else selection.counts
    indices = unused if selection is None else selection.indices.contiguous()
    counts = unused if selection is None else selection.counts.contiguous()
    order = None if selection is None else selection.order
    kernel[(min(device.multiprocessors(q.device), N * H * rows),)](
        _descriptor(q, HALF, D),
        _descriptor(k, HOPPER_BLOCK, D),
        _descriptor(v, *value_box),
        _descriptor(out, HALF, D),
        out if lse is None else lse,
        indices,
        counts,
        counts if order is None else order,
        *own,
        rows,
        N * kv_heads,
        query_start // HOPPER_BLOCK,
        Lq,
        indices.shape[-1],
        scale * LOG2E,
        D=D,
        KV_HEADS=kv_heads,
        GROUP=H // kv_heads,
        STAGES=stages,
        DENSE=selection is None,
        ORDERED=order is not None,
        WITH_LSE=return_lse,
        num_warps=4,
    )
    return out, lse
