"""The kept key blocks: what selection gives and attention takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockSelection:
    """The kept key blocks of every (batch, head, query block).

    indices: int32 [N, H, rows, max_blocks], ascending, the diagonal block last; entries past `counts` are undefined.
    counts:  int32 [N, H, rows], at least 1.
    order:   of `tile_order`, for attention kernels whose tiles would load them unevenly; None: they take them as usual.
    """

    indices: Tensor
    counts: Tensor
    order: Tensor | None = None

    def density(self, first_row: int = 0) -> float:
        """Kept blocks over causal blocks (row i has i + 1). Synchronises with the device: for reports only."""
        rows = self.counts.shape[-1]
        causal = sum(range(first_row + 1, first_row + rows + 1)) * self.counts[..., 0].numel()
        return float(self.counts.sum()) / causal

    def to_mask(self, n_keys: int) -> Tensor:
        """bool [N, H, rows, n_keys], True where a block is kept."""
        slots = torch.arange(self.indices.shape[-1], device=self.indices.device)
        valid = slots < self.counts.unsqueeze(-1)
        # Undefined entries are sent to one column past the end, which is cut off again.
        columns = torch.where(valid, self.indices, n_keys).long()
        mask = torch.zeros(*self.counts.shape, n_keys + 1, dtype=torch.bool, device=self.indices.device)
        return mask.scatter_(-1, columns, True)[..., :n_keys]
