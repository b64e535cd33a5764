"""Portable GPU path of block-sparse attention in plain Triton: sm_80 and later, every type, head size and block size.

One program computes one tile of query rows. The keys around the diagonal go first, with the causal mask, so that the
running maximum is finite before any unmasked block; then the kept blocks (or, dense, every earlier key) without
any mask. On Hopper operands are read by TMA through host-made descriptors, elsewhere through pointers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import device
from kernels._common.attention import allocate_output, dot_precision
from kernels._common.attention_triton import Tiling, hide, keys_before, launch, place_of_tile, token_of_step
from kernels._common.selection import BlockSelection
from kernels._common.sizes import power_of_2
from kernels._common.tma import tma_obstacle, tma_strides


@triton.jit
def _load(
    tensor, stride_n, stride_h, stride_t, n, head, token, limit,
    TOKENS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """[TOKENS, BLOCK_D] of one head from `token` on; zeros past D and, where BOUNDED, past token `limit`."""
    if TMA:
        tile = tensor.load([n, head, token, 0]).reshape([TOKENS, BLOCK_D])
    else:
        offsets = tl.arange(0, TOKENS)
        dims = tl.arange(0, BLOCK_D)
        # Each term in 64 bits: at a million tokens a head of [N, L, H, D] lies beyond 2^31 elements.
        start = n.to(tl.int64) * stride_n + head.to(tl.int64) * stride_h + tl.cast(token, tl.int64) * stride_t
        pointers = tensor + start + offsets[:, None] * stride_t + dims[None, :]
        if BOUNDED and D < BLOCK_D:
            tile = tl.load(pointers, (token + offsets < limit)[:, None] & (dims < D)[None, :], other=0.0)
        elif BOUNDED:
            tile = tl.load(pointers, (token + offsets < limit)[:, None], other=0.0)
        elif D < BLOCK_D:
            tile = tl.load(pointers, (dims < D)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def _step(
    acc, m, total, q, key_tile, value_tile, positions, keys, log2_scale, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over one tile of keys. m and total are in the log2 domain of scores * log2_scale."""
    s = tl.dot(q, tl.trans(key_tile), input_precision=PRECISION)
    s = hide(s, positions, keys, window, CAUSAL, WINDOW)
    m_next = tl.maximum(m, tl.max(s, 1) * log2_scale)
    # With a window a row may not have met a visible key yet: -inf - -inf would be NaN.
    shift = tl.where(m_next == -float("inf"), 0.0, m_next) if WINDOW else m_next
    weights = tl.math.exp2(s * log2_scale - shift[:, None])
    shrink = tl.math.exp2(m - shift)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(value_tile.dtype), value_tile, acc, input_precision=PRECISION)
    return acc, m_next, total


