"""Block selection in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.block_selection import BlockSelection


def select_blocks(
    scores: Tensor, budgets: Tensor, first_row: int, sink_blocks: int, local_blocks: int, max_blocks: int
) -> BlockSelection:
    """See kernels.block_selection.select_blocks."""
    rows, n_keys = scores.shape[-2:]
    i = torch.arange(first_row, first_row + rows, device=scores.device)[:, None]
    j = torch.arange(n_keys, device=scores.device)[None, :]
    causal = j <= i
    forced = causal & ((j < sink_blocks) | (j > i - local_blocks))
    keep = torch.maximum(budgets.long(), forced.sum(-1)).minimum(i[:, 0] + 1).clamp(max=max_blocks)
    everything = (keep > i[:, 0])[:, None]
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
