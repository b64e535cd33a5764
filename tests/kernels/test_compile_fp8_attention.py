"""The fp8 kernels compiled for GPUs that are not there: what ptxas says of registers, spills and wgmma.

A subset by default; STEMLINE_FULL_COMPILE=1 compiles every head size and block size.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kernels.block_selection import BlockSelection
from kernels.dispatch import triton_version
from kernels.fp8_heads import FP8, HeadScales, bias_shape
from tests.kernels import offline, sass

BF16 = torch.bfloat16
ADA, HOPPER = (8, 9), (9, 0)
SHARED_LIMIT = {ADA: 99 * 1024, HOPPER: 227 * 1024}
SPILLS_ALLOWED = 128  # bytes stored plus loaded: values that live outside the main loop
FULL = os.environ.get("STEMLINE_FULL_COMPILE") == "1"
HEADS, KV_HEADS, LENGTH = 8, 2, 1024


def empty(*shape: int, dtype: torch.dtype = FP8) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def scales() -> HeadScales:
    return HeadScales(*(empty(n, dtype=torch.float32) for n in (HEADS, KV_HEADS, KV_HEADS)))


def bias() -> torch.Tensor:
    return empty(1, *bias_shape(HEADS, KV_HEADS, 2 * LENGTH))


def operands(
    dim: int, block_size: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, BlockSelection | None]:
    """q as a view of [N, L, H, D], k and vt as extents of arenas; no memory behind them."""
    q = empty(1, LENGTH, HEADS, dim).transpose(1, 2)
    k = empty(1, KV_HEADS, 2 * LENGTH, dim)[:, :, :LENGTH]
    vt = empty(1, KV_HEADS, dim, 2 * LENGTH)[..., :LENGTH]
    if block_size is None:
        return q, k, vt, None
    rows = LENGTH // block_size
    kept = (empty(1, HEADS, rows, 4, dtype=torch.int32), empty(1, HEADS, rows, dtype=torch.int32))
    return q, k, vt, BlockSelection(*kept)


def check(launch: Callable[[], object], capability: tuple[int, int], serialised: bool = False) -> None:
    """serialised: ptxas is known to serialise this kernel's wgmma, which it reports as C7514 or C7515."""
    for report in offline.compile_reports(launch, capability):
        assert report.spills <= SPILLS_ALLOWED, str(report)
        assert report.shared <= SHARED_LIMIT[capability], str(report)
        known = serialised and all("C7514" in line or "C7515" in line for line in report.warnings)
        assert not report.warnings or known, str(report)


@pytest.mark.parametrize("capability", [ADA, HOPPER], ids=["sm89", "sm90"])
@pytest.mark.parametrize(
    ("dim", "block_size", "window", "lse"),
    [(dim, block, None, True) for dim in (64, 96, 128, 256) for block in (32, 64, 128, 256, None)]
    if FULL
    # The last as the windowed layers of gpt-oss, whose sinks ask for the log-sum-exp.
    else [
        (128, 128, None, False), (256, None, 4096, False), (96, 32, None, False), (64, 128, None, False),
        (64, None, 128, True),
    ],
)  # fmt: skip
def test_portable_attention(
    dim: int, block_size: int | None, window: int | None, lse: bool, capability: tuple[int, int]
) -> None:
    from kernels.block_sparse_attention_fp8 import triton

    q, k, vt, selection = operands(dim, block_size)

    def launch() -> None:
        triton.block_sparse_attention_fp8(
            q, k, vt, scales(), selection, 0, block_size or 128, 0.1, window, bias(), BF16, lse
        )

    if capability == HOPPER:
        with offline.compiling(capability) as compiled:
            launch()
        assert not sass.undefined_reads(compiled[0].asm["cubin"])  # outputs that were NaN on an H100
    check(
        launch,
        capability,
        # A tile's own sum of P V, added in float32, makes its wgmma wait; the Hopper path has no such wait.
        serialised=capability == HOPPER,
    )