# Lengths change from call to call: specialising on them would only compile the kernel again.
@triton.jit(do_not_specialize=["n_queries", "query_start", "rows", "max_blocks", "window"])
def block_sparse_attention_kernel(
    q, k, v, out, lse, indices, counts,
    q_stride_n, q_stride_h, q_stride_t, k_stride_n, k_stride_h, k_stride_t,
    v_stride_n, v_stride_h, v_stride_t, out_stride_n, out_stride_h, out_stride_t,
    n_queries, query_start, rows, max_blocks, log2_scale, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, DENSE: tl.constexpr,
    WINDOW: tl.constexpr, WITH_LSE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, k, v, out: pointers, or with TMA descriptors of [N, heads, tokens, D]. `rows` counts BLOCK_SIZE-row query
    blocks; dense calls use BLOCK_SIZE = TILE_M."""
    TILES_PER_ROW: tl.constexpr = BLOCK_SIZE // TILE_M
    n, head, kv_head, tile = place_of_tile(rows, KV_HEADS, GROUP, TILES_PER_ROW)
    row = tile // TILES_PER_ROW
    flat_head = n * (KV_HEADS * GROUP) + head

    local = tile * TILE_M
    if local >= n_queries:
        return
    first = query_start + local  # position of the tile's first query
    known = query_start + n_queries
    positions = first + tl.arange(0, TILE_M)
    query = _load(q, q_stride_n, q_stride_h, q_stride_t, n, head, local, n_queries, TILE_M, D, BLOCK_D, TMA, True)
    m = tl.full([TILE_M], -float("inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, BLOCK_D], tl.float32)

    # Keys on the diagonal. Those past the last query are masked too: they lie behind every query.
    diagonal = first // TILE_N * TILE_N if DENSE else query_start + row * BLOCK_SIZE
    for token in tl.range(diagonal, tl.minimum(first + TILE_M, known), TILE_N, num_stages=1):
        key_tile = _load(k, k_stride_n, k_stride_h, k_stride_t, n, kv_head, token, known, TILE_N, D, BLOCK_D, TMA, True)
        value_tile = _load(
            v, v_stride_n, v_stride_h, v_stride_t, n, kv_head, token, known, TILE_N, D, BLOCK_D, TMA, True
        )
        keys = token + tl.arange(0, TILE_N)
        acc, m, total = _step(
            acc, m, total, query, key_tile, value_tile, positions, keys, log2_scale, window, True, WINDOW, PRECISION
        )

    # Everything before: no causal mask, no bounds.
    PER_BLOCK: tl.constexpr = BLOCK_SIZE // TILE_N
    begin, end, kept = keys_before(
        indices, counts, flat_head * rows + row, max_blocks, first, diagonal, window, PER_BLOCK, TILE_N, DENSE, WINDOW
    )
    for step in range(begin, end):
        token = token_of_step(step, kept, BLOCK_SIZE, PER_BLOCK, TILE_N, DENSE)
        key_tile = _load(
            k, k_stride_n, k_stride_h, k_stride_t, n, kv_head, token, known, TILE_N, D, BLOCK_D, TMA, False
        )
        value_tile = _load(
            v, v_stride_n, v_stride_h, v_stride_t, n, kv_head, token, known, TILE_N, D, BLOCK_D, TMA, False
        )
        keys = token + tl.arange(0, TILE_N)
        acc, m, total = _step(
            acc, m, total, query, key_tile, value_tile, positions, keys, log2_scale, window, False, WINDOW, PRECISION
        )

    offsets = local + tl.arange(0, TILE_M)
    if WITH_LSE:
        natural = (m + tl.math.log2(total)) * 0.6931471805599453
        tl.store(lse + flat_head.to(tl.int64) * n_queries + offsets, natural, mask=offsets < n_queries)
    acc = acc / total[:, None]
    if TMA:
        out.store([n, head, local, 0], acc.to(out.dtype).reshape([1, 1, TILE_M, BLOCK_D]))
    else:
        dims = tl.arange(0, BLOCK_D)
        start = n.to(tl.int64) * out_stride_n + head.to(tl.int64) * out_stride_h + local.to(tl.int64) * out_stride_t
        pointers = out + start + tl.arange(0, TILE_M)[:, None] * out_stride_t + dims[None, :]
        inside = (offsets < n_queries)[:, None] & (dims < D)[None, :]
        tl.store(pointers, acc.to(out.dtype.element_ty), mask=inside)


def choose_tiling(
    capability: tuple[int, int], dtype: torch.dtype, block_d: int, block_size: int | None, tma: bool
) -> Tiling:
    """Tile sizes that fit registers and shared memory. block_size None: dense, the tile is free."""
    limit = 128 if block_size is None else block_size
    large_memory = capability in ((8, 0), (8, 7)) or capability[0] in (9, 10)  # 163 KiB and more, else 99 KiB
    tma = tma and capability[0] == 9 and limit >= 64
    if block_d > 256:  # eight warps share a tile's accumulator
        if dtype == torch.float32:
            return Tiling(16, 16, 8, 1)
        return Tiling(64, 32, 8, 2, tma) if tma else Tiling(min(32, limit), min(32, limit), 8, 1 + large_memory)
    if dtype == torch.float32:  # three-pass TF32: for exactness, not speed
        m, n, stages = (32, 32, 2) if block_d <= 128 else (16, 16, 2)
    elif capability >= (9, 0) and large_memory:
        m, n, stages = 128, 128 if block_d <= 128 else 64, 2
    elif block_d <= 128:
        m, n, stages = 128, 64, 3 if large_memory else 2
    else:
        m, n, stages = 64, 64 if large_memory else 16, 2
    m, n = min(m, limit), min(n, limit)
    warps = 8 if m == 128 or (block_d > 128 and m == n == 64) else 4
    return Tiling(m, n, warps, stages, tma and m >= 64 and n >= 64)


def _descriptor(tensor: Tensor, tokens: int, block_d: int) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), tma_strides(tensor), [1, 1, tokens, block_d])


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection | None,
    query_start: int,
    block_size: int,
    scale: float,
    window: int | None,
    return_lse: bool,
    tma: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """See kernels.block_sparse_attention, which has checked shapes, types and the device. `tma=False` keeps Hopper on
    the pointer path."""
    D = q.shape[-1]
    known = query_start + q.shape[2]
    block_d = max(16, power_of_2(D))
    out, lse = allocate_output(q, q.dtype, return_lse)
    tma = tma and not tma_obstacle(q, k, v, out)
    tiling = choose_tiling(
        device.capability(q.device), q.dtype, block_d, block_size if selection is not None else None, tma
    )
    operands: tuple[Tensor | TensorDescriptor, ...] = (q, k, v, out)
    if tiling.tma:
        operands = (
            _descriptor(q, tiling.tile_m, block_d),
            _descriptor(k[:, :, :known], tiling.tile_n, block_d),
            _descriptor(v[:, :, :known], tiling.tile_n, block_d),
            _descriptor(out, tiling.tile_m, block_d),
        )
    launch(
        block_sparse_attention_kernel, tiling, operands, (q, k, v, out), lse, (),
        selection, query_start, block_size, block_d, scale, window,
        TMA=tiling.tma,
        PRECISION=dot_precision(q),
    )  # fmt: skip
    return out, lse
