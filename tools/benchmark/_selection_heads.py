"""Rows of the selection benchmark for budgets that heads share."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kernels.block_selection import BlockSelection, select_blocks, share_budgets, tile_order
from stem_core.selection import HEAD_CAP, HEAD_FLOOR


def heads_cases(scores: Tensor, budgets: np.ndarray, kv_heads: int) -> list[tuple[str, Callable[[], object], str]]:
    """(name, call, what is wrong with it or ""): the last and two middle rows against the reference.

    scores: [1, H, n, n], of which softmax makes shares, sharper from head to head. budgets: [n].
    """
    H, n = scores.shape[1:3]
    sharpness = torch.linspace(0.5, 8.0, H, device=scores.device)[:, None, None]
    shares = (scores * sharpness).softmax(-1)
    on_device = torch.tensor(budgets, device=scores.device)
    most = min(n, math.ceil(HEAD_CAP * int(budgets.max())))

    def share() -> Tensor:
        return share_budgets(shares, on_device, floor=HEAD_FLOOR, cap=HEAD_CAP)

    def select() -> BlockSelection:
        counts = share()
        selection = select_blocks(shares, counts, max_blocks=most)
        return BlockSelection(selection.indices, selection.counts, tile_order(counts, kv_heads))

    counts, bad = share(), ""
    for row in {n // 3, n // 2, n - 1}:
        part = shares[:, :, row : row + 1]
        wanted = share_budgets(
            part, on_device[row : row + 1], first_row=row, floor=HEAD_FLOOR, cap=HEAD_CAP, impl="reference"
        )
        if not torch.equal(counts[:, :, row : row + 1], wanted):
            bad = f"shared budgets of row {row} differ from the reference"
    return [("budgets shared among heads", share, bad), ("budgets shared, selection, order", select, bad)]
