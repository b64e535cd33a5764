"""How far the attention output of a sparse prefill is from dense attention's, measured in a sample of its rows."""

from __future__ import annotations

import torch
from torch import Tensor

from stem_core.budget import PromptBudget
from stem_core.config import StemConfig

# Query blocks of a prompt that are measured, whatever its length: each is one more block of rows that a sparse layer
# attends to densely. Four of a prompt's n blocks take at most 4 * 2 / n of dense attention's flops.
SAMPLED_BLOCKS = 4


def sampled_blocks(budget: PromptBudget, config: StemConfig) -> tuple[int, ...]:
    """The query blocks of a prompt in which the error is measured, ascending; none without a max_output_error.

    Evenly spread over the rows that drop a block, the last of them (before the dense tail) included: the others have no
    error of their own. They depend on the prompt's length alone, not on its chunks.
    """
    if budget.budgets is None or not config.max_output_error:
        return ()
    sparse = [block for block, kept in enumerate(budget.budgets.tolist()) if kept <= block]
    return tuple(sorted({sparse[part * len(sparse) // SAMPLED_BLOCKS - 1] for part in range(1, SAMPLED_BLOCKS + 1)}))


class ErrorProbe:
    """The errors of one prompt's sparse layers, summed over layers on the layers' own devices.

    A row's error is ||sparse - dense|| / ||dense||, norms over the outputs of all heads, with the same queries, keys
    and values: what this layer's dropped blocks change, not what earlier layers' have changed. A query block's is the
    mean of its rows'. Nothing here waits for a device.

    blocks: the sampled query blocks (sampled_blocks()) of block_size tokens. sums: by device, float32 [blocks], over
    the layers there. layers: by sampled block, how many layers it was measured in so far.
    """

    def __init__(self, blocks: tuple[int, ...], block_size: int) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.sums: dict[torch.device, Tensor] = {}
        self.layers = [0] * len(blocks)

    def within(self, start: int, end: int) -> range:
        """Which of `blocks` begin in the tokens [start, end); `start` is a block boundary, `end` one or the last."""
        found = [i for i, block in enumerate(self.blocks) if start <= block * self.block_size < end]
        return range(found[0], found[-1] + 1) if found else range(0)

    def tokens(self, index: int, end: int) -> tuple[int, int]:
        """First token of sampled block `index`, and the one behind its last; at most `end`."""
        first = self.blocks[index] * self.block_size
        return first, min(end, first + self.block_size)

    def add(self, index: int, sparse: Tensor, dense: Tensor) -> None:
        """One more layer of sampled block `index`: its rows' outputs [1, H, rows, D], sparse and dense."""
        if sparse.device not in self.sums:
            self.sums[sparse.device] = torch.zeros(len(self.blocks), dtype=torch.float32, device=sparse.device)
        self.sums[sparse.device][index].add_(row_errors(sparse, dense).mean())
        self.layers[index] += 1


def row_errors(sparse: Tensor, dense: Tensor) -> Tensor:
    """float32 [N, rows]: ||sparse - dense|| / ||dense|| of outputs [N, H, rows, D], norms over H and D; 0 / 0 is 0."""
    sparse, dense = sparse.float(), dense.float()
    norms = [x.square().sum((1, 3)).sqrt() for x in (sparse - dense, dense)]
    return norms[0] / norms[1].clamp(min=torch.finfo(torch.float32).tiny)
