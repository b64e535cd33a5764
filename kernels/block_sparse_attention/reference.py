"""Block-sparse causal attention in plain torch: the specification, and what runs on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.block_selection import BlockSelection


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q [H, T, D] to k, v [H, K, D] where `visible` [H, T, K]; (out, lse), in float32 or wider."""
    compute = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q.to(compute), k.to(compute).mT) * scale
    scores = scores.masked_fill_(~visible, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = scores.sub_(lse.unsqueeze(-1)).exp_()
    return torch.matmul(weights, v.to(compute)).to(q.dtype), lse.float()


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection | None,
    query_start: int,
    block_size: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """See kernels.block_sparse_attention. Works a query block at a time on the keys that it keeps: no N x N tensor.

    Returns out [N, H, Lq, D] in q's dtype (a view of [N, Lq, H, D]) and lse float32 [N, H, Lq].
    """
    N, H, Lq, D = q.shape
    kv_head = (torch.arange(H, device=q.device) // (H // k.shape[1]))[:, None]
    out = torch.empty(N, Lq, H, D, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(N, H, Lq, dtype=torch.float32, device=q.device)
    offsets = torch.arange(block_size, device=q.device)
    for row in range(-(-Lq // block_size)):
        begin, end = row * block_size, min(Lq, (row + 1) * block_size)
        positions = torch.arange(query_start + begin, query_start + end, device=q.device)
        known = query_start + end  # keys past the last query of this block are never visible
        if selection is None:
            first = 0 if window is None else max(0, query_start + begin - window + 1)
            tokens = torch.arange(first, known, device=q.device).expand(N, H, -1)
        else:
            width = int(selection.counts[:, :, row].max())
            slots = torch.arange(width, device=q.device)
            blocks = selection.indices[:, :, row, :width].long()
            # A slot past the row's count points behind every query, where the causal mask hides it.
            blocks = torch.where(slots < selection.counts[:, :, row, None], blocks, known // block_size + 1)
            tokens = (blocks[..., None] * block_size + offsets).flatten(-2)
        visible = tokens[:, :, None, :] <= positions[:, None]
        if window is not None:
            visible &= tokens[:, :, None, :] > positions[:, None] - window
        inside = tokens.clamp(max=known - 1)
        for n in range(N):
            out[n, :, begin:end], lse[n, :, begin:end] = _softmax_attention(
                q[n, :, begin:end], k[n, kv_head, inside[n]], v[n, kv_head, inside[n]], visible[n], scale
            )
    return out, lse
