"""Portable GPU path of fp8 block-sparse attention in plain Triton: sm_89 and later, every head size and block size.

Works like kernels.block_sparse_attention.triton. The rows of a key tile are loaded in the order in which the values
are stored (kernels.fp8_heads), so that scores and values agree on what a column is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import device
from kernels._common.attention import allocate_output
from kernels._common.attention_triton import Tiling, hide, keys_before, launch, place_of_tile, token_of_step
from kernels._common.fp8 import HeadScales, join_bias
from kernels._common.fp8_triton import key_at
from kernels._common.selection import BlockSelection
from kernels._common.sizes import power_of_2

WEIGHT_BITS = tl.constexpr(8.0)  # P times 2^8: e4m3 then covers 2^-17 .. 1 of the row's largest


@triton.jit
def _step(
    acc, m, total, q, k, vt, bias, k_stride_t, v_stride_d, token, positions, known, factor, window,
    TILE_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys [token, token + TILE_N) of one head; 16 divides token. CAUSAL: with causal mask and
    bounds. bias: None, or where this head's begins. m and total are in the log2 domain of scores * factor, total times
    2^WEIGHT_BITS."""
    place = tl.arange(0, TILE_N)
    dims = tl.arange(0, BLOCK_D)
    keys = token + key_at(place)
    inside = tl.full([TILE_N], True, tl.int1)
    if CAUSAL:
        inside = keys < known
    k_pointers = k + keys.to(tl.int64)[:, None] * k_stride_t + dims[None, :]
    # Stored values: the row of a dimension may lie 2^31 elements away from the first.
    v_pointers = vt + dims.to(tl.int64)[:, None] * v_stride_d + (token + place)[None, :]
    if CAUSAL or D < BLOCK_D:
        real = dims < D
        key_tile = tl.load(k_pointers, inside[:, None] & real[None, :], other=0.0)
        # The group of the last key is read whole, so that Triton may load 16 bytes at a time.
        stored = token + place < (known + 15) // 16 * 16
        value_tile = tl.load(v_pointers, real[:, None] & stored[None, :], other=0.0)
    else:
        key_tile = tl.load(k_pointers)
        value_tile = tl.load(v_pointers)
    s = tl.dot(q, tl.trans(key_tile))
    if bias is not None:
        s += (tl.load(bias + keys, inside, other=0.0) if CAUSAL else tl.load(bias + keys))[None, :]
    s = hide(s, positions, keys, window, CAUSAL, WINDOW)
    m_next = tl.maximum(m, tl.max(s, 1) * factor)
    # With a window a row may not have met a visible key yet: -inf - -inf would be NaN.
    shift = tl.where(m_next == -float("inf"), 0.0, m_next) if WINDOW else m_next
    weights = tl.math.exp2(s * factor - (shift - WEIGHT_BITS)[:, None])
    shrink = tl.math.exp2(m - shift)
    # Of P before it is rounded: read back from e4m3, ptxas 12.8 takes it from registers that were never written.
    total = total * shrink + tl.sum(weights, 1)
    weights = weights.to(tl.float8e4nv)
    # A fresh sum for each tile: Hopper's fp8 tensor cores truncate what they add to a sum that has grown.
    acc = tl.dot(weights, tl.trans(value_tile), acc * shrink[:, None], max_num_imprecise_acc=TILE_N)
    return acc, m_next, total


