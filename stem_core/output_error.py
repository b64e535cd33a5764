"""How much of the attention mass a sparse prefill keeps, measured in a sample of its rows while it runs."""

from __future__ import annotations

import torch
from torch import Tensor

from stem_core.budget import PromptBudget
from stem_core.config import StemConfig

# One query block of so many is measured, besides the last one: at 128 tokens a block, one each 16,384 tokens.
SAMPLE_BLOCKS = 128


def sampled_blocks(budget: PromptBudget, config: StemConfig) -> tuple[int, ...]:
    """The query blocks of a prompt in which the kept mass is measured, ascending.

    Every SAMPLE_BLOCKS-th block and the last one before the dense tail; those that keep all their causal blocks have
    nothing to measure and are left out. They depend on the prompt's length alone, not on its chunks.
    """
    if budget.budgets is None or not config.min_mass:
        return ()
    blocks = len(budget.budgets) - config.dense_tail
    sample = {*range(SAMPLE_BLOCKS - 1, blocks, SAMPLE_BLOCKS), *range(max(0, blocks - 1), blocks)}
    return tuple(block for block in sorted(sample) if budget.budgets[block] <= block)


class RetainedMass:
    """What one prompt's sparse layers keep of the attention mass, summed over layers on the layers' own devices.

    A row keeps exp(lse over the kept keys - lse over all causal keys) of its mass, in (0, 1]; a query block the mean of
    its rows and heads. Nothing here waits for a device.

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
        """One more layer of sampled block `index`: log-sum-exp [N, H, rows] over the kept keys and over all."""
        if sparse.device not in self.sums:
            self.sums[sparse.device] = torch.zeros(len(self.blocks), dtype=torch.float32, device=sparse.device)
        # The two kernels sum in different orders: where all is kept they may differ by a rounding.
        self.sums[sparse.device][index].add_((sparse - dense).exp().clamp(max=1.0).mean())
        self.layers[index] += 1
