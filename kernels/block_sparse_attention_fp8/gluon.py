"""Hopper path of fp8 block-sparse attention, written in Gluon: D 64 or 128, blocks of 128.

Roles and barriers: kernels._common.hopper_attention_gluon; traps of the compilers:
kernels.block_sparse_attention.gluon. At fp8's speed the exponentials of a block cost as much as its two matrix
products, so the score tile is double buffered and the softmax runs one block ahead of the tensor cores. Step j of a
tile, X_j being scores in the log2 domain less their maximum:

    issue P_{j-1} V_{j-1}, first half of D; meanwhile the first half of P_j = exp2(X_j)
    wait, add it to O
    issue the second half of D, P_{j-1} times ones, and S_{j+1} = Q K_{j+1}^T; meanwhile the second half of P_j
    wait, add to O and to the row sums; row maximum of S_{j+1}, packing of P_j to fp8
    X_{j+1} = S_{j+1} * c - maximum

Two-level sums: Hopper's fp8 tensor cores align what they add to the accumulator and keep about 14 bits of it, so a sum
over a whole row of 32K positive values came out 57% too small. Each block's P V starts at zero and is added to O in
float32 (the same multiply-add that rescales O). Both halves of D share the 32 registers of that partial sum, which a
whole one would spill. The row sums are of P as rounded to e4m3 and cost no additions: a product with ones.

The order of these steps is not what bounds the kernel: both halves of P V before S, or S before the second half, and
the warpgroups taking turns by named barriers in either, gave no more at 131,072 tokens on an H200, which was at its
limit of power meanwhile; taking turns in the order above, or for all products of a step, gave less (docs/speed.md).

A stage of the ring holds (K_{j+1}, V_{j-1}) and, where there is one, the parts of the bias of block j + 1, with
which S_{j+1} begins: one full and one empty barrier a step. P is scaled by 2^8 and stays in
registers; its columns need no shuffle because V^T is stored with its keys permuted (kernels.fp8_heads).
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels._common.attention import HOPPER_BLOCK
from kernels._common.fp8 import BIAS_KEYS, KEY_GROUP, HeadScales
from kernels._common.hopper_attention_gluon import diagonal_scores, issue_scores, launch, run_roles, send, store_lse
from kernels._common.hopper_fp8_gluon import halves, pack_fp8, weights_operand
from kernels._common.hopper_gluon import advance, row_max
from kernels._common.selection import BlockSelection
from kernels._common.sizes import ceil_div
from kernels._common.tma import tma_strides
from kernels.block_sparse_attention_fp8.step import WEIGHT_BITS, issue_half, issue_total, rescale, step

# Parts of 128 keys, [128, 32], as a wgmma reads them without a swizzle: the 16 columns of all keys, one key behind the
# other as in memory, then the other 16, which stay zeros.
PARTS_LAYOUT = gl.constexpr(
    gl.SharedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [1, 0], [2, 0], [4, 0], [8, 0], [16, 0], [32, 0], [64, 0], [0, 16]],
        alignment=128,
    )
)


@gluon.jit
def as_rows(parts, bias_desc):
    """The first half of parts [128, 32], as TMA writes it: 16 rows of 128 bytes, 8 keys each."""
    return parts._reinterpret(bias_desc.dtype, bias_desc.block_type.shape, bias_desc.layout)


@gluon.jit
def load_blocks(
    k_desc, v_desc, own, kept, diagonal, count, n, head, kv_head, k_s, v_s, full, empty, stage, phase,
    STAGES: gl.constexpr, DENSE: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """count + 2 steps: K of block j (j < count), V of block j - 2."""
    scales, one_s, bias_desc, bias = own
    TILE: gl.constexpr = k_desc.block_type.nbytes  # of V^T too
    plane = head % GROUP // 4  # BIAS_HEADS
    BIAS: gl.constexpr = 0 if bias_desc is None else bias_desc.block_type.nbytes
    # The diagonal block, then the others. block, block1, block2 are blocks j, j - 1 and j - 2; they start as
    # different values: Triton finds what a loop carries by comparing handles, and would drop block2 = block1.
    block = diagonal
    block1 = block + 0
    block2 = block - 0
    for j in range(count + 2):
        following = j if DENSE else gl.load(kept + j, mask=j < count, other=0)
        if (j != 1) | (count > 1):  # with one block only, step 1 has nothing to load
            mbarrier.wait(empty.index(stage), phase)
            if j >= count:
                mbarrier.expect(full.index(stage), TILE)
                tma.async_copy_global_to_shared(
                    v_desc, [n, kv_head, 0, block2 * 128], full.index(stage), v_s.index(stage)
                )
            else:
                if j < 2:
                    mbarrier.expect(full.index(stage), TILE + BIAS)
                else:
                    mbarrier.expect(full.index(stage), 2 * TILE + BIAS)
                    tma.async_copy_global_to_shared(
                        v_desc, [n, kv_head, 0, block2 * 128], full.index(stage), v_s.index(stage)
                    )
                tma.async_copy_global_to_shared(
                    k_desc, [n, kv_head, block * 128, 0], full.index(stage), k_s.index(stage)
                )
                if bias_desc is not None:
                    weights, parts = bias
                    tma.async_copy_global_to_shared(
                        bias_desc, [n, kv_head, plane, block * 16, 0], full.index(stage),
                        as_rows(parts.index(stage), bias_desc),
                    )  # fmt: skip
            stage, phase = advance(stage, phase, STAGES)
        block2 = block1
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
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    h_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 32])
    t_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    scales, one_s, bias_desc, shared_bias = own
    bias = shared_bias
    if bias_desc is not None:
        bias = (shared_bias[0].index(head % GROUP % 4), shared_bias[1])
    q_scale, k_scale, v_scale = scales
    ones = one_s.permute((1, 0))
    factor = gl.load(q_scale + head) * gl.load(k_scale + kv_head) * log2_scale
    mbarrier.wait(q_full.index(WARPGROUP), q_phase)
    q_phase ^= 1
    s, stage, phase = diagonal_scores(WARPGROUP, q, k_s, bias, full, empty, stage, phase, D, STAGES, s_layout)
    m = row_max(s, row_layout) * factor
    x_a, x_b = halves(s * factor - (m - WEIGHT_BITS)[:, None])
    packed_a = pack_fp8(gl.exp2(x_a))
    packed_b = pack_fp8(gl.exp2(x_b))
    shrink = gl.full([64], 1.0, gl.float32, row_layout)
    o_lo = gl.zeros([64, D // 2], gl.float32, h_layout)
    o_hi = gl.zeros([64, D // 2], gl.float32, h_layout)
    total = gl.zeros([64, 8], gl.float32, t_layout)
    mbarrier.wait(full.index(stage), phase)
    if count > 1:
        s = warpgroup_mma_wait(0, deps=[issue_scores(q, k_s, bias, stage, D, s_layout)])
        mbarrier.arrive(empty.index(stage))
        stage, phase = advance(stage, phase, STAGES)
        m_next = gl.maximum(m, row_max(s, row_layout) * factor)
        x = s * factor - (m_next - WEIGHT_BITS)[:, None]
        shrink0 = shrink
        shrink = gl.exp2(m - m_next)
        m = m_next
        mbarrier.wait(full.index(stage), phase)
        for _ in range(count - 2):
            stage, phase, x, packed_a, packed_b, o_lo, o_hi, total, shrink0, shrink, m = step(
                q, k_s, v_s, bias, ones, full, empty, stage, phase, x, packed_a, packed_b, o_lo, o_hi, total,
                shrink0, shrink, m, factor, count, STAGES, D, s_layout, h_layout, t_layout, True,
            )  # fmt: skip
        stage, phase, x, packed_a, packed_b, o_lo, o_hi, total, shrink0, shrink, m = step(
            q, k_s, v_s, bias, ones, full, empty, stage, phase, x, packed_a, packed_b, o_lo, o_hi, total,
            shrink0, shrink, m, factor, count, STAGES, D, s_layout, h_layout, t_layout, False,
        )  # fmt: skip
    # The last block's P V, normalisation, output.
    mbarrier.arrive(q_empty.index(WARPGROUP))
    p = weights_operand(packed_a, packed_b, h_layout)
    lo = issue_half(p, v_s, stage, 0, D, h_layout)
    hi = issue_half(p, v_s, stage, 1, D, h_layout)
    sums = issue_total(p, ones, t_layout)
    lo, hi, sums = warpgroup_mma_wait(0, deps=[lo, hi, sums])
    mbarrier.arrive(empty.index(stage))
    stage, phase = advance(stage, phase, STAGES)
    # The 8 columns are equal: a maximum takes one of them.
    row_total = gl.convert_layout(gl.max(rescale(total, shrink, sums), axis=1), row_layout)
    if WITH_LSE:
        store_lse(WARPGROUP, lse, flat_head, row, n_queries, m - WEIGHT_BITS, row_total, row_layout)
    inverse = gl.convert_layout(gl.load(v_scale + kv_head) / row_total, gl.SliceLayout(1, h_layout))[:, None]
    o_lo = rescale(o_lo, shrink, lo) * inverse
    o_hi = rescale(o_hi, shrink, hi) * inverse
    tma.store_wait(0)
    staged = o_s.index(WARPGROUP)
    staged.reshape([64, D]).slice(0, D // 2, dim=1).store(o_lo.to(o_desc.dtype))
    staged.reshape([64, D]).slice(D // 2, D // 2, dim=1).store(o_hi.to(o_desc.dtype))
    send(WARPGROUP, o_desc, staged, n, head, row)
    return stage, phase, q_phase


@gluon.jit
def bias_weights(HEAD: gl.constexpr):
    """BIAS_WEIGHTS in the columns of head HEAD of four, and zeros: by their bits, int8 [64, 32]."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    column = gl.arange(0, 32, gl.SliceLayout(0, layout))[None, :].broadcast_to([64, 32]) - 4 * HEAD
    bits = gl.full([64, 32], 0, gl.int8, layout)
    bits = gl.where(column == 0, gl.full([64, 32], 0x78, gl.int8, layout), bits)
    bits = gl.where(column == 1, gl.full([64, 32], 0x58, gl.int8, layout), bits)
    bits = gl.where(column == 2, gl.full([64, 32], 0x38, gl.int8, layout), bits)
    return gl.where(column == 3, gl.full([64, 32], 0x18, gl.int8, layout), bits)


