"""Output-aware block scores in Triton (sm_80 and newer): one pass over q, k and v, then one causal GEMM.

    summarise   per (head, block): sums of the tokens at each offset of the stride, from q and from new keys; log of
                the largest value norm of each token group, from new values. Memory-bound: q, k, v are read once.
    value_term  per KV head: running statistics and the value term of every key block.
    score       antidiagonal pairs of the sums as one GEMM over stride * D; only tiles with causal entries are made.

Nothing depends on where a chunk begins: an offset sum is one program's, the GEMM adds up stride * D in one order
whatever the tile, and the statistics are int64 fixed-point sums, which no order of addition changes.

bfloat16 inputs keep their sums in bfloat16: the rounding is that of the inputs themselves, and the sums are read
from memory by tensor cores at half the size. Other inputs keep float32 sums and multiply in TF32 (three-term TF32
for float32 inputs).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import device as kernels_device
from kernels._common.scores import empty_scores
from kernels._common.sizes import ceil_div, power_of_2
from kernels.oam_scores import KeySummary
from kernels.oam_scores import triton_gemm as gemm
from kernels.oam_scores.reference import MIN_NORM, STD_EPS

# Fixed point of the statistics: |log norm| < 89 in float32, so a million groups leave the squares below 2^62.
FIXED_POINT = tl.constexpr(float(1 << 28))
MAX_SQUARE = tl.constexpr(3.0e38)


@triton.jit
def _sum_offsets(source, stride_t, target, valid, D: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """target[g, d] = sum of source[t, d] over the tokens t < min(BLOCK, valid) with t % STRIDE == g."""
    offset = tl.arange(0, STRIDE)[:, None]
    d = tl.arange(0, triton.next_power_of_2(D))[None, :]
    sums = tl.zeros((STRIDE, triton.next_power_of_2(D)), tl.float32)
    # Unrolled: all loads are in flight at once, and the additions stay inside a thread.
    for first in tl.static_range(0, BLOCK, STRIDE):
        token = first + offset
        sums += tl.load(source + token * stride_t + d, mask=(token < valid) & (d < D), other=0.0).to(tl.float32)
    tl.store(target + offset * D + d, sums.to(target.dtype.element_ty), mask=d < D)


@triton.jit
def _log_norms(
    source, stride_t, target, valid,
    D: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, MIN_SQUARE: tl.constexpr,
):  # fmt: skip
    """target[g] = log of the largest norm among tokens [g * STRIDE, (g + 1) * STRIDE), NaN if some do not exist."""
    GROUPS: tl.constexpr = BLOCK // STRIDE
    token = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, triton.next_power_of_2(D))[None, :]
    x = tl.load(source + token * stride_t + d, mask=(token < valid) & (d < D), other=0.0).to(tl.float32)
    largest = tl.max(tl.reshape(tl.sum(x * x, axis=1), (GROUPS, STRIDE)), axis=1)
    log_norm = 0.5 * tl.log(tl.minimum(tl.maximum(largest, MIN_SQUARE), MAX_SQUARE))
    g = tl.arange(0, GROUPS)
    tl.store(target + g, tl.where((g + 1) * STRIDE <= valid, log_norm, float("nan")))


@triton.jit(do_not_specialize=["rows", "query_tokens", "first_key_block", "key_blocks", "key_tokens", "max_key_blocks"])
def summarise_kernel(
    q, k, v, query_sums, key_sums, log_norms,
    q_stride_n, q_stride_h, q_stride_t, k_stride_n, k_stride_h, k_stride_t, v_stride_n, v_stride_h, v_stride_t,
    rows, query_tokens, first_key_block, key_blocks, key_tokens, max_key_blocks,
    H: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    MIN_SQUARE: tl.constexpr,
):  # fmt: skip
    """Program (head, block, n); heads [0, H) are q's, then k's, then v's. Heads run fastest: in the [N, L, H, D]
    memory of a projection's output the heads of a token lie side by side."""
    head = tl.program_id(0)
    block = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    if head < H:
        if block < rows:
            source = q + n * q_stride_n + head.to(tl.int64) * q_stride_h + (block * BLOCK).to(tl.int64) * q_stride_t
            target = query_sums + ((n * H + head) * rows + block) * (STRIDE * D)
            _sum_offsets(source, q_stride_t, target, query_tokens - block * BLOCK, D, BLOCK, STRIDE)
    elif block < key_blocks:
        block += first_key_block
        token = (block * BLOCK).to(tl.int64)
        valid = key_tokens - block * BLOCK
        if head < H + KV_HEADS:
            head -= H
            source = k + n * k_stride_n + head.to(tl.int64) * k_stride_h + token * k_stride_t
            target = key_sums + ((n * KV_HEADS + head) * max_key_blocks + block) * (STRIDE * D)
            _sum_offsets(source, k_stride_t, target, valid, D, BLOCK, STRIDE)
        else:
            head -= H + KV_HEADS
            source = v + n * v_stride_n + head.to(tl.int64) * v_stride_h + token * v_stride_t
            norms = log_norms + ((n * KV_HEADS + head) * max_key_blocks + block) * (BLOCK // STRIDE)
            _log_norms(source, v_stride_t, norms, valid, D, BLOCK, STRIDE, MIN_SQUARE)


@triton.jit(do_not_specialize=["n_keys", "max_key_blocks"])
def value_term_kernel(
    log_norms, value_term, n_keys, max_key_blocks, value_weight,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """One program per (n, KV head): value_term[j] = value_weight * mean over the groups of block j of max(0, z)."""
    head = tl.program_id(0).to(tl.int64)
    norms = log_norms + head * max_key_blocks * GROUPS
    out = value_term + head * n_keys
    sum_before = tl.full((), 0, tl.int64)
    square_before = tl.full((), 0, tl.int64)
    for first in range(0, n_keys, WIDTH):
        block = first + tl.arange(0, WIDTH)
        group = tl.arange(0, GROUPS)[None, :]
        x = tl.load(norms + block[:, None] * GROUPS + group, mask=block[:, None] < n_keys, other=float("nan"))
        exists = x == x
        wide = tl.where(exists, x, 0.0).to(tl.float64)
        in_block = tl.sum((wide * FIXED_POINT).to(tl.int64), axis=1)
        squares_in_block = tl.sum((wide * wide * FIXED_POINT).to(tl.int64), axis=1)
        total = sum_before + tl.cumsum(in_block, axis=0)
        square_total = square_before + tl.cumsum(squares_in_block, axis=0)
        in_this = tl.sum(exists.to(tl.int32), axis=1)
        # Only the last block of a prompt has incomplete groups.
        count = tl.maximum(block * GROUPS + in_this, 1).to(tl.float64)
        mean = total.to(tl.float64) / FIXED_POINT / count
        variance = tl.maximum(square_total.to(tl.float64) / FIXED_POINT / count - mean * mean, 0.0)
        z = (wide - mean[:, None]).to(tl.float32) / (tl.sqrt(variance.to(tl.float32)) + EPS)[:, None]
        term = tl.sum(tl.where(exists, tl.maximum(z, 0.0), 0.0), axis=1) / tl.maximum(in_this, 1)
        tl.store(out + block, value_weight * term, mask=block < n_keys)
        sum_before += tl.sum(in_block, axis=0)
        square_before += tl.sum(squares_in_block, axis=0)


def oam_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start: int,
    block_size: int,
    stride: int,
    value_weight: float,
    scale: float,
    summary: KeySummary,
    key_start: int = 0,
    fill_above: bool = True,
) -> Tensor:
    """See kernels.oam_scores.oam_scores. block_size and stride must be powers of two."""
    if block_size & (block_size - 1) or stride & (stride - 1):
        raise ValueError(f"the Triton path needs powers of two, got block_size={block_size}, stride={stride}")
    N, H, query_tokens, D = q.shape
    kv_heads, device = k.shape[1], q.device
    end = query_start + query_tokens
    rows, n_keys = ceil_div(query_tokens, block_size), ceil_div(end, block_size)
    max_key_blocks = summary.key_sums.shape[2]
    key_blocks = n_keys - summary.blocks
    # The kernel counts blocks and tokens from the first key that it was given.
    held = key_start // block_size

    query_sums = torch.empty(N * H * rows, stride * D, dtype=summary.key_sums.dtype, device=device)
    value_term = torch.empty(N * kv_heads, n_keys, dtype=torch.float32, device=device)
    scores = empty_scores(N, H, rows, n_keys, device)

    summarise_kernel[(H + 2 * kv_heads, max(rows, key_blocks), N)](
        q, k, v, query_sums, summary.key_sums[:, :, held:], summary.log_norms[:, :, held:],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        rows, query_tokens, summary.blocks - held, key_blocks, end - key_start, max_key_blocks,
        H=H, KV_HEADS=kv_heads, D=D, BLOCK=block_size, STRIDE=stride, MIN_SQUARE=MIN_NORM**2, num_warps=4,
    )  # fmt: skip
    summary.blocks = max(summary.blocks, end // block_size)

    groups = block_size // stride
    # From 32 blocks on, the layout and with it the order of a block's sum does not depend on the width.
    width = max(32, min(power_of_2(n_keys), 8192 // groups))
    value_term_kernel[(N * kv_heads,)](
        summary.log_norms, value_term, n_keys, max_key_blocks, value_weight,
        GROUPS=groups, WIDTH=width, EPS=STD_EPS, num_warps=max(1, min(16, width * groups // 256)),
    )  # fmt: skip

    key_sums = summary.key_sums.view(N * kv_heads * max_key_blocks, stride * D)
    tma = kernels_device.capability(device) >= (9, 0)
    group, first_row = H // kv_heads, query_start // block_size
    tile = gemm.choose_tile(key_sums.dtype, D, tma)
    head_tiles = gemm.count_head_tiles(rows, first_row, group, tile["BM"], tile["BN"])
    last_row, last_block = (query_tokens - 1) % block_size + 1, (end - 1) % block_size + 1
    gemm.score_kernel[(N * kv_heads * head_tiles,)](
        TensorDescriptor.from_tensor(query_sums, [tile["BM"], tile["BK"]]) if tma else query_sums,
        TensorDescriptor.from_tensor(key_sums, [tile["BN"], tile["BK"]]) if tma else key_sums,
        value_term, scores, rows, first_row, n_keys, scores.stride(2), query_sums.shape[0], key_sums.shape[0],
        max_key_blocks, head_tiles, *gemm.pair_factors(last_row, last_block, block_size, stride, scale),
        GROUP=group, D=D, STRIDE=stride, TMA=tma, PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        FILL=fill_above, **tile,
    )  # fmt: skip
    return scores
