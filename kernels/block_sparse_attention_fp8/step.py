# mypy: disable-error-code="no-untyped-def"
"""One step of the fp8 Hopper kernel's consumers: P V in halves of D."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from kernels._common.hopper_attention_gluon import issue_scores
from kernels._common.hopper_fp8_gluon import halves, pack_fp8, weights_operand
from kernels._common.hopper_gluon import advance, fence, row_max

WEIGHT_BITS = gl.constexpr(8.0)  # P times 2^8: e4m3 then covers 2^-17 .. 1 of the row's largest


@gluon.jit
def issue_half(p, v_s, stage, HALF: gl.constexpr, D: gl.constexpr, H_LAYOUT: gl.constexpr):
    """P V of one block and one half of D: a sum of 128 keys that starts at zero."""
    value = v_s.index(stage).reshape([D, 128]).slice(HALF * (D // 2), D // 2).permute((1, 0))
    zero = gl.zeros([64, D // 2], gl.float32, H_LAYOUT)
    return warpgroup_mma(p, value, zero, use_acc=False, is_async=True)


@gluon.jit
def issue_total(p, ones, T_LAYOUT: gl.constexpr):
    """P times ones: the row sums of P as it was rounded, in each of 8 columns."""
    operand = gl.convert_layout(p, gl.DotOperandLayout(0, T_LAYOUT, 4), assert_trivial=True)
    return warpgroup_mma(operand, ones, gl.zeros([64, 8], gl.float32, T_LAYOUT), use_acc=False, is_async=True)


@gluon.jit
def rescale(x, factor, more):
    """Rows of x times factor [64], plus more: one multiply-add each (Triton 3.7 does not fuse them by itself)."""
    return gl.fma(x, gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout))[:, None].broadcast_to(x.shape), more)


@gluon.jit
def step(
    q, k_s, v_s, bias, ones, full, empty, stage, phase, x, packed_a, packed_b, o_lo, o_hi, total, shrink0, shrink, m,
    factor, count, STAGES: gl.constexpr, D: gl.constexpr, S_LAYOUT: gl.constexpr, H_LAYOUT: gl.constexpr,
    T_LAYOUT: gl.constexpr, MORE: gl.constexpr,
):  # fmt: skip
    """One block. shrink0 belongs to the block whose P is packed, shrink to the block whose scores are x.
    MORE: there is a next block whose scores to compute.

    P is packed only while no product is in flight: ptxas serialises every wgmma where registers that a later one reads
    are written between the start and the end of an earlier one (C7513)."""
    p = weights_operand(packed_a, packed_b, H_LAYOUT)
    lo = issue_half(p, v_s, stage, 0, D, H_LAYOUT)
    fence(count)
    x_a, x_b = halves(x)
    p_a = gl.exp2(x_a)
    fence(count)
    lo = warpgroup_mma_wait(0, deps=[lo])
    o_lo = rescale(o_lo, shrink0, lo)
    packed_a = pack_fp8(p_a)
    hi = issue_half(p, v_s, stage, 1, D, H_LAYOUT)
    sums = issue_total(p, ones, T_LAYOUT)
    if MORE:
        s = issue_scores(q, k_s, bias, stage, D, S_LAYOUT)
    fence(count)
    p_b = gl.exp2(x_b)
    current = stage
    stage, phase = advance(stage, phase, STAGES)
    mbarrier.wait(full.index(stage), phase)  # its spin loop keeps the wgmma wait below from being hoisted
    if MORE:
        hi, sums, s = warpgroup_mma_wait(0, deps=[hi, sums, s])
    else:
        hi, sums = warpgroup_mma_wait(0, deps=[hi, sums])
    mbarrier.arrive(empty.index(current))
    o_hi = rescale(o_hi, shrink0, hi)
    total = rescale(total, shrink0, sums)
    shrink0 = shrink
    if MORE:
        m_next = gl.maximum(m, row_max(s, gl.SliceLayout(1, S_LAYOUT)) * factor)
        shrink = gl.exp2(m - m_next)
        m = m_next
    packed_b = pack_fp8(p_b)
    if MORE:
        x = s * factor - (m - WEIGHT_BITS)[:, None]
    return stage, phase, x, packed_a, packed_b, o_lo, o_hi, total, shrink0, shrink, m