# Lengths change from call to call: specialising on them would only compile the kernel again.
@triton.jit(do_not_specialize=["n_queries", "query_start", "rows", "max_blocks", "window", "bias_stride_h"])
def block_sparse_attention_fp8_kernel(
    q, k, vt, out, lse, indices, counts, q_scale, k_scale, v_scale, bias,
    bias_stride_h,
    q_stride_n, q_stride_h, q_stride_t, k_stride_n, k_stride_h, k_stride_t,
    v_stride_n, v_stride_h, v_stride_d, out_stride_n, out_stride_h, out_stride_t,
    n_queries, query_start, rows, max_blocks, log2_scale, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, DENSE: tl.constexpr,
    WINDOW: tl.constexpr, WITH_LSE: tl.constexpr,
):  # fmt: skip
    """`rows` counts BLOCK_SIZE-row query blocks; dense calls use BLOCK_SIZE = TILE_M."""
    TILES_PER_ROW: tl.constexpr = BLOCK_SIZE // TILE_M
    n, head, kv_head, tile = place_of_tile(rows, KV_HEADS, GROUP, TILES_PER_ROW)
    row = tile // TILES_PER_ROW
    flat_head = n * (KV_HEADS * GROUP) + head

    local = tile * TILE_M
    if local >= n_queries:
        return
    first = query_start + local  # position of the tile's first query
    known = query_start + n_queries
    offsets = local + tl.arange(0, TILE_M)
    positions = query_start + offsets
    dims = tl.arange(0, BLOCK_D)
    inside = (offsets < n_queries)[:, None] & (dims < D)[None, :]
    q += n.to(tl.int64) * q_stride_n + head.to(tl.int64) * q_stride_h
    k += n.to(tl.int64) * k_stride_n + kv_head.to(tl.int64) * k_stride_h
    vt += n.to(tl.int64) * v_stride_n + kv_head.to(tl.int64) * v_stride_h
    query = tl.load(q + offsets.to(tl.int64)[:, None] * q_stride_t + dims[None, :], inside, other=0.0)
    if bias is not None:
        bias += flat_head.to(tl.int64) * bias_stride_h
    factor = tl.load(q_scale + head) * tl.load(k_scale + kv_head) * log2_scale
    m = tl.full([TILE_M], -float("inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, BLOCK_D], tl.float32)

    # Keys on the diagonal. Those past the last query are masked too: they lie behind every query.
    diagonal = first // TILE_N * TILE_N if DENSE else (query_start // BLOCK_SIZE + row) * BLOCK_SIZE
    for token in tl.range(diagonal, tl.minimum(first + TILE_M, known), TILE_N, num_stages=1):
        acc, m, total = _step(
            acc, m, total, query, k, vt, bias, k_stride_t, v_stride_d, token, positions, known, factor, window,
            TILE_N, D, BLOCK_D, True, WINDOW,
        )  # fmt: skip

    # Everything before: no causal mask, no bounds.
    PER_BLOCK: tl.constexpr = BLOCK_SIZE // TILE_N
    begin, end, kept = keys_before(
        indices, counts, flat_head * rows + row, max_blocks, first, diagonal, window, PER_BLOCK, TILE_N, DENSE, WINDOW
    )
    for index in range(begin, end):
        token = token_of_step(index, kept, BLOCK_SIZE, PER_BLOCK, TILE_N, DENSE)
        acc, m, total = _step(
            acc, m, total, query, k, vt, bias, k_stride_t, v_stride_d, token, positions, known, factor, window,
            TILE_N, D, BLOCK_D, False, WINDOW,
        )  # fmt: skip

    if WITH_LSE:
        natural = (m - WEIGHT_BITS + tl.math.log2(total)) * 0.6931471805599453
        tl.store(lse + flat_head.to(tl.int64) * n_queries + offsets, natural, mask=offsets < n_queries)
    acc = acc * (tl.load(v_scale + kv_head) / total)[:, None]
    out += n.to(tl.int64) * out_stride_n + head.to(tl.int64) * out_stride_h
    pointers = out + offsets.to(tl.int64)[:, None] * out_stride_t + dims[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=inside)


def choose_tiling(capability: tuple[int, int], block_d: int, block_size: int | None) -> Tiling:
    """Tile sizes that fit registers and shared memory (99 KiB on sm_89). block_size None: dense, the tile is free."""
    limit = 128 if block_size is None else block_size
    hopper = capability[0] == 9
    # D 256: an accumulator and a tile's own sum of 128 rows each would spill.
    m = 128 if block_d <= 128 else 64
    n = 128 if hopper and block_d == 128 else 64
    m, n = min(m, limit), min(n, limit)
    return Tiling(m, n, 8 if m == 128 or block_d > 128 else 4, 3 if block_d <= 128 else 2)


def block_sparse_attention_fp8(
    q: Tensor,
    k: Tensor,
    vt: Tensor,
    scales: HeadScales,
    selection: BlockSelection | None,
    query_start: int,
    block_size: int,
    scale: float,
    window: int | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """See kernels.block_sparse_attention_fp8, which has checked shapes, types and the device."""
    block_d = max(32, power_of_2(q.shape[-1]))
    out, lse = allocate_output(q, dtype, return_lse)
    tiling = choose_tiling(device.capability(q.device), block_d, block_size if selection is not None else None)
    tensors = (q, k, vt, out)
    # As numbers that are added, [N, H, T]: as one more product, which the Hopper path makes of the parts, ptxas 12.8
    # gives the weights registers that it never writes.
    known = query_start + q.shape[2]
    added = None if bias is None else join_bias(bias[:, :, :, :known], q.shape[1] // k.shape[1])
    of_bias = (added, 0 if added is None else known)
    launch(
        block_sparse_attention_fp8_kernel, tiling, tensors, tensors, lse,
        (scales.q, scales.k, scales.v, *of_bias), selection, query_start, block_size, block_d, scale, window,
    )  # fmt: skip
    return out, lse
