"""Which key blocks each query block keeps: budgets and scores in, indices and counts out."""

from kernels._common.selection import BlockSelection
from kernels.block_selection.api import choose_block_selection, select_blocks, share_budgets, tile_order

__all__ = ["BlockSelection", "choose_block_selection", "select_blocks", "share_budgets", "tile_order"]
