"""Output-aware block scores in Triton (sm_80 and newer): one pass over q, k and v, then one causal GEMM.

    summarise   per (head, block): sums of the tokens at each offset of the stride, from q and from new keys; log of
                the largest value norm of each token group, from new values. Memory-bound: q, k, v are read once.
    value_term  per KV head: running statistics and the value term of every key block.
    score       antidiagonal pairs of the sums as one GEMM over stride * D; only tiles with causal entries are made.

A long prompt is cut into slices of heads, and the second and third step of a slice run beside the first of the next.

Nothing depends on where a chunk begins: an offset sum is one program's, the GEMM adds up stride * D in one order
whatever the tile, and the statistics are int64 fixed-point sums, which no order of addition changes.

bfloat16 inputs keep their sums in bfloat16: the rounding is that of the inputs themselves, and the sums are read
from memory by tensor cores at half the size. Other inputs keep float32 sums and multiply in TF32 (three-term TF32
for float32 inputs).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import device as kernels_device
from kernels.block_scores import KeySummary
from kernels.block_scores import triton_gemm as gemm
from kernels.block_scores.reference import MIN_NORM, STD_EPS
from kernels.sizes import ceil_div, power_of_2

# Fixed point of the statistics: |log norm| < 89 in float32, so a million groups leave the squares below 2^62.
FIXED_POINT = tl.constexpr(float(1 << 28))
MAX_SQUARE = tl.constexpr(3.0e38)
# Pairs of blocks (over all heads) from which on a call is cut into slices, and how many slices.
OVERLAP_PAIRS = 1 << 23
OVERLAP_SLICES = int(os.environ.get("STEMLINE_OAM_SLICES", "4"))


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


def empty_scores(N: int, H: int, rows: int, n_keys: int, device: torch.device) -> Tensor:
    """[N, H, rows, n_keys] with rows 16 scores apart or a multiple of it: kernels are compiled once for such strides,
    and not again for other prompt lengths."""
    return torch.empty(N, H, rows, -(-n_keys // 16) * 16, dtype=torch.float32, device=device)[..., :n_keys]


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which offset sums of inputs of `dtype` are kept (see the module's docstring)."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


@lru_cache(maxsize=16)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


@dataclass(frozen=True)
class _Call:
    """What the launches of one call share: blocks and tokens of the chunk, lengths of a block and of a stride."""

    rows: int
    query_tokens: int
    first_row: int
    n_keys: int
    key_tokens: int
    block_size: int
    stride: int
    value_weight: float
    scale: float
    precision: str
    fill_above: bool

    def summarise(
        self, q: Tensor, k: Tensor, v: Tensor, query_sums: Tensor, key_sums: Tensor, log_norms: Tensor, known: int,
        held: int,
    ) -> None:  # fmt: skip
        """Write the sums of all queries, and sums and norms of the key blocks from `known` on; k and v begin with key
        block `held`."""
        H, KV, key_blocks = q.shape[1], k.shape[1], self.n_keys - known
        # The kernel counts blocks and tokens from the first key that it was given.
        summarise_kernel[(H + 2 * KV, max(self.rows, key_blocks), q.shape[0])](
            q, k, v, query_sums, key_sums[:, :, held:], log_norms[:, :, held:],
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            self.rows, self.query_tokens, known - held, key_blocks, self.key_tokens - held * self.block_size,
            key_sums.shape[2], H=H, KV_HEADS=KV, D=q.shape[3], BLOCK=self.block_size, STRIDE=self.stride,
            MIN_SQUARE=MIN_NORM**2, num_warps=4,
        )  # fmt: skip

    def score(
        self, query_sums: Tensor, key_sums: Tensor, log_norms: Tensor, value_term: Tensor, scores: Tensor, beside: bool
    ) -> None:
        """Write value_term and scores. beside: leave room on every multiprocessor for another kernel."""
        N, KV, max_blocks, _, D = key_sums.shape
        groups, device, group = self.block_size // self.stride, scores.device, scores.shape[1] // KV
        # From 32 blocks on, the layout and with it the order of a block's sum does not depend on the width.
        width = max(32, min(power_of_2(self.n_keys), 8192 // groups))
        value_term_kernel[(N * KV,)](
            log_norms, value_term, self.n_keys, max_blocks, self.value_weight,
            GROUPS=groups, WIDTH=width, EPS=STD_EPS, num_warps=max(1, min(16, width * groups // 256)),
        )  # fmt: skip
        tma = kernels_device.capability(device) >= (9, 0)
        tile = gemm.choose_tile(key_sums.dtype, D, tma)
        head_tiles = gemm.count_head_tiles(self.rows, self.first_row, group, tile["BM"], tile["BN"])
        tiles = N * KV * head_tiles
        if beside:
            # A fourth stage takes so much shared memory that a multiprocessor holds one program only.
            tile["num_stages"] = 4
        keys = key_sums.view(N * KV * max_blocks, self.stride * D)
        last_row = (self.query_tokens - 1) % self.block_size + 1
        last_block = (self.key_tokens - 1) % self.block_size + 1
        gemm.score_kernel[(min(tiles, kernels_device.multiprocessors(device)) if beside else tiles,)](
            TensorDescriptor.from_tensor(query_sums, [tile["BM"], tile["BK"]]) if tma else query_sums,
            TensorDescriptor.from_tensor(keys, [tile["BN"], tile["BK"]]) if tma else keys,
            value_term, scores, self.rows, self.first_row, self.n_keys, scores.stride(2), query_sums.shape[0],
            keys.shape[0], max_blocks, tiles, head_tiles,
            *gemm.pair_factors(last_row, last_block, self.block_size, self.stride, self.scale),
            GROUP=group, D=D, STRIDE=self.stride, TMA=tma, PRECISION=self.precision, FILL=self.fill_above, **tile,
        )  # fmt: skip


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
    """See kernels.block_scores.oam_scores. block_size and stride must be powers of two."""
    if block_size & (block_size - 1) or stride & (stride - 1):
        raise ValueError(f"the Triton path needs powers of two, got block_size={block_size}, stride={stride}")
    N, H, query_tokens, D = q.shape
    kv_heads, device = k.shape[1], q.device
    end = query_start + query_tokens
    rows, n_keys = ceil_div(query_tokens, block_size), ceil_div(end, block_size)
    precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
    call = _Call(
        rows, query_tokens, query_start // block_size, n_keys, end, block_size, stride, value_weight, scale, precision,
        fill_above,
    )  # fmt: skip
    key_sums, log_norms, known, held = summary.key_sums, summary.log_norms, summary.blocks, key_start // block_size
    query_sums = torch.empty(N * H * rows, stride * D, dtype=key_sums.dtype, device=device)
    value_term = torch.empty(N * kv_heads, n_keys, dtype=torch.float32, device=device)
    scores = empty_scores(N, H, rows, n_keys, device)
    slices = _slices(N, kv_heads, H * rows * n_keys, device)
    if slices == 1:
        call.summarise(q, k, v, query_sums, key_sums, log_norms, known, held)
        call.score(query_sums, key_sums, log_norms, value_term, scores, False)
    else:
        main, side = torch.cuda.current_stream(device), _side_stream(device)
        kv, group = kv_heads // slices, H // kv_heads
        for first in range(0, kv_heads, kv):
            some, heads = slice(first, first + kv), slice(first * group, (first + kv) * group)
            part = (query_sums[heads.start * rows : heads.stop * rows], key_sums[:, some], log_norms[:, some])
            call.summarise(q[:, heads], k[:, some], v[:, some], *part, known, held)
            side.wait_event(main.record_event())
            with torch.cuda.stream(side):
                call.score(*part, value_term[some], scores[:, heads], True)
        main.wait_stream(side)
    summary.blocks = max(known, end // block_size)
    return scores


def _slices(batch: int, kv_heads: int, pairs: int, device: torch.device) -> int:
    """Into how many slices of heads a call is cut, so that the sums of a slice are multiplied (tensor cores) while the
    next slice is read (memory). pairs: of blocks, over all heads; few are not worth the launches."""
    worth = batch == 1 and pairs >= OVERLAP_PAIRS and kernels_device.capability(device) >= (9, 0)
    return OVERLAP_SLICES if worth and device.type == "cuda" and kv_heads % OVERLAP_SLICES == 0 else 1