@pytest.mark.skipif((triton_version() or ())[:2] not in ((3, 6), (3, 7)), reason="Gluon of another Triton")
@pytest.mark.parametrize("return_lse", [False, True] if FULL else [False])
@pytest.mark.parametrize("block_size", [128, None], ids=["sparse", "dense"])
@pytest.mark.parametrize("dim", [64, 128])
def test_hopper_attention(dim: int, block_size: int | None, return_lse: bool) -> None:
    """The loop over blocks spills nothing; what one warpgroup reloads once a tile is little beside its blocks."""
    from kernels.block_sparse_attention_fp8 import gluon

    q, k, vt, selection = operands(dim, block_size)
    with offline.compiling(HOPPER) as compiled:
        gluon.block_sparse_attention_fp8(q, k, vt, scales(), selection, 0, 0.1, bias(), BF16, return_lse)
    report = offline.report(compiled[0])
    loops = sass.inner_loops(compiled[0].asm["cubin"], "QGMMA.64x128x32")  # scores are computed there
    assert len(loops) == 2, "one for each consumer warpgroup"
    for loop in loops:
        assert not [instruction.text for instruction in loop if instruction.opcode.startswith(("STL", "LDL"))]
    assert report.spills <= (1 if return_lse else 3) * SPILLS_ALLOWED, str(report)
    assert report.registers == 168, str(report)  # the budget of 12 warps; setmaxnreg moves them to the consumers
    assert report.shared <= SHARED_LIMIT[HOPPER], str(report)
    assert not report.warnings, str(report)
    instructions, _ = sass.disassemble(compiled[0].asm["cubin"])
    assert sum("QGMMA" in instruction.opcode for instruction in instructions) >= 36
    assert not sass.undefined_reads(compiled[0].asm["cubin"])


@pytest.mark.parametrize("capability", [ADA, HOPPER], ids=["sm89", "sm90"])
@pytest.mark.parametrize("dim", [64, 128, 256] if FULL else [128])
def test_writing(dim: int, capability: tuple[int, int]) -> None:
    from kernels.fp8_heads import triton

    x = empty(1, LENGTH, KV_HEADS, dim, dtype=BF16).transpose(1, 2)
    arenas = (empty(KV_HEADS, LENGTH, dim), empty(KV_HEADS, dim, LENGTH))
    slots = empty(3, dtype=torch.int64)

    few = x[0, :, :3].transpose(0, 1)
    shifted = replace(scales(), k_shift=empty(KV_HEADS, dim, dtype=torch.float32))

    means = empty(KV_HEADS, dim, dtype=torch.float32)

    def launch() -> None:
        triton.quantize_heads(x, scales().k, None)
        triton.quantize_heads(x, scales().k, means)
        triton.key_bias(x, replace(shifted, q_mean=empty(HEADS, dim, dtype=torch.float32)), bias()[0], 0)
        for by in (scales(), shifted):
            triton.write_kv(x, x, by, *arenas, 0)
            triton.append_kv(few, few, by, *arenas, slots)
            triton.append_kv(few, few, by, *arenas, slots, run=4)

    check(launch, capability)


@pytest.mark.parametrize("capability", [ADA, HOPPER], ids=["sm89", "sm90"])
@pytest.mark.parametrize("dim", [64, 96, 128, 256] if FULL else [128])
def test_decode(dim: int, capability: tuple[int, int]) -> None:
    from kernels.decode_attention_fp8 import triton

    q = empty(3, HEADS, dim, dtype=BF16)
    arenas = (empty(KV_HEADS, LENGTH, dim), empty(KV_HEADS, dim, LENGTH))
    starts, lengths = empty(3, dtype=torch.int64), empty(3, dtype=torch.int32)
    for sinks in (None, empty(HEADS, dtype=BF16)):
        check(
            lambda sinks=sinks: triton.decode_attention_fp8(
                q, *arenas, scales(), starts, lengths, LENGTH, 0.1, None, sinks
            ),
            capability,
        )


@pytest.mark.parametrize("capability", [ADA, HOPPER], ids=["sm89", "sm90"])
@pytest.mark.parametrize("dim", [64, 96, 128, 256] if FULL else [128])
@pytest.mark.parametrize("members", [1, 8, 16, 32] if FULL else [1, 32])  # tiles of 16 to 128 queries
def test_decode_behind_a_prefix(members: int, dim: int, capability: tuple[int, int]) -> None:
    from kernels.decode_attention import Prefixes
    from kernels.decode_attention_fp8 import triton

    q = empty(32, HEADS, dim, dtype=BF16)
    arenas = (empty(KV_HEADS, LENGTH, dim), empty(KV_HEADS, dim, LENGTH))
    starts, lengths = empty(32, dtype=torch.int64), empty(32, dtype=torch.int32)
    prefixes = Prefixes(starts, lengths, empty(32, members, dtype=torch.int32), LENGTH)
    check(
        lambda: triton.decode_attention_fp8(q, *arenas, scales(), starts, lengths, LENGTH, 0.1, None, None, prefixes),
        capability,
    )


