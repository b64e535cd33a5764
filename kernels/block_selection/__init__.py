"""Which key blocks each query block keeps: budgets and scores in, indices and counts out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dispatch import Choice, choose_portable, on_its_gpu

__all__ = ["BlockSelection", "choose_block_selection", "select_blocks"]


@dataclass(frozen=True)
class BlockSelection:
    """The kept key blocks of every (batch, head, query block).

    indices: int32 [N, H, rows, max_blocks], ascending, the diagonal block last; entries past `counts` are undefined.
    counts:  int32 [N, H, rows], at least 1.
    """

    indices: Tensor
    counts: Tensor

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


def choose_block_selection(device: torch.device, impl: str = "auto") -> Choice:
    """The implementation that `select_blocks` uses for tensors on `device`."""
    return choose_portable("block_selection", device, impl)


@on_its_gpu
def select_blocks(
    scores: Tensor,
    budgets: Tensor,
    *,
    first_row: int = 0,
    sink_blocks: int = 4,
    local_blocks: int = 4,
    max_blocks: int,
    impl: str = "auto",
) -> BlockSelection:
    """Keep sink, local and diagonal blocks and, from the rest, the highest scores, within each row's budget.

    Row r stands for query block i = first_row + r, whose causal key blocks are 0..i. It keeps exactly
    min(i + 1, max(budgets[r], forced)) blocks, `forced` being its sink, local and diagonal blocks. Among equal scores
    the lower block index wins. A score that is NaN competes for nothing: its block is kept only as one of the forced
    ones or in a row that keeps every block, and a row with too few other scores keeps fewer. No host synchronisation.

    scores:  float32 [N, H, rows, n_keys], n_keys >= first_row + rows; entries above the diagonal are ignored.
    budgets: int32 [rows] on the device of `scores`.
    max_blocks: width of the result, at least the largest number of blocks that any row keeps; known on the host,
        so that nothing waits for the device.
    Raises ValueError for shapes or types that do not fit.
    """
    if scores.ndim != 4 or scores.dtype != torch.float32:
        raise ValueError(f"scores must be float32 [N, H, rows, n_keys], got {scores.dtype} {tuple(scores.shape)}")
    rows, n_keys = scores.shape[-2:]
    if budgets.shape != (rows,) or budgets.dtype != torch.int32:
        raise ValueError(f"budgets must be int32 [{rows}], got {budgets.dtype} {tuple(budgets.shape)}")
    if first_row < 0 or n_keys < first_row + rows:
        raise ValueError(f"{rows} rows from {first_row} need at least {first_row + rows} key blocks, got {n_keys}")
    if sink_blocks < 0 or local_blocks < 1 or max_blocks < 1:
        raise ValueError(
            f"sink_blocks >= 0, local_blocks >= 1 and max_blocks >= 1 are needed, got {sink_blocks}, {local_blocks}, "
            f"{max_blocks}"
        )
    choice = choose_block_selection(scores.device, impl)
    if choice.impl == "triton":
        from kernels.block_selection import triton as implementation
    else:
        from kernels.block_selection import reference as implementation  # type: ignore[no-redef]
    return implementation.select_blocks(scores, budgets, first_row, sink_blocks, local_blocks, max_blocks)