@gluon.jit
def declare_nothing(WARPGROUP: gl.constexpr):
    pass


# Lengths change from call to call: specialising on them (== 1, % 16 == 0) would only compile the kernel again.
@gluon.jit(do_not_specialize=["rows", "lanes", "row0", "n_queries", "max_blocks"])
def block_sparse_attention_fp8_hopper(
    q_desc, k_desc, v_desc, o_desc, lse, indices, counts, order, q_scale, k_scale, v_scale, bias_desc,
    rows, lanes, row0, n_queries, max_blocks, log2_scale,
    D: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, DENSE: gl.constexpr,
    ORDERED: gl.constexpr, WITH_LSE: gl.constexpr,
):  # fmt: skip
    one_s = gl.allocate_shared_memory(k_desc.dtype, [8, 128], gl.NVMMASharedLayout(128, element_bitwidth=8, rank=2))
    # 1.0 by its bits: ptxas 12.8 converts a constant to fp8 wrongly.
    bits = gl.full([8, 128], 0x38, gl.int8, gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
    one_s.store(bits.to(k_desc.dtype, bitcast=True))
    scales = (q_scale, k_scale, v_scale)
    if bias_desc is None:
        own = (scales, one_s, bias_desc, bias_desc)
    else:
        weights = gl.allocate_shared_memory(
            k_desc.dtype, [4, 64, 32], gl.NVMMASharedLayout(32, element_bitwidth=8, rank=2)
        )
        for i in gl.static_range(4):
            weights.index(i).store(bias_weights(i).to(k_desc.dtype, bitcast=True))
        parts = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 128, 32], PARTS_LAYOUT)
        nothing = gl.full([128, 32], 0, gl.int8, gl.BlockedLayout([1, 16], [16, 2], [4, 1], [1, 0]))
        for stage in gl.static_range(STAGES):
            parts.index(stage).store(nothing.to(k_desc.dtype, bitcast=True))
        own = (scales, one_s, bias_desc, (weights, parts))  # type: ignore[assignment]
    run_roles(
        q_desc, k_desc, v_desc, o_desc, lse, indices, counts, order, own,
        rows, lanes, row0, n_queries, max_blocks, log2_scale,
        D, KV_HEADS, GROUP, STAGES, DENSE, ORDERED, WITH_LSE, load_blocks, declare_nothing, attend,
    )  # fmt: skip