@pytest.mark.skipif((triton_version() or ())[:2] not in ((3, 6), (3, 7)), reason="Gluon of another Triton")
@pytest.mark.parametrize("dim", [64, 128] if FULL else [128])
@pytest.mark.parametrize(("members", "registers"), [(16, 128), (32, 168)])
def test_hopper_decode_behind_a_prefix(members: int, registers: int, dim: int) -> None:
    """registers: two programs of one warpgroup fit a multiprocessor, one of two warpgroups does."""
    from kernels.decode_attention import Prefixes
    from kernels.decode_attention_fp8 import gluon

    q = empty(32, HEADS, dim, dtype=BF16)
    arenas = (empty(KV_HEADS, LENGTH, dim), empty(KV_HEADS, dim, LENGTH))
    starts, lengths = empty(32, dtype=torch.int64), empty(32, dtype=torch.int32)
    prefixes = Prefixes(starts, lengths, empty(32, members, dtype=torch.int32), LENGTH)
    with offline.compiling(HOPPER) as compiled:
        gluon.decode_attention_fp8(q, *arenas, scales(), starts, lengths, LENGTH, 0.1, None, None, prefixes)
    [kernel] = [
        each for each in compiled if "QGMMA" in "".join(i.opcode for i in sass.disassemble(each.asm["cubin"])[0])
    ]
    report = offline.report(kernel)
    assert report.spills == 0, str(report)
    assert report.registers == registers, str(report)
    assert report.shared + 1024 <= SHARED_LIMIT[HOPPER] // (2 if registers == 128 else 1), str(report)
    assert not report.warnings, str(report)
    # PRMT .. 0x7632 and 0x7610 put a half into the lower half of a register; what stays above it is never read.
    undefined = sass.undefined_reads(kernel.asm["cubin"])
    assert not [text for text in undefined if not re.search(", 0x76(32|10), ", text) and not sass.clears_one_bit(text)]


@pytest.mark.parametrize("capability", [ADA, HOPPER], ids=["sm89", "sm90"])
@pytest.mark.parametrize("dim", [64, 96, 128, 256] if FULL else [128])
def test_sample_scores(dim: int, capability: tuple[int, int]) -> None:
    from kernels.sample_scores import triton

    q = empty(1, LENGTH, HEADS, dim, dtype=BF16).transpose(1, 2)
    k = empty(1, KV_HEADS, 2 * LENGTH, dim)[:, :, :LENGTH]
    check(lambda: triton.sample_scores(q, k, 0, 128, 8, 0.1, scales()), capability)


@pytest.mark.skipif((triton_version() or ())[:2] not in ((3, 6), (3, 7)), reason="Gluon of another Triton")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [FP8, BF16], ids=str)
def test_hopper_sample_scores(dtype: torch.dtype, dim: int) -> None:
    """fp8 products are summed in float16, and no wgmma is serialised."""
    from kernels.sample_scores import gluon

    q = empty(1, LENGTH, HEADS, dim, dtype=BF16).transpose(1, 2)
    k = empty(1, KV_HEADS, 2 * LENGTH, dim, dtype=dtype)
    with offline.compiling(HOPPER) as compiled:
        gluon.sample_scores(q, k, 0, 128, 8, 0.1, scales() if dtype == FP8 else None)
    report = offline.report(compiled[0])
    assert report.spills <= SPILLS_ALLOWED, str(report)
    assert report.shared <= SHARED_LIMIT[HOPPER], str(report)
    assert not report.warnings, str(report)
    # PRMT .. 0x7632 moves the upper of a pair of halves down; what stays above it is never read.
    undefined = sass.undefined_reads(compiled[0].asm["cubin"])
    assert not [text for text in undefined if ", 0x7632, " not in text and not sass.clears_one_bit(text)]
    products = [each.opcode for each in sass.disassemble(compiled[0].asm["cubin"])[0] if "GMMA" in each.opcode]
    assert products
    assert dtype != FP8 or all("F16.E4M3" in opcode for opcode in products)
