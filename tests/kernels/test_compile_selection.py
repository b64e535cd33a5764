"""Block scores, block selection and decode attention compiled for GPUs that are not there: registers and spills.

A subset by default; STEMLINE_FULL_COMPILE=1 compiles every type and head size.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from kernels.block_selection import triton as triton_selection
from kernels.block_selection import triton_share
from kernels.decode_attention import Prefixes
from kernels.decode_attention import triton as triton_decode
from kernels.oam_scores import KeySummary
from kernels.oam_scores import triton as triton_oam
from kernels.sample_scores import triton as triton_sample
from tests.kernels import offline

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
AMPERE, HOPPER = (8, 0), (9, 0)
SHARED_LIMIT = {AMPERE: 163 * 1024, HOPPER: 227 * 1024}
# Bytes stored plus loaded, outside of the main loops. float32 is for exactness, not for speed.
SPILLS_ALLOWED = {BF16: 320, FP16: 320, FP32: 4096}
FULL = os.environ.get("STEMLINE_FULL_COMPILE") == "1"
TYPES = [(dtype, dim) for dtype in (BF16, FP16, FP32) for dim in (64, 96, 128, 256)] if FULL else [(BF16, 128)]
# As Gemma 4's global layers. Samples of float32 keys of such heads run on the reference.
LARGE = [(dtype, 512) for dtype in (BF16, FP16)] if FULL else [(BF16, 512)]


def prompt(dtype: torch.dtype, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k as a projection leaves them: [N, L, H, D] seen as [N, H, L, D]."""
    q = torch.empty(1, 1024, 32, head_dim, dtype=dtype).transpose(1, 2)
    return q, torch.empty(1, 1024, 8, head_dim, dtype=dtype).transpose(1, 2)


def oam(dtype: torch.dtype, head_dim: int) -> None:
    q, k = prompt(dtype, head_dim)
    sums = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # key_sums_dtype, on a GPU
    summary = KeySummary.allocate(1, 8, 1024, head_dim, block_size=128, stride=16, device=q.device, dtype=sums)
    triton_oam.oam_scores(q, k, k, 0, 128, 16, 0.2, 0.1, summary)


def sample(dtype: torch.dtype, head_dim: int) -> None:
    q, k = prompt(dtype, head_dim)
    triton_sample.sample_scores(q, k, 0, 128, 8, 0.1, None)


def decode(dtype: torch.dtype, head_dim: int, sinks: torch.Tensor | None = None) -> None:
    arena = torch.empty(8, 4096, head_dim, dtype=dtype)
    starts, lengths = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)
    q = torch.empty(4, 32, head_dim, dtype=dtype)
    triton_decode.decode_attention(q, arena, arena, starts, lengths, 4096, 1.0, None, sinks)


def decode_with_sinks(dtype: torch.dtype, head_dim: int) -> None:
    decode(dtype, head_dim, torch.empty(32, dtype=dtype))


def decode_one_kv_head(dtype: torch.dtype, head_dim: int) -> None:
    """Every multiprocessor has a share of it: the most that there is to merge."""
    arena = torch.empty(1, 1 << 17, head_dim, dtype=dtype)
    starts, lengths = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    q = torch.empty(1, 8, head_dim, dtype=dtype)
    triton_decode.decode_attention(q, arena, arena, starts, lengths, 1 << 17, 1.0, None, None)


def decode_behind_prefix(dtype: torch.dtype, head_dim: int) -> None:
    """Tiles of 16, 32 and as many queries as one holds."""
    arena = torch.empty(8, 4096, head_dim, dtype=dtype)
    starts, lengths = torch.zeros(32, dtype=torch.int64), torch.zeros(32, dtype=torch.int32)
    q = torch.empty(32, 32, head_dim, dtype=dtype)
    for members in (1, 8, 32):
        table = torch.zeros(32, members, dtype=torch.int32)
        prefixes = Prefixes(starts, lengths, table, 1 << 17)
        triton_decode.decode_attention(q, arena, arena, starts, lengths, 4096, 1.0, None, None, prefixes)


def check(launch: Callable[[], object], capability: tuple[int, int], spills: int, kernels: int) -> None:
    reports = offline.compile_reports(launch, capability)
    assert len(reports) == kernels
    for report in reports:
        assert report.spills <= spills, str(report)
        assert report.shared <= SHARED_LIMIT[capability], str(report)
        assert not any("C7512" in line for line in report.warnings), report.log


@pytest.mark.parametrize("capability", [AMPERE, HOPPER], ids=["sm80", "sm90"])
@pytest.mark.parametrize(("dtype", "head_dim"), TYPES, ids=str)
@pytest.mark.parametrize(
    ("launch", "kernels"),
    [(oam, 3), (sample, 1), (decode, 2), (decode_with_sinks, 2), (decode_one_kv_head, 2), (decode_behind_prefix, 5)],
)
def test_compiles(
    launch: Callable[[torch.dtype, int], None],
    kernels: int,
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int],
) -> None:
    check(lambda: launch(dtype, head_dim), capability, SPILLS_ALLOWED[dtype], kernels)


@pytest.mark.parametrize("capability", [AMPERE, HOPPER], ids=["sm80", "sm90"])
@pytest.mark.parametrize(("dtype", "head_dim"), LARGE, ids=str)
@pytest.mark.parametrize(
    ("launch", "kernels"),
    [(oam, 3), (sample, 1), (decode_one_kv_head, 2), *([(decode_behind_prefix, 5)] if FULL else [])],
)
def test_large_heads_compile(
    launch: Callable[[torch.dtype, int], None],
    kernels: int,
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int],
) -> None:
    check(lambda: launch(dtype, head_dim), capability, SPILLS_ALLOWED[dtype], kernels)


@pytest.mark.parametrize("capability", [AMPERE, HOPPER], ids=["sm80", "sm90"])
@pytest.mark.parametrize("n_keys", [1024, 8192] if FULL else [1024])
def test_selection_compiles(n_keys: int, capability: tuple[int, int]) -> None:
    scores, budgets = torch.empty(1, 32, 8, n_keys), torch.empty(8, dtype=torch.int32)
    check(lambda: triton_selection.select_blocks(scores, budgets, n_keys - 8, 4, 4, 300) and None, capability, 0, 1)


@pytest.mark.parametrize("capability", [AMPERE, HOPPER], ids=["sm80", "sm90"])
@pytest.mark.parametrize(
    ("heads", "n_keys"), [(32, 1024), (32, 8192), *([(28, 2048), (8, 8192), (64, 8192), (128, 1024)] if FULL else [])]
)
def test_shared_budgets_compile(heads: int, n_keys: int, capability: tuple[int, int]) -> None:
    """16 warps have 128 registers each; without spills."""
    scores, budgets = torch.empty(1, heads, 8, n_keys), torch.empty(8, dtype=torch.int32)
    check(lambda: triton_share.share_budgets(scores, budgets, n_keys - 8, 4, 4, 0.2, 4.0), capability, 0, 1)


def test_a_chunk_compiles_nothing_anew() -> None:
    """Its budgets are those of its prompt's from anywhere on: the first document of a length waited for a kernel."""
    scores, budgets = torch.empty(1, 32, 8, 1024), torch.empty(64, dtype=torch.int32)
    with offline.compiling(HOPPER) as compiled:
        for first in (0, 3):
            here = budgets[first : first + 8]
            triton_selection.select_blocks(scores, here, 1016, 4, 4, 300)
            triton_share.share_budgets(scores, here, 1016, 4, 4, 0.2, 4.0)
    assert len({kernel.hash for kernel in compiled}) == 2
