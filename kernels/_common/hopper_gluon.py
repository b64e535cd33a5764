# mypy: disable-error-code="no-untyped-def"
"""Device helpers of the Hopper kernels (Gluon, sm_90a). Import it only where a Hopper kernel will run or compile.

Conventions: one persistent CTA per multiprocessor; softmax state lives in the log2 domain; a warpgroup's scores
are one [64, 128] wgmma accumulator.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


# ---------------------------------------------------------------- tile schedule
@gluon.jit
def count_turns(rows, lanes, GROUP: gl.constexpr):
    """Rounds in which the CTAs take their tiles; a lane is one KV head of one batch entry."""
    return lanes * gl.cdiv(GROUP * rows, gl.num_programs(0))


@gluon.jit
def tile_of(turn, order, rows, lanes, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, ORDERED: gl.constexpr):
    """This CTA's tile in a turn -> (whether there is one, batch, query head, KV head, query block).

    ORDERED: heads of a row keep different numbers of blocks; `order` (BlockSelection.order) then says which tiles of a
    lane are longest.

    Lane by lane, so that the K and V of about one KV head are live in L2: with all heads of one query block adjacent
    the kernel is bound by DRAM at 128K tokens (489 against 619 TFLOP/s, the largest single effect measured). Inside a
    lane the longest query blocks come first, those of the GROUP heads side by side.

    The schedule is static and every CTA's load nearly the same: a lane's rounds alternate in direction (snake), lanes
    begin in alternate directions, and each pair of lanes is turned against the last one, so that what one lane leaves
    uneven the others even out. Simulated, 4K to 128K tokens: within 2% of drawing tiles by ticket (a snake across the
    lanes' borders: 8K tokens at 61%)."""
    programs = gl.num_programs(0)
    tiles = GROUP * rows
    rounds = gl.cdiv(tiles, programs)
    lane = turn // rounds
    around = turn % rounds
    place = (gl.program_id(0) + programs - lane // 2 * (2 * programs // lanes)) % programs
    place = gl.where((lane + around) % 2 == 0, place, programs - 1 - place)
    tile = around * programs + place
    kv_head = lane % KV_HEADS
    there = tile < tiles
    if ORDERED:
        tile = gl.load(order + lane * tiles + tile, mask=there, other=0)
    return there, lane // KV_HEADS, kv_head * GROUP + tile % GROUP, kv_head, rows - 1 - tile // GROUP


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
