"""Block-sparse attention compiled for GPUs that are not there: what ptxas says of registers, spills and wgmma.

A subset by default; STEMLINE_FULL_COMPILE=1 compiles every type, head size and block size (half an hour on one core).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from kernels.block_selection import BlockSelection
from kernels.dispatch import triton_version
from tests.kernels import offline

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
AMPERE, ADA, HOPPER = (8, 0), (8, 9), (9, 0)
SHARED_LIMIT = {AMPERE: 163 * 1024, ADA: 99 * 1024, HOPPER: 227 * 1024}
# Bytes stored plus loaded. 16-bit types: values that live outside the main loop. float32 is for exactness: three-pass
# TF32 keeps two halves of every operand.
SPILLS_ALLOWED = {BF16: 128, FP16: 128, FP32: 1024}


@dataclass(frozen=True)
class Build:
    capability: tuple[int, int]
    dtype: torch.dtype
    head_dim: int
    block_size: int | None  # None: dense
    window: int | None = None
    lse: bool = False

    def __str__(self) -> str:
        name = f"sm{self.capability[0]}{self.capability[1]}-{str(self.dtype)[6:]}-{self.head_dim}"
        return f"{name}-{self.block_size or 'dense'}" + "-window" * bool(self.window) + "-lse" * self.lse


SUBSET = [
    Build(AMPERE, BF16, 128, 128),
    Build(AMPERE, FP32, 64, 16),
    Build(AMPERE, FP16, 96, None),
    Build(ADA, BF16, 256, 64),
    Build(HOPPER, BF16, 128, 128),
    Build(HOPPER, BF16, 128, None, window=4096),
    Build(HOPPER, FP16, 256, 128),
    Build(HOPPER, BF16, 64, 32),
    # As Gemma 4's global layers.
    Build(AMPERE, BF16, 512, 128),
    Build(HOPPER, BF16, 512, 128),
    # As the layers of gpt-oss, whose sinks ask for the log-sum-exp.
    *(Build(capability, BF16, 64, None, window=128, lse=True) for capability in (AMPERE, HOPPER)),
    Build(AMPERE, BF16, 64, 128, lse=True),
]
GRID = [
    Build(capability, dtype, head_dim, block_size)
    for capability in (AMPERE, ADA, HOPPER)
    for dtype in (BF16, FP16, FP32)
    for head_dim in (64, 96, 128, 256, 512)
    for block_size in (16, 32, 64, 128, 256, None)
]
FULL = os.environ.get("STEMLINE_FULL_COMPILE") == "1"


def arguments(build: Build, length: int = 1024) -> tuple[torch.Tensor, torch.Tensor, BlockSelection | None]:
    """q as a view of [N, L, H, D], k as an extent of an arena; no memory behind them."""
    q = torch.empty(1, length, 8, build.head_dim, dtype=build.dtype, device="meta").transpose(1, 2)
    k = torch.empty(1, 2, 2 * length, build.head_dim, dtype=build.dtype, device="meta")[:, :, :length]
    if build.block_size is None:
        return q, k, None
    rows = length // build.block_size
    indices = torch.empty(1, 8, rows, 4, dtype=torch.int32, device="meta")
    return q, k, BlockSelection(indices, torch.empty(1, 8, rows, dtype=torch.int32, device="meta"))


def check(launch: Callable[[], object], build: Build) -> None:
    for report in offline.compile_reports(launch, build.capability):
        assert report.spills <= SPILLS_ALLOWED[build.dtype], str(report)
        assert report.shared <= SHARED_LIMIT[build.capability], str(report)
        # C7510, C7512, C7515 ...: wgmma serialised. It costs more than any spill.
        assert not report.warnings, str(report)


@pytest.mark.parametrize("build", GRID if FULL else SUBSET, ids=str)
def test_portable_kernel(build: Build) -> None:
    from kernels.block_sparse_attention import triton

    q, k, selection = arguments(build)
    block_size = build.block_size or 128
    check(
        lambda: triton.block_sparse_attention(q, k, k, selection, 0, block_size, 0.1, build.window, FULL or build.lse),
        build,
    )


@pytest.mark.skipif((triton_version() or ())[:2] not in ((3, 6), (3, 7)), reason="Gluon of another Triton")
@pytest.mark.parametrize("return_lse", [False, True] if FULL else [True])
@pytest.mark.parametrize("block_size", [128, None], ids=["sparse", "dense"])
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(BF16, 128), (FP16, 128), (BF16, 64), (FP16, 64)] if FULL else [(BF16, 128), (FP16, 64)]
)
def test_hopper_kernel(dtype: torch.dtype, head_dim: int, block_size: int | None, return_lse: bool) -> None:
    from kernels.block_sparse_attention import gluon

    build = Build(HOPPER, dtype, head_dim, block_size)
    q, k, selection = arguments(build)
    with offline.compiling(HOPPER) as compiled:
        gluon.block_sparse_attention(q, k, k, selection, 0, 0.1, return_lse)
    report = offline.report(compiled[0])
    assert report.spills == 0, str(report)
    assert report.registers == 168, str(report)  # the budget of 12 warps; setmaxnreg moves them to the consumers
    assert report.shared <= SHARED_LIMIT[HOPPER], str(report)
    assert not report.warnings, str(report)
