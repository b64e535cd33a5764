# mypy: disable-error-code="no-untyped-def"
"""What the portable attention kernels, in 16 bits and in fp8, share: order of tiles, keys before a tile, launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels._common.attention import LOG2E
from kernels._common.selection import BlockSelection
from kernels._common.sizes import ceil_div


@triton.jit
def place_of_tile(rows, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TILES_PER_ROW: tl.constexpr):
    """(batch, query head, KV head, tile) of this program: all tiles of the heads that share a KV head are adjacent
    (their K and V stay in L2), longest first."""
    per_kv_head = rows * (TILES_PER_ROW * GROUP)
    lane = tl.program_id(0) // per_kv_head
    rest = tl.program_id(0) % per_kv_head
    kv_head = lane % KV_HEADS
    return lane // KV_HEADS, kv_head * GROUP + rest % GROUP, kv_head, rows * TILES_PER_ROW - 1 - rest // GROUP


@triton.jit
def keys_before(
    indices, counts, flat_row, max_blocks, first, diagonal, window,
    PER_BLOCK: tl.constexpr, TILE_N: tl.constexpr, DENSE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """(begin, end, kept): the steps of TILE_N keys before a tile's diagonal keys, and where its kept blocks stand."""
    if DENSE:
        begin = tl.maximum(first - window + 1, 0) // TILE_N if WINDOW else 0
        end = diagonal // TILE_N
        kept = indices
    else:
        begin = 0
        end = (tl.load(counts + flat_row) - 1) * PER_BLOCK
        kept = indices + flat_row.to(tl.int64) * max_blocks
    return begin, end, kept


@triton.jit
def token_of_step(
    step, kept, BLOCK_SIZE: tl.constexpr, PER_BLOCK: tl.constexpr, TILE_N: tl.constexpr, DENSE: tl.constexpr
):  # fmt: skip
    """The first key of a step of `keys_before`."""
    token = step * TILE_N
    if not DENSE:
        token = tl.load(kept + step // PER_BLOCK) * BLOCK_SIZE + step % PER_BLOCK * TILE_N
    return token


@triton.jit
def hide(s, positions, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Scores [M, N] with those that the causal mask or the window hides at -inf."""
    if CAUSAL:
        s = tl.where(keys[None, :] <= positions[:, None], s, -float("inf"))
    if WINDOW:
        s = tl.where(keys[None, :] > positions[:, None] - window, s, -float("inf"))
    return s


@dataclass(frozen=True)
class Tiling:
    """Query rows and keys of a tile, warps of a program, depth of the load pipeline; tma: whether TMA reads them."""

    tile_m: int
    tile_n: int
    warps: int
    stages: int
    tma: bool = False


def launch(
    kernel: Any,
    tiling: Tiling,
    operands: tuple[Any, ...],
    tensors: tuple[Tensor, ...],
    lse: Tensor | None,
    own: tuple[Any, ...],
    selection: BlockSelection | None,
    query_start: int,
    block_size: int,
    block_d: int,
    scale: float,
    window: int | None,
    **constants: Any,
) -> None:
    """Run `kernel` on `operands`: the tensors q, k, v and out, or descriptors of them.

    own: further arguments, after the selection. block_d: D padded. constants: what the kernel alone takes.
    """
    q, k, _, out = tensors
    N, H, Lq, D = q.shape
    if selection is None:
        block_size = tiling.tile_m
        indices = counts = out  # stand-ins, never read
    else:
        indices, counts = selection.indices.contiguous(), selection.counts.contiguous()
    rows = ceil_div(Lq, block_size)
    kernel[(N * H * rows * (block_size // tiling.tile_m),)](
        *operands,
        out if lse is None else lse,
        indices,
        counts,
        *own,
        *(stride for tensor in tensors for stride in tensor.stride()[:3]),
        Lq,
        query_start,
        rows,
        indices.shape[-1],
        scale * LOG2E,
        0 if window is None else window,
        KV_HEADS=k.shape[1],
        GROUP=H // k.shape[1],
        D=D,
        BLOCK_D=block_d,
        BLOCK_SIZE=block_size,
        TILE_M=tiling.tile_m,
        TILE_N=tiling.tile_n,
        DENSE=selection is None,
        WINDOW=window is not None,
        WITH_LSE=lse is not None,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **constants,
    )
