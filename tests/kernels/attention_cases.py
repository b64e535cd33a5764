"""The semantics of block-sparse attention as cases, and the check that every implementation has to pass.

The truth is float64 attention over the kept blocks; the allowed error is that of eager attention in the case's own
type, which rounds the same operands and the same probabilities.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.block_selection import BlockSelection
from kernels.block_sparse_attention import block_sparse_attention

# A flash kernel rounds unnormalised probabilities and in another order: about the eager error, never far above it.
# float32 on tensor cores is three TF32 products with 3 x 11 bits.
ALLOWED = {torch.bfloat16: 1.25, torch.float16: 1.25, torch.float32: 8.0}


@dataclass(frozen=True)
class Case:
    """One call. `keep`: share of earlier blocks kept at random besides the diagonal; None is dense."""

    queries: int
    start: int = 0
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    block_size: int = 128
    dtype: torch.dtype = torch.bfloat16
    keep: float | None = 0.5
    window: int | None = None
    unknown: int = 0  # tokens of the K/V extent past the last query, holding NaN: reading them spoils the output
    scale: float | None = None
    seed: int = field(default=0, compare=False)

    def __str__(self) -> str:
        parts = [f"{self.queries}@{self.start}", f"{self.batch}x{self.heads}/{self.kv_heads}x{self.head_dim}"]
        parts += [f"B{self.block_size}", str(self.dtype).removeprefix("torch.")]
        parts += ["dense" if self.keep is None else f"keep{self.keep}"]
        parts += [f"window{self.window}"] if self.window else []
        return "-".join(parts)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ODD = [1, 127, 128, 129, 1000, random.Random(7).randrange(1001, 2000), random.Random(8).randrange(300, 600)]
GPU_CASES = [
    *(Case(length, unknown=40) for length in ODD),
    *(Case(length, keep=None, unknown=40, heads=8, kv_heads=1) for length in ODD),
    *(Case(700, start=1024, head_dim=dim, dtype=dtype) for dim in (64, 96, 128, 256, 512) for dtype in (BF16, FP16)),
    *(Case(300, start=256, head_dim=dim, dtype=FP32, block_size=64) for dim in (64, 96, 128, 256, 512)),
    *(Case(300, start=256, head_dim=dim, dtype=FP32, keep=None) for dim in (64, 256, 512)),
    *(Case(777, start=512, block_size=block, head_dim=64) for block in (16, 32, 64, 256)),
    *(Case(777, start=512, block_size=block, head_dim=256) for block in (32, 64, 256)),
    *(Case(777, start=512, block_size=block, head_dim=dim) for dim, block in ((512, 32), (384, 64), (512, 256))),
    Case(500, batch=3, heads=6, kv_heads=6),
    Case(640, batch=2, heads=32, kv_heads=8, keep=0.25, scale=0.2),
    Case(900, start=333, keep=None),
    Case(900, start=128, keep=None, head_dim=64),
    Case(900, start=128, window=300),
    *(Case(900, start=77, keep=None, window=129, head_dim=dim) for dim in (256, 512)),
    Case(600, window=1, block_size=64, dtype=FP32),
]


def random_selection(case: Case, generator: torch.Generator) -> BlockSelection:
    """Random earlier blocks and the diagonal; entries past the counts hold garbage, as the contract allows."""
    rows = -(-case.queries // case.block_size)
    i = torch.arange(rows)[:, None] + case.start // case.block_size
    j = torch.arange(int(i[-1]) + 1)
    mask = torch.rand(case.batch, case.heads, rows, len(j), generator=generator) < (case.keep or 0.0)
    mask = (mask | (i == j)) & (j <= i)
    counts = mask.sum(-1)
    columns = torch.where(mask, j, len(j)).sort(-1).values[..., : int(counts.max())]
    indices = torch.where(torch.arange(columns.shape[-1]) < counts[..., None], columns, 1 << 20)
    return BlockSelection(indices.int().contiguous(), counts.int())


def make_inputs(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor, BlockSelection | None]:
    """q as transformers hands it over (a view of [N, L, H, D]), k and v as views into an arena [N, Hkv, T, D]."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    known = case.start + case.queries

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    q = normal(case.batch, case.queries, case.heads, case.head_dim).to(device).transpose(1, 2)
    extent = (case.batch, case.kv_heads, known + case.unknown, case.head_dim)
    arena = torch.full((2, *extent[:2], extent[2] + 24, case.head_dim), torch.nan, dtype=case.dtype)
    k, v = arena[0, :, :, 16:-8], arena[1, :, :, 16:-8]
    k[:, :, :known] = normal(*extent[:2], known, case.head_dim)
    v[:, :, :known] = normal(*extent[:2], known, case.head_dim)
    k[:, :, known // 3 : known // 3 + 20] *= 3  # the running maximum has to grow late
    arena = arena.to(device)
    selection = random_selection(case, generator) if case.keep is not None else None
    if selection is not None:
        selection = BlockSelection(selection.indices.to(device), selection.counts.to(device))
    return q, arena[0, :, :, 16:-8], arena[1, :, :, 16:-8], selection


def visible_keys(case: Case, selection: BlockSelection | None, device: str) -> Tensor:
    """bool [N, H, Lq, known]."""
    known = case.start + case.queries
    position = torch.arange(case.start, known, device=device)[:, None]
    key = torch.arange(known, device=device)
    visible = (key <= position).expand(case.batch, case.heads, -1, -1)
    if case.window is not None:
        visible = visible & (key > position - case.window)
    if selection is not None:
        blocks = selection.to_mask(-(-known // case.block_size))
        tokens = blocks.repeat_interleave(case.block_size, 2).repeat_interleave(case.block_size, 3)
        visible = visible & tokens[:, :, : case.queries, :known]
    return visible


def eager(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention in q's type, the softmax in float32 or better, as transformers' eager attention does it."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.mT * scale).to(torch.promote_types(q.dtype, torch.float32))
    scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).to(q.dtype) @ v, scores.logsumexp(-1)


def check(case: Case, impl: str, device: str) -> None:
    """Run `case` through `impl` and compare with float64. Call with torch.empty poisoned (see conftest)."""
    q, k, v, selection = make_inputs(case, device)
    before = [t.clone() for t in (q, k, v)]
    out, lse = block_sparse_attention(
        q,
        k,
        v,
        selection,
        query_start=case.start,
        block_size=case.block_size,
        scale=case.scale,
        window=case.window,
        return_lse=True,
        impl=impl,  # type: ignore[arg-type]
    )
    for tensor, copy in zip((q, k, v), before, strict=True):
        assert torch.equal(tensor.nan_to_num(), copy.nan_to_num()), "an input was written to"
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert out.transpose(1, 2).is_contiguous()

    known = case.start + case.queries
    k, v = k[:, :, :known], v[:, :, :known]
    visible = visible_keys(case, selection, device)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    true_out, true_lse = eager(q.double(), k.double(), v.double(), visible, scale)
    eager_out, _ = eager(q, k, v, visible, scale)
    assert not out.isnan().any(), "rows were not written"
    norm = true_out.norm()
    error, allowed = (out.double() - true_out).norm() / norm, (eager_out.double() - true_out).norm() / norm
    # Where every query sees one key, eager attention is exact: a rounding of the output is always allowed.
    rounding = torch.finfo(case.dtype).eps / 4
    limit = ALLOWED[case.dtype] * max(float(allowed), rounding)
    assert error <= limit, f"error {error:.2e}, eager {allowed:.2e}"
    # The largest single error too, so that one wrong row does not drown in the norm. A maximum scatters more: twice.
    worst, allowed = (out.double() - true_out).abs().amax(), (eager_out.double() - true_out).abs().amax()
    limit = 2 * ALLOWED[case.dtype] * max(float(allowed), rounding * float(true_out.abs().amax()))
    assert worst <= limit, f"largest error {worst:.2e}, eager {allowed:.2e}"
    # Scores accumulate in float32 whatever the type, so that a sum of products is wrong by a few roundings of the sum
    # of their magnitudes, and a log-sum-exp by no more than its worst score (and its own roundings).
    magnitude = (q.abs().double() @ k.abs().double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT) * scale
    magnitude = magnitude.masked_fill(~visible, 0).amax(-1) + true_lse.abs()
    lse_limit = ALLOWED[torch.float32] * torch.finfo(torch.float32).eps * magnitude
    excess = ((lse.double() - true_lse).abs() / lse_limit).amax()
    assert excess <= 1, f"log-sum-exp: {excess:.2f} of the allowed error"
