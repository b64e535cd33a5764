"""Token Position Decay: how many key blocks each query block keeps, known on the host before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from stem_core.config import StemConfig
from stem_core.estimators import ESTIMATORS

# Stem paper: the starting budget is 20% of the blocks up to this many tokens and 10% above, never below 54 blocks.
PAPER_LONG_PROMPT = 16_384
PAPER_MIN_BUDGET = 54
# Release (Tencent/AngelSlim): dense below the first bound; floor(0.2 n) + 30 below the second, floor(0.1 n) + 30 above.
RELEASE_DENSE_BELOW = 56
RELEASE_LONG_PROMPT = 160


def row_budgets(n_blocks: int, config: StemConfig) -> np.ndarray:
    """int32 [n_blocks]: the key blocks that row i of a prompt of `n_blocks` blocks keeps, between 1 and i + 1.

    Sink, local and diagonal blocks and the dense tail are counted in. Depends on the full prompt only, never on how it
    is cut into chunks. Raises ValueError for n_blocks < 1.
    """
    if n_blocks < 1:
        raise ValueError(f"a prompt has at least one block, got {n_blocks}")
    causal = np.arange(1, n_blocks + 1)
    if config.schedule == "paper":
        wanted = _paper(n_blocks, config)
    elif config.schedule == "release":
        wanted = _release(n_blocks, config)
    elif config.schedule == "growing":
        wanted = _growing(n_blocks, config)
    else:
        return _solve_density(n_blocks, config).astype(np.int32)
    return _with_forced(wanted, causal, config).astype(np.int32)


def causal_density(budgets: np.ndarray) -> float:
    """Kept blocks over the causal triangle of a whole prompt's rows."""
    n = len(budgets)
    return float(budgets.sum()) / (n * (n + 1) / 2)


def _with_forced(wanted: np.ndarray, causal: np.ndarray, config: StemConfig) -> np.ndarray:
    """Row budgets between the always-kept and the causal blocks, with the dense tail."""
    forced = np.minimum(causal, config.sink_blocks + config.local_blocks)
    kept = np.minimum(causal, np.maximum(wanted, forced))
    if config.dense_tail:
        kept[-config.dense_tail :] = causal[-config.dense_tail :]
    return kept


def _paper(n: int, config: StemConfig) -> np.ndarray:
    rate = 0.2 if n * config.block_size <= PAPER_LONG_PROMPT else 0.1
    start = max(int(np.ceil(rate * n)), PAPER_MIN_BUDGET)
    return np.ceil(start * (1 - (1 - config.decay) * np.arange(n) / n)).astype(np.int64)


def _release(n: int, config: StemConfig) -> np.ndarray:
    if n < RELEASE_DENSE_BELOW:
        return np.arange(1, n + 1)
    start = int(np.floor((0.2 if n < RELEASE_LONG_PROMPT else 0.1) * n)) + 30
    fall = np.clip((np.arange(n) - start) / (n - 1 - start), 0.0, 1.0)
    return np.maximum(np.floor(start + (config.decay - 1) * start * fall), 1).astype(np.int64)


def _growing(n: int, config: StemConfig) -> np.ndarray:
    kept = np.floor(config.base_blocks + config.growth * np.arange(n) + 1e-9).astype(np.int64)
    causal = np.arange(1, n + 1)
    left_out = 1 - causal_density(np.minimum(kept, causal))
    # Scores that cost more than they save are not worth what is lost.
    return causal if left_out < ESTIMATORS[config.estimator].cost(config) else kept


def _solve_density(n: int, config: StemConfig) -> np.ndarray:
    """The linear decay whose kept blocks come closest to the wanted share of the causal triangle, from below."""
    assert config.density is not None
    causal = np.arange(1, n + 1)
    slope = 1 - (1 - config.decay) * np.arange(n) / n
    target = config.density * causal.sum()

    def kept(start: float) -> np.ndarray:
        # Fractions are carried from row to row: steps of a whole block in every row would miss the share by 2 / n.
        whole = np.diff(np.floor(np.cumsum(start * slope) + 1e-9), prepend=0.0).astype(np.int64)
        return _with_forced(whole, causal, config)

    low, high = 0.0, n / config.decay
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle).sum() <= target else (low, middle)
    return kept(high) if kept(high).sum() <= target else kept(low)


@dataclass(frozen=True)
class PromptBudget:
    """The budgets of one prompt, or the decision that it runs dense.

    budgets: int32 [n_blocks], None where the prompt is dense. density: kept share of the causal
    blocks in a sparse layer.
    reason: why the prompt is dense; empty where it is sparse.
    """

    budgets: np.ndarray | None
    density: float
    reason: str = ""
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def rows(self, first: int, last: int, device: torch.device) -> Tensor:
        """Budgets of rows [first, last) as int32 on `device`, copied there once."""
        assert self.budgets is not None
        if device not in self._on_device:
            self._on_device[device] = torch.tensor(self.budgets, device=device)
        return self._on_device[device][first:last]

    def max_blocks(self, first: int, last: int) -> int:
        """The most blocks that any of the rows [first, last) keeps."""
        assert self.budgets is not None
        return int(self.budgets[first:last].max())


@lru_cache(maxsize=256)
def prompt_budget(prompt_length: int, config: StemConfig | None) -> PromptBudget:
    """The budgets of a prompt of `prompt_length` tokens; config None is dense attention."""
    if config is None:
        return PromptBudget(None, 1.0, "attention is dense")
    if prompt_length < config.dense_below:
        return PromptBudget(None, 1.0, f"{prompt_length} tokens are below dense_below={config.dense_below}")
    budgets = row_budgets(-(-prompt_length // config.block_size), config)
    density = causal_density(budgets)
    if density == 1.0:
        return PromptBudget(None, 1.0, f"the budget covers all {len(budgets)} blocks of {prompt_length} tokens")
    budgets.setflags(write=False)
    return PromptBudget(budgets, density)
