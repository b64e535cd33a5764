"""The check of an attention benchmark's case: sampled query blocks against float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.block_selection import BlockSelection
from tools.benchmark._attention_fp8 import Fp8Layer
from tools.benchmark._row_errors import BLOCK


def error_of(
    call: Callable[[], object],
    selection: BlockSelection | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fp8: Fp8Layer | None,
) -> tuple[float, float]:
    """Relative error over sampled query blocks, and that of eager attention on them: in bfloat16, or with the roundings
    of fp8. float64 is the truth."""
    out = call()
    assert isinstance(out, Tensor)
    if not bool(out.isfinite().all()):
        return float("nan"), 0.0
    heads, length = q.shape[1:3]
    n, group = -(-length // BLOCK), q.shape[1] // k.shape[1]
    sums = torch.zeros(3, dtype=torch.float64, device=q.device)
    samples = {(h % heads, b) for h, b in [(0, n - 1), (5, n // 2), (17, n // 3), (31, min(7, n - 1)), (30, 0), (2, 1)]}
    for head, block in sorted(samples):
        begin, end = block * BLOCK, min(length, (block + 1) * BLOCK)
        if selection is None:
            keys = torch.arange(end, device=q.device)
        else:
            kept = selection.indices[0, head, block, : int(selection.counts[0, head, block])].long()
            keys = (kept[:, None] * BLOCK + torch.arange(BLOCK, device=q.device)).flatten()
            keys = keys[keys < end]
        hidden = keys[None] > torch.arange(begin, end, device=q.device)[:, None]
        tile = (q[0, head, begin:end], k[0, head // group, keys], v[0, head // group, keys], hidden)
        true = _attend(*tile, torch.float64)
        eager = fp8.emulate(head, *tile) if fp8 else _attend(*tile, torch.bfloat16)
        got = out[0, head, begin:end].double()
        sums += torch.stack([(got - true).square().sum(), (eager - true).square().sum(), true.square().sum()])
    relative = (sums[:2] / sums[2]).sqrt()
    return float(relative[0]), float(relative[1])


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Eager attention of q [T, D] to k, v [K, D] in `dtype`, the softmax in float32 or better."""
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).to(torch.promote_types(dtype, torch.float32))
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1).to(dtype) @ v).double()
