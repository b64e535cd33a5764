# mypy: disable-error-code="no-untyped-def"
"""The product of Stem's offset sums in Triton: block scores, causal tiles only."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _load_tile(
    source, row, row_end, at, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """[ROWS, COLUMNS] from a row-major [row_end, WIDTH]; zeros past the last row. source: descriptor or pointer."""
    if TMA:
        tile = source.load([row, at])
    else:
        r = row + tl.arange(0, ROWS)[:, None]
        pointers = source + r.to(tl.int64) * WIDTH + at + tl.arange(0, COLUMNS)[None, :]
        tile = tl.load(pointers, mask=r < row_end, other=0.0)
    return tile


@triton.jit
def _causal_columns(m, rows, first_row, BM: tl.constexpr, BN: tl.constexpr):
    """Column tiles with causal entries for the query blocks [m, m + BM) of heads of `rows` blocks each."""
    return tl.cdiv(first_row + tl.minimum(m % rows + BM, rows), BN)


@triton.jit(
    do_not_specialize=[
        "rows", "first_row", "n_keys", "query_end", "key_end", "max_key_blocks", "head_tiles",
    ]
)  # fmt: skip
def score_kernel(
    query_sums, key_sums, value_term, scores, rows, first_row, n_keys, row_stride, query_end, key_end, max_key_blocks,
    head_tiles, full, edge, corner,
    GROUP: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    FILL: tl.constexpr,
):  # fmt: skip
    """Scores of BM query blocks against BN key blocks. The query blocks of the heads that share a KV head form one
    matrix; program p takes its causal tile p, of which every (n, KV head) has `head_tiles`. With FILL the tiles of a
    row also write the -inf to their right."""
    kv_head = tl.program_id(0) // head_tiles
    column = tl.program_id(0) % head_tiles
    m0 = 0
    columns = _causal_columns(m0, rows, first_row, BM, BN)
    while column >= columns:
        column -= columns
        m0 += BM
        columns = _causal_columns(m0, rows, first_row, BM, BN)
    query_row = kv_head * (GROUP * rows) + m0
    key_row = kv_head * max_key_blocks + column * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for at in range(0, STRIDE * D, BK):
        # A query sum at offset g meets the key sum at offset STRIDE - 1 - g. BK divides D: a step is in one g.
        g = at // D
        x = _load_tile(query_sums, query_row, query_end, at, STRIDE * D, BM, BK, TMA)
        y = _load_tile(key_sums, key_row, key_end, (STRIDE - 1 - 2 * g) * D + at, STRIDE * D, BN, BK, TMA)
        acc = tl.dot(x, y.T, acc, input_precision=PRECISION)
    m = m0 + tl.arange(0, BM)
    row = m % rows
    j = column * BN + tl.arange(0, BN)
    value = tl.load(value_term + kv_head.to(tl.int64) * n_keys + j, mask=j < n_keys, other=0.0)
    # 1 / (pairs * sqrt(D)): pairs of full blocks, of a part-filled last row, and of that row with its own block.
    last = tl.where((j == n_keys - 1)[None, :], corner, edge)
    factor = tl.where((row == rows - 1)[:, None], last, full)
    score = tl.where(j[None, :] <= first_row + row[:, None], acc * factor + value[None, :], float("-inf"))
    target = scores + query_row.to(tl.int64) * row_stride + tl.arange(0, BM)[:, None] * row_stride
    exists = (m < GROUP * rows)[:, None]
    # Up to the padded width, whose divisibility is known: 16-byte stores.
    tl.store(target + j[None, :], score, mask=exists & (j < row_stride)[None, :])
    if FILL:
        for right in range((column + columns) * BN, n_keys, columns * BN):
            hidden = right + tl.arange(0, BN)[None, :]
            nothing = tl.full((BM, BN), float("-inf"), tl.float32)
            tl.store(target + hidden, nothing, mask=exists & (hidden < row_stride))


def choose_tile(sums: torch.dtype, head_dim: int, hopper: bool) -> dict[str, Any]:
    # BK must divide the head dimension: 32 serves 96 and every other multiple of 32.
    narrow = next(width for width in (64, 32, 16, 8, 4, 2, 1) if head_dim % width == 0)
    if sums == torch.bfloat16:
        # The wider tile needs more shared memory than earlier cards have.
        wide = {"BN": 256, "num_stages": 4} if hopper else {"BN": 128, "num_stages": 3}
        return {"BM": 128, "BK": narrow, "num_warps": 8, **wide}
    return {"BM": 64, "BN": 64, "BK": min(narrow, 32), "num_warps": 4, "num_stages": 3}


@lru_cache(maxsize=256)
def count_head_tiles(rows: int, first_row: int, group: int, BM: int, BN: int) -> int:
    """Causal tiles of the heads that share a KV head; counts as `_causal_columns` does."""
    return sum(-(-(first_row + min(m % rows + BM, rows)) // BN) for m in range(0, group * rows, BM))


@lru_cache(maxsize=256)
def pair_factors(last_row: int, last_block: int, block_size: int, stride: int, scale: float) -> tuple[float, ...]:
    """scale / pairs for full blocks, for a last row of last_row tokens with full key blocks, and for that row with the
    last key block, of last_block tokens."""

    def counts(tokens: int) -> list[int]:
        return [len(range(offset, tokens, stride)) for offset in range(stride)]

    full, last, own = counts(block_size), counts(last_row), counts(last_block)
    sides = ((full, full), (last, full), (last, own))
    pairs = [sum(a * b for a, b in zip(left, reversed(right), strict=True)) for left, right in sides]
    return tuple(scale / max(count, 1) for count in pairs)
