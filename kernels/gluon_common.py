# mypy: disable-error-code="no-untyped-def"
"""Device helpers of the Hopper kernels (Gluon, sm_90a). Import it only where a Hopper kernel will run or compile.

Conventions: one persistent CTA per multiprocessor; softmax state lives in the log2 domain; a warpgroup's scores
are one [64, 128] wgmma accumulator.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


# ---------------------------------------------------------------- tile schedule
@gluon.jit
def tile_number(turn):
    """This CTA's tile in its `turn`-th round. The direction alternates (snake): with tiles ordered longest first,
    whoever gets a long tile in one round gets a short one in the next."""
    programs = gl.num_programs(0)
    pid = gl.program_id(0)
    return turn * programs + gl.where(turn % 2 == 0, pid, programs - 1 - pid)


@gluon.jit
def tile_coordinates(tile, rows, KV_HEADS: gl.constexpr, GROUP: gl.constexpr):
    """Tile number -> (batch, query head, KV head, query block), the longest query blocks first.

    All query blocks of the GROUP heads that share a KV head are adjacent, so that the K and V of about one KV head
    are live in L2. With all heads of one query block adjacent instead, the kernel is bound by DRAM: 489 against
    619 TFLOP/s at 128K tokens, the largest single effect measured."""
    per_kv_head = GROUP * rows
    lane = tile // per_kv_head
    rest = tile % per_kv_head
    kv_head = lane % KV_HEADS
    return lane // KV_HEADS, kv_head * GROUP + rest % GROUP, kv_head, rows - 1 - rest // GROUP


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The next slot of a ring of STAGES buffers, and the parity to wait for there."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


# ---------------------------------------------------------------- compiler fences
@gluon.jit
def opaque(x: gl.constexpr):
    """A constant that LLVM cannot see through. Without it LLVM proves that the right half of the diagonal block is
    masked for the upper warpgroup and emits one shared exp2(-inf) for all those columns; ptxas 12.8 then
    miscompiles fp8 packing of them (it reads a register that was never written)."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [gl.to_tensor(x)], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def fence(x):
    """A self loop that is never taken: ptxas does not schedule across basic blocks. x: int32 that ptxas cannot bound,
    such as a count loaded from memory; it deletes a loop that it can prove away."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.eq.s32 p, $1, 0x7fffffff; L: @p nanosleep.u32 100; @p bra L; mov.b32 $0, 0; }",
        "=r,r",
        [x],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def statement(text: gl.constexpr):
    """A PTX statement with side effects and no result."""
    gl.inline_asm_elementwise(
        text + " mov.b32 $0, 0;", "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def log2_approx(x):
    """lg2.approx: absolute error below 2^-22 for x >= 1. gl.log2 is a polynomial with divergent branches."""
    return gl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


# ---------------------------------------------------------------- "some row maximum of this warp grew"
# Gluon has neither a warp vote nor a tensor -> per-warp scalar, so the flag is a PTX register declared by hand, one
# for each consumer warpgroup (their code is separate, their PTX scope is one).
@gluon.jit
def growth_declare(WARPGROUP: gl.constexpr):
    statement(".reg .b32 grew1;" if WARPGROUP == 1 else ".reg .b32 grew0;")


@gluon.jit
def growth_note(old, new, WARPGROUP: gl.constexpr):
    """Set the warp's flag to whether any of its 16 rows' maxima changed; returns `new`. old, new: [64], two rows a
    thread."""
    TEXT: gl.constexpr = (
        "{ .reg .pred p, q; setp.neu.f32 p, $2, $4; setp.neu.f32 q, $3, $5; or.pred p, p, q; "
        "vote.sync.any.pred p, p, 0xffffffff; selp.b32 growN, 1, 0, p; mov.b32 $0, $4; mov.b32 $1, $5; }"
    )
    return gl.inline_asm_elementwise(
        TEXT.replace("growN", "grew1" if WARPGROUP == 1 else "grew0"),
        "=f,=f,f,f,f,f",
        [old, new],
        dtype=gl.float32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def growth_seen(WARPGROUP: gl.constexpr):
    return gl.inline_asm_elementwise(
        "mov.b32 $0, grew1;" if WARPGROUP == 1 else "mov.b32 $0, grew0;",
        "=r,r",
        [gl.to_tensor(0)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


# ---------------------------------------------------------------- row reductions over a [64, 128] accumulator
# Register order: column 16g + 8j + 2t + e belongs to lane t (mod 4). Reducing dimension by dimension gives
# independent chains; gl.max(s, axis=1) is one chain of 31 dependent FMNMX per row.
@gluon.jit
def row_max(s, LAYOUT: gl.constexpr):
    x = gl.max(s.reshape([64, 8, 2, 4, 2]), axis=1)
    x = gl.max(x, axis=3)
    x = gl.max(x, axis=1)
    return gl.convert_layout(gl.max(x, axis=1), LAYOUT)


@gluon.jit
def row_sum_partial(p):
    """[64, 128] -> [64, 4]: sums within a thread only; the four lanes of a row are added once per tile."""
    return gl.sum(gl.sum(p.reshape([64, 16, 4, 2]), axis=3), axis=1)
