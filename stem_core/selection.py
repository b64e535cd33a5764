"""Which key blocks each query block of a chunk keeps: an estimator's scores, and a rule that cuts them off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.block_selection import BlockSelection, choose_block_selection, select_blocks
from kernels.dispatch import Choice
from stem_core.budget import PromptBudget
from stem_core.config import StemConfig
from stem_core.context import QuantizedKV
from stem_core.estimators import ESTIMATORS, Chunk, KeyState


def new_key_state(
    config: StemConfig, k: Tensor, prompt_tokens: int, device: torch.device | None = None
) -> KeyState | None:
    """What `config`'s estimator keeps of a whole prompt's keys between chunks; None if it reads the keys themselves.

    k: [N, Hkv, any, D]; its shape, type and, without `device`, device are those of the prompt's keys.
    """
    return ESTIMATORS[config.estimator].new_key_state(config, k, prompt_tokens, k.device if device is None else device)


def stem_selection(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig,
    budget: PromptBudget,
    *,
    start: int = 0,
    scale: float | None = None,
    keys: KeyState | None = None,
    quantized: QuantizedKV | None = None,
    impl: str = "auto",
) -> BlockSelection:
    """The key blocks that each query block of the chunk [start, start + Lq) keeps.

    Shapes as for `stem_core.attention.stem_prefill`. keys: of `new_key_state`, holds the earlier chunks' and is
    extended by this one's.
    """
    scores = ESTIMATORS[config.estimator].scores(Chunk(q, k, v, start, scale, keys, quantized, impl), config)
    return selection_rule(config).keep(scores, config, budget, start // config.block_size, impl)


@dataclass(frozen=True)
class Rule:
    """How scores become kept blocks.

    keep: (scores as of Estimator.scores, config, the prompt's budget, query block of the scores' first row, impl) to
        the selection. Heads and rows may keep different numbers of blocks, as long as every query block keeps at most
        H times its budget (what the prompt's density says) and what it keeps depends on no other query block.
    choose: its implementation for tensors on a device.
    """

    keep: Callable[[Tensor, StemConfig, PromptBudget, int, str], BlockSelection]
    choose: Callable[[torch.device], Choice]


def best_of_each_row(
    scores: Tensor, config: StemConfig, budget: PromptBudget, first_row: int, impl: str = "auto"
) -> BlockSelection:
    """Each row of each head keeps sink, local and its highest scores, as many as its budget says."""
    last_row = first_row + scores.shape[2]
    return select_blocks(
        scores,
        budget.rows(first_row, last_row, scores.device),
        first_row=first_row,
        sink_blocks=config.sink_blocks,
        local_blocks=config.local_blocks,
        max_blocks=budget.max_blocks(first_row, last_row),
        impl=impl,
    )


RULES: dict[str, Rule] = {"rows": Rule(best_of_each_row, choose_block_selection)}


def selection_rule(config: StemConfig) -> Rule:
    """The rule that the config's estimator asks for."""
    return RULES[ESTIMATORS[config.estimator].rule(config)]
