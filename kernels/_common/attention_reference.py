"""Block-sparse causal attention in plain torch: the specification of both precisions, and what runs on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels._common.selection import BlockSelection


def attend_to_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection | None,
    query_start: int,
    block_size: int,
    scale: float,
    window: int | None,
    round_weights: Callable[[Tensor], Tensor] | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See kernels.block_sparse_attention. Works a query block at a time on the keys that it keeps: no N x N tensor.

    round_weights: what becomes of the unnormalised probabilities before they are summed and meet the values (fp8).
    bias: float32 [N, H, Lk], added to the products q k^T before they are scaled.
    Returns out [N, H, Lq, D] in q's dtype (a view of [N, Lq, H, D]) and lse float32 [N, H, Lq].
    """
    N, H, Lq, D = q.shape
    kv_heads = k.shape[1]
    if selection is not None:
        k, v = k[:, :, : query_start + Lq].contiguous(), v[:, :, : query_start + Lq].contiguous()
    out = torch.empty(N, Lq, H, D, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(N, H, Lq, dtype=torch.float32, device=q.device)
    # Heads that keep different numbers of blocks are padded to the same width by keys that the mask hides.
    uneven = selection is not None and bool((selection.counts != selection.counts[:1, :1]).any())
    for row in range(-(-Lq // block_size)):
        begin, end = row * block_size, min(Lq, (row + 1) * block_size)
        positions = torch.arange(query_start + begin, query_start + end, device=q.device)
        if selection is None:
            first = 0 if window is None else max(0, query_start + begin - window + 1)
            tokens = torch.arange(first, query_start + end, device=q.device).expand(N, 1, -1)
            keys, values = k[:, :, first : query_start + end], v[:, :, first : query_start + end]
            # Heads of one KV head are stacked as further rows, so that keys are not repeated.
            queries = q[:, :, begin:end].reshape(N, kv_heads, -1, D)
        else:
            tokens, keys, values = _gather(k, v, selection, row, block_size, query_start + end)
            queries = q[:, :, begin:end]
            tokens_seen = tokens.clamp(max=query_start + end - 1)
        if window is None and not uneven:
            tokens = tokens[..., -block_size:]  # only keys of the query block itself can be hidden
        visible = tokens[..., None, :] <= positions[:, None]
        if window is not None:
            visible &= tokens[..., None, :] > positions[:, None] - window
        if selection is None:
            visible = visible.repeat(1, 1, H // kv_heads, 1)
        added = None
        if bias is not None:
            if selection is None:
                added = bias[:, :, first : query_start + end].unflatten(1, (kv_heads, -1))
                added = added.repeat_interleave(end - begin, 2)
            else:
                added = bias.gather(2, tokens_seen)[:, :, None]
        part, part_lse = _softmax_attention(queries, keys, values, visible, scale, round_weights, added)
        out[:, :, begin:end] = part.reshape(N, H, end - begin, D)
        lse[:, :, begin:end] = part_lse.reshape(N, H, end - begin)
    return out, lse


def _gather(
    k: Tensor, v: Tensor, selection: BlockSelection, row: int, block_size: int, known: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The kept keys of one query block: positions [N, H, K], keys and values [N, H, K, D].

    known: tokens up to the block's last query; a slot past the row's count gets positions behind it, where the causal
    mask hides them.
    """
    N, H = selection.counts.shape[:2]
    counts = selection.counts[:, :, row, None]
    slots = torch.arange(int(counts.max()), device=k.device)
    blocks = torch.where(slots < counts, selection.indices[:, :, row, : len(slots)].long(), known // block_size + 1)
    tokens = (blocks[..., None] * block_size + torch.arange(block_size, device=k.device)).flatten(-2)
    inside = tokens.clamp(max=known - 1)
    # Indices into [N * Hkv * Lk, D]: index_select copies whole rows, eight times as fast as indexing by three tensors.
    heads = torch.arange(N * H, device=k.device).view(N, H, 1) // (H // k.shape[1])
    rows = heads * k.shape[2] + inside
    keys, values = (x.reshape(-1, x.shape[-1]).index_select(0, rows.flatten()) for x in (k, v))
    return tokens, keys.unflatten(0, rows.shape), values.unflatten(0, rows.shape)


def _softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    round_weights: Callable[[Tensor], Tensor] | None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q [..., T, D] to k, v [..., K, D]: (out, lse), computed in float32 or wider.

    visible: bool [..., T, C] says which of the last C keys are seen; all keys before those are.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q.to(compute) * scale, k.to(compute).mT)
    if bias is not None:
        scores += bias * scale
    scores[..., -visible.shape[-1] :].masked_fill_(~visible, -torch.inf)
    largest = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(largest).exp_()
    if round_weights is not None:
        weights = round_weights(weights)
    total = weights.sum(dim=-1, keepdim=True)
    out = torch.matmul(weights, v.to(compute)) / total
    return out.to(q.dtype), (largest + total.log()).squeeze(-1).float()
