"""How each attention layer of a patched model runs a prompt: its budget, and what its sliding window cuts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from stem_core.budget import PromptBudget, prompt_budget
from stem_core.config import StemConfig

DENSE_BLOCK_SIZE = 128


@dataclass(frozen=True)
class LayerPolicy:
    """How one attention layer of a patched model runs. config None: dense everywhere."""

    config: StemConfig | None
    layer: int

    @property
    def leading(self) -> bool:
        """Whether this is one of the leading layers that attend to everything."""
        return self.config is not None and self.layer < self.config.dense_layers

    def budget(self, prompt_length: int, window: int | None) -> PromptBudget:
        """The budget of this layer: leading layers and layers whose sliding window cuts the prompt drop no blocks."""
        dense = self.leading or cutting_window(prompt_length, window) is not None
        return prompt_budget(prompt_length, None if dense else self.config)

    def density(self, prompt_length: int, window: int | None) -> float:
        """Share of the causal block pairs that this layer computes: kept ones, or those that a sliding window meets."""
        cut = cutting_window(prompt_length, window)
        if cut is None:
            return self.budget(prompt_length, None).density
        return window_density(prompt_length, cut, DENSE_BLOCK_SIZE if self.config is None else self.config.block_size)


def cutting_window(prompt_length: int, window: int | None) -> int | None:
    """A layer's sliding window, or None where every token of the prompt sees all before it."""
    return None if window is None or window >= prompt_length else window


@lru_cache(maxsize=256)
def window_density(prompt_length: int, window: int, block_size: int) -> float:
    """Share of the causal block pairs of a prompt that hold a pair of tokens inside the sliding window."""
    rows = np.arange(-(-prompt_length // block_size))
    first = np.maximum(0, rows * block_size - window + 1) // block_size
    return float((rows - first + 1).sum() / (rows + 1).sum())
