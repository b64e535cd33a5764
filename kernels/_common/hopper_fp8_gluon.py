# mypy: disable-error-code="no-untyped-def"
"""Probabilities in e4m3 in the registers of Hopper kernels: four of them in an int32.

A wgmma accumulator register holds column 16g + 8j + 2t + e, t the lane modulo 4. The A operand of the next wgmma
wants column 16g + 4t + 2j + e in its place: the order in which the values are stored (kernels.fp8_heads).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


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
