"""Block selection in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common.selection import BlockSelection


def select_blocks(
    scores: Tensor, budgets: Tensor, first_row: int, sink_blocks: int, local_blocks: int, max_blocks: int
) -> BlockSelection:
    """See kernels.block_selection.select_blocks."""
    n_keys = scores.shape[-1]
    i, causal, forced = _blocks(scores, first_row, sink_blocks, local_blocks)
    keep = torch.maximum(budgets.long(), forced.sum(-1)).minimum(i[:, 0] + 1).clamp(max=max_blocks)
    everything = (keep > i[:, 0])[..., None]
    hidden = ~causal | (scores.isnan() & ~forced & ~everything)
    keep = keep.minimum((~hidden).sum(-1))

    # Forced blocks come before free ones that score inf, hidden ones after those that score -inf: a second key.
    order = torch.argsort(scores.masked_fill(hidden, -torch.inf), dim=-1, descending=True, stable=True)
    last = torch.where(hidden, 2, torch.where(forced, 0, 1)).expand_as(order)
    order = order.gather(-1, torch.argsort(last.gather(-1, order), dim=-1, stable=True))
    width = min(max_blocks, n_keys)
    slots = torch.arange(width, device=scores.device)
    kept = torch.where(slots < keep[..., None], order[..., :width], n_keys).sort(dim=-1).values
    if width < max_blocks:
        kept = torch.nn.functional.pad(kept, (0, max_blocks - width), value=n_keys)
    return BlockSelection(indices=kept.int().contiguous(), counts=keep.int())


def share_budgets(
    scores: Tensor, budgets: Tensor, first_row: int, sink_blocks: int, local_blocks: int, floor: float, cap: float
) -> Tensor:
    """See kernels.block_selection.share_budgets. A head's k-th best free block counts where own < k <= most; so the
    threshold is the best score of all heads' such blocks that finds no room."""
    N, H, _, n_keys = scores.shape
    i, causal, forced = _blocks(scores, first_row, sink_blocks, local_blocks)
    n_causal, n_forced = i[:, 0] + 1, forced.sum(-1)
    free = n_causal - n_forced
    budget = torch.maximum(budgets.long(), n_forced).minimum(n_causal)
    own, most = ((share * budgets.float()).ceil().clamp(0, n_keys).long() - n_forced for share in (floor, cap))
    own = own.clamp(min=0).minimum(free)
    most = torch.maximum(most, own).minimum(free)

    best = scores.masked_fill(~causal | forced | scores.isnan(), -torch.inf).sort(dim=-1, descending=True).values
    k = torch.arange(1, n_keys + 1, device=scores.device)
    counting = (own[:, None] < k) & (k <= most[:, None])
    pool = best.masked_fill(~counting, -torch.inf)
    ranked = pool.transpose(1, 2).flatten(2).sort(dim=-1, descending=True).values
    room = H * (budget - n_forced - own)
    threshold = ranked.gather(-1, room.expand(N, -1)[..., None])[:, None]
    keep = n_forced + own + (pool > threshold).sum(-1)
    return torch.where(budget == n_causal, n_causal, keep).int()


def _blocks(scores: Tensor, first_row: int, sink_blocks: int, local_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's query block [rows, 1], and which key blocks [rows, n_keys] are causal and forced."""
    rows, n_keys = scores.shape[-2:]
    i = torch.arange(first_row, first_row + rows, device=scores.device)[:, None]
    j = torch.arange(n_keys, device=scores.device)[None, :]
    causal = j <= i
    return i, causal, causal & ((j < sink_blocks) | (j > i - local_blocks))
