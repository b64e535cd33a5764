# mypy: disable-error-code="no-untyped-def"
"""One step of the fp8 Hopper kernel's consumers, and its registers: P as four e4m3 in an int32, sums of half a tile.

A wgmma accumulator register holds column 16g + 8j + 2t + e, t the lane modulo 4. The A operand of the next wgmma
wants column 16g + 4t + 2j + e in its place: the order in which the values are stored (kernels.fp8_heads).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from kernels.gluon_common import advance, fence, growth_note, growth_seen, row_max

WEIGHT_BITS = gl.constexpr(8.0)  # P times 2^8: e4m3 then covers 2^-17 .. 1 of the row's largest


@gluon.jit
def halves(x):
    """[64, 128] -> columns 0..63 and 64..127: registers are renamed only."""
    return gl.split(x.reshape([64, 2, 64]).permute([0, 2, 1]))


@gluon.jit
def join_halves(a, b):
    return gl.join(a, b).permute([0, 2, 1]).reshape([64, 128])


@gluon.jit
def half_sum_partial(p):
    """[64, 64] -> [64, 4, 2]: sums within a thread only."""
    return gl.sum(p.reshape([64, 8, 4, 2]), axis=1)


@gluon.jit
def scale_partial(total, factor):
    """Partial sums of `half_sum_partial` times a factor [64] for each row."""
    layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, total.type.layout))
    return total * gl.expand_dims(gl.expand_dims(gl.convert_layout(factor, layout), 1), 2)


@gluon.jit
def finish_sum(total, LAYOUT: gl.constexpr):
    """Partial sums -> [64]: over the two column parities and the four lanes of a row."""
    return gl.convert_layout(gl.sum(gl.sum(total, axis=2), axis=1), LAYOUT)


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
def issue_scores(q, k_s, stage, D: gl.constexpr, S_LAYOUT: gl.constexpr):
    key = k_s.index(stage).reshape([128, D]).permute((1, 0))
    return warpgroup_mma(q, key, gl.zeros([64, 128], gl.float32, S_LAYOUT), use_acc=False, is_async=True)


@gluon.jit
def issue_output(packed_a, packed_b, v_s, stage, o, D: gl.constexpr, O_LAYOUT: gl.constexpr):
    joined = join_halves(unpack_fp8(packed_a), unpack_fp8(packed_b))
    p = gl.convert_layout(joined, gl.DotOperandLayout(0, O_LAYOUT, 4), assert_trivial=True)
    return warpgroup_mma(p, v_s.index(stage).reshape([D, 128]).permute((1, 0)), o, is_async=True)


@gluon.jit
def step(
    q, k_s, v_s, full, empty, stage, phase, x, packed_a, packed_b, o, shrink0, grew0, shrink, m, total, factor, count,
    WARPGROUP: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
    MORE: gl.constexpr,
):  # fmt: skip
    """One block. shrink0 and grew0 belong to the block whose P is packed, shrink to the block whose scores are x.
    MORE: there is a next block whose scores to compute."""
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    if grew0 != 0:
        o = o * gl.convert_layout(shrink0, O_ROWS)[:, None]
    o_next = issue_output(packed_a, packed_b, v_s, stage, o, D, O_LAYOUT)
    if MORE:
        s = issue_scores(q, k_s, stage, D, S_LAYOUT)
    fence(count)
    x_a, x_b = halves(x)
    p_a = gl.exp2(x_a)
    total = scale_partial(total, shrink) + half_sum_partial(p_a)
    current = stage
    stage, phase = advance(stage, phase, STAGES)
    mbarrier.wait(full.index(stage), phase)  # its spin loop keeps the wgmma wait below from being hoisted
    if MORE:
        o, s = warpgroup_mma_wait(0, deps=[o_next, s])
    else:
        o = warpgroup_mma_wait(0, deps=[o_next])
    mbarrier.arrive(empty.index(current))
    grew0 = growth_seen(WARPGROUP)
    shrink0 = shrink
    if MORE:
        m_next = growth_note(m, gl.maximum(m, row_max(s, ROWS) * factor), WARPGROUP)
        shrink = gl.exp2(m - m_next)
        m = m_next
    p_b = gl.exp2(x_b)
    total = total + half_sum_partial(p_b)
    packed_a = pack_fp8(p_a)
    packed_b = pack_fp8(p_b)
    if MORE:
        x = s * factor - (m - WEIGHT_BITS)[:, None]
    return stage, phase, x, packed_a, packed_b, o, shrink0, grew0, shrink, m, total
