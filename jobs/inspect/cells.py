"""Kept blocks gathered into cells that an eye can tell apart."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from kernels.block_selection import BlockSelection
from stem_core.budget import PromptBudget
from stem_core.config import StemConfig

MAX_CELLS = 240


@dataclass(frozen=True)
class Grid:
    """A prompt's causal triangle of block pairs, and the square cells of `per_cell` blocks a side that are drawn.

    causal, by_rule: int64 [cells, cells], block pairs in a cell, and those of them that every head keeps whatever their
    scores: sink, local and diagonal blocks, and all of a row whose budget covers them (the first rows, the dense tail).
    """

    blocks: int
    block_size: int
    per_cell: int
    sink_blocks: int
    local_blocks: int
    budgets: np.ndarray
    causal: np.ndarray
    by_rule: np.ndarray

    @classmethod
    def of(cls, config: StemConfig, budget: PromptBudget, most_cells: int = MAX_CELLS) -> Grid:
        """The grid of a prompt that runs sparse."""
        assert budget.budgets is not None
        n = len(budget.budgets)
        per_cell = -(-n // most_cells)
        kinds = config.block_size, per_cell, config.sink_blocks, config.local_blocks
        empty = np.zeros((0, 0), np.int64)
        grid = cls(n, *kinds, budget.budgets, empty, empty)
        causal = np.zeros((grid.cells, grid.cells), np.int64)
        by_rule = np.zeros_like(causal)
        for first in range(0, n, 1024):  # rows by the thousand: a mask of all pairs may not fit
            rows = np.arange(first, min(first + 1024, n))
            for total, mask in ((causal, np.arange(n) <= rows[:, None]), (by_rule, grid.rule(rows))):
                np.add.at(total, rows // per_cell, grid.in_cells(mask))
        return cls(n, *kinds, budget.budgets, causal, by_rule)

    @property
    def cells(self) -> int:
        """Cells a side."""
        return -(-self.blocks // self.per_cell)

    def rule(self, rows: np.ndarray) -> np.ndarray:
        """bool [rows, blocks]: the pairs of these query blocks that are kept whatever their scores."""
        query, key = rows[:, None], np.arange(self.blocks)
        near = (key < self.sink_blocks) | (query - key < self.local_blocks)
        return (near | (self.budgets[rows, None] > query)) & (key <= query)

    def in_cells(self, pairs: np.ndarray) -> np.ndarray:
        """[..., blocks] -> [..., cells], sums over the blocks of each cell."""
        starts = np.arange(0, self.blocks, self.per_cell)
        return np.add.reduceat(pairs, starts, axis=-1, dtype=np.int64)


@dataclass(frozen=True)
class Pattern:
    """columns, diagonals: the share of the differences inside the rows of a map that the means of its columns (which
    block it is) or of its diagonals (how far back it lies) explain; between 0 and 1. empty: no score chose anything.
    """

    columns: float
    diagonals: float
    empty: bool = False

    @property
    def name(self) -> str:
        """A word for it."""
        if self.empty:
            return "none"
        if max(self.columns, self.diagonals) < 0.3:
            return "scattered"
        if min(self.columns, self.diagonals) > 0.3:
            return "mixed"
        return "columns" if self.columns > self.diagonals else "diagonals"


@dataclass
class LayerCells:
    """What one layer keeps. Filled chunk by chunk.

    kept: int64 [blocks], block pairs that all heads together keep in the row of a query block. by_score: uint16
    [H, cells, cells], pairs that each head chose by score. agreement: int64 [H + 1], pairs by the number of heads that
    chose them. reach: int64 [blocks], choices by how many blocks they lie back. readers: int64 [blocks], choices of
    each key block.
    """

    grid: Grid
    kept: np.ndarray
    by_score: np.ndarray
    agreement: np.ndarray
    reach: np.ndarray
    readers: np.ndarray
    rows_seen: int = field(default=0)

    @classmethod
    def of(cls, grid: Grid, heads: int) -> LayerCells:
        """Nothing kept yet."""
        n = grid.blocks
        return cls(
            grid,
            np.zeros(n, np.int64),
            np.zeros((heads, grid.cells, grid.cells), np.uint16),
            np.zeros(heads + 1, np.int64),
            np.zeros(n, np.int64),
            np.zeros(n, np.int64),
        )

    @property
    def heads(self) -> int:
        return len(self.by_score)

    def add(self, selection: BlockSelection, first_row: int) -> None:
        """Take in the selection of one chunk of a prompt; batch entries other than the first are not looked at."""
        for begin in range(0, selection.counts.shape[2], 256):
            part = slice(begin, begin + 256)
            piece = BlockSelection(selection.indices[:1, :, part], selection.counts[:1, :, part])
            self._add(piece.to_mask(self.grid.blocks)[0].cpu(), first_row + begin)

    def _add(self, mask: torch.Tensor, first: int) -> None:
        """mask: bool [H, rows, blocks]."""
        grid, kept = self.grid, mask.numpy()
        rows = np.arange(first, first + kept.shape[1])
        self.rows_seen += len(rows)
        self.kept[rows] += kept.sum((0, 2))
        chosen = kept & ~grid.rule(rows)
        cells = grid.in_cells(chosen).astype(np.uint16)  # a cell holds at most 255 x 255 pairs
        for head in range(self.heads):
            np.add.at(self.by_score[head], rows // grid.per_cell, cells[head])
        together = chosen.sum(0)
        self.agreement += np.bincount(together.ravel(), minlength=self.heads + 1)
        query, key = np.nonzero(together)
        weights = together[query, key]
        self.reach += np.bincount(rows[query] - key, weights, grid.blocks).astype(np.int64)
        self.readers += together.sum(0)

    @property
    def density(self) -> float:
        """Kept share of the causal block pairs, over all heads."""
        return float(self.kept.sum() / (self.heads * self.grid.causal.sum()))

    @property
    def by_rule(self) -> float:
        """The part of the density that no score decides."""
        return float(self.grid.by_rule.sum() / self.grid.causal.sum())

    @property
    def shared(self) -> float:
        """Of the other heads, the share that chose a pair too which one head chose, on average; NaN for one head."""
        number = np.arange(self.heads + 1)
        choices = (self.agreement * number).sum()
        if self.heads == 1 or not choices:
            return float("nan")
        return float((self.agreement * number * (number - 1)).sum() / (choices * (self.heads - 1)))

    def reach_tokens(self, quantile: float) -> int:
        """How many tokens back that share of the choices lies at most."""
        total = self.reach.cumsum()
        return int(np.searchsorted(total, quantile * total[-1])) * self.grid.block_size

    def read_most(self, count: int) -> list[tuple[int, float]]:
        """The key blocks chosen most, each with the share of the query blocks and heads that could choose it who did.

        Only of blocks that many could choose: at least a tenth of the most that any block could be chosen by.
        """
        could = np.zeros(self.grid.blocks, np.int64)
        for first in range(0, self.grid.blocks, 1024):
            rows = np.arange(first, min(first + 1024, self.grid.blocks))
            could += ((np.arange(self.grid.blocks) <= rows[:, None]) & ~self.grid.rule(rows)).sum(0)
        shares = np.where(could > could.max() / 10, self.readers / np.maximum(could * self.heads, 1), 0.0)
        order = np.argsort(-shares, kind="stable")[:count]
        return [(int(block), float(shares[block])) for block in order if shares[block] > 0]

    def pattern(self) -> Pattern:
        """How much of the map is explained by columns alone, and how much by diagonals alone."""
        if not self.by_score.any():
            return Pattern(0.0, 0.0, empty=True)
        shares = self.shares()
        query, key = np.nonzero(np.isfinite(shares))
        values = shares[query, key].astype(np.float64)
        values -= _means(query, values)
        total = float((values**2).sum()) or 1.0
        columns, diagonals = (
            1 - float(((values - _means(of, values)) ** 2).sum()) / total for of in (key, query - key)
        )
        return Pattern(columns, diagonals)

    def shares(self, head: int | None = None) -> np.ndarray:
        """float32 [cells, cells]: the share of the pairs that could be chosen that were, by a head or on average.

        NaN where every pair is kept by rule or none is causal.
        """
        chosen = self.by_score.mean(0) if head is None else self.by_score[head]
        free = self.grid.causal - self.grid.by_rule
        return np.where(free > 0, chosen / np.maximum(free, 1), np.nan).astype(np.float32)


def _means(group: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Each value's group mean."""
    return (np.bincount(group, values) / np.maximum(np.bincount(group), 1))[group]