def _bias_descriptor(bias: Tensor) -> TensorDescriptor:
    """Of bias [N, Hkv, P, T, 16] as rows of 128 bytes, in boxes of 128 keys; past T there are zeros. What past the last
    token is in memory meets only keys that are masked."""
    rows = bias.unflatten(3, (-1, BIAS_KEYS)).flatten(4)
    layout = gl.NVMMASharedLayout(0, element_bitwidth=8, rank=5)
    box = [1, 1, 1, HOPPER_BLOCK // BIAS_KEYS, rows.shape[-1]]
    return TensorDescriptor(rows, list(rows.shape), tma_strides(rows), box, layout)


def block_sparse_attention_fp8(
    q: Tensor,
    k: Tensor,
    vt: Tensor,
    scales: HeadScales,
    selection: BlockSelection | None,
    query_start: int,
    scale: float,
    bias: Tensor | None,
    dtype: torch.dtype,
    return_lse: bool,
    stages: int = 4,
) -> tuple[Tensor, Tensor | None]:
    """See kernels.block_sparse_attention_fp8, which has checked shapes, types, strides and the device."""
    known = query_start + q.shape[2]  # what lies past it is never read, but for the values that share its group of 16
    values = vt[..., : ceil_div(known, KEY_GROUP) * KEY_GROUP]
    return launch(
        block_sparse_attention_fp8_hopper, q, k[:, :, :known], values, (q.shape[-1], HOPPER_BLOCK),
        (scales.q, scales.k, scales.v, None if bias is None else _bias_descriptor(bias)),
        selection, query_start, scale, dtype, return_lse, stages,
    )  # fmt: skip
