# mypy: disable-error-code="no-untyped-def"
"""One step of the fp8 Hopper kernel's consumers, and its registers: P as four e4m3 in an int32, P V in halves of D.

A wgmma accumulator register holds column 16g + 8j + 2t + e, t the lane modulo 4. The A operand of the next wgmma
wants column 16g + 4t + 2j + e in its place: the order in which the values are stored (kernels.fp8_heads).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from kernels._common.hopper import advance, fence, row_max
from kernels._common.hopper_attention import issue_scores

WEIGHT_BITS = gl.constexpr(8.0)  # P times 2^8: e4m3 then covers 2^-17 .. 1 of the row's largest


@gluon.jit
def halves(x):
    """[64, 128] -> columns 0..63 and 64..127: registers are renamed only."""
    return gl.split(x.reshape([64, 2, 64]).permute([0, 2, 1]))


@gluon.jit
def join_halves(a, b):
    return gl.join(a, b).permute([0, 2, 1]).reshape([64, 128])


@gluon.jit
def pack_fp8(p):
    """Half of P, float32 in accumulator layout -> int32 [64, g, 4], four e4m3 each: columns 16g + 2t + {0, 1, 8, 9}.

    What crosses a loop edge must be int32: Triton splits a loop-carried fp8 tensor into bytes and packs them again
    with hundreds of instructions a step."""
    GROUPS: gl.constexpr = p.shape[1] // 16
    even, odd = gl.split(p.reshape([64, GROUPS, 2, 4, 2]).permute([0, 1, 3, 2, 4]))
    p0, p8 = gl.split(even)
    p1, p9 = gl.split(odd)
    return gl.inline_asm_elementwise(
        "{ .reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3; mov.b32 $0, {lo, hi}; }",
        "=r,r,r,r,r",
        [p0, p1, p8, p9],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def unpack_fp8(packed):
    """What `pack_fp8` gives -> e4m3 [64, 16g] with registers ordered for the wgmma A operand: no instructions.

    Four consecutive registers (row half r, column group parity g) are one operand of k = 32; the asm turns their
    number into a byte number, the reshapes swap (r, g) with it."""
    PAIRS: gl.constexpr = packed.shape[1] // 2
    a, b, c, d = gl.inline_asm_elementwise(
        "mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;",
        "=r,=r,=r,=r,r,r,r,r",
        [packed],
        dtype=(gl.float8e4nv, gl.float8e4nv, gl.float8e4nv, gl.float8e4nv),
        is_pure=True,
        pack=4,
    )
    joined = gl.join(gl.join(a, b), gl.join(c, d))  # [64, 2 PAIRS, 4, r', g']
    # rows (warp, r, lane // 4), words (pair, g, lane % 4)
    by_bit = joined.reshape([4, 2, 8, PAIRS, 2, 4, 2, 2])
    return by_bit.permute([0, 6, 2, 3, 7, 5, 4, 1]).reshape([64, 32 * PAIRS])


@gluon.jit
def weights_operand(packed_a, packed_b, H_LAYOUT: gl.constexpr):
    joined = join_halves(unpack_fp8(packed_a), unpack_fp8(packed_b))
    return gl.convert_layout(joined, gl.DotOperandLayout(0, H_LAYOUT, 4), assert_trivial=True)


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
    q, k_s, v_s, ones, full, empty, stage, phase, x, packed_a, packed_b, o_lo, o_hi, total, shrink0, shrink, m, factor,
    count, STAGES: gl.constexpr, D: gl.constexpr, S_LAYOUT: gl.constexpr, H_LAYOUT: gl.constexpr,
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
        s = issue_scores(q, k_s, stage, D, S_LAYOUT)
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
