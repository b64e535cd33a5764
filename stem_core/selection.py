"""Which key blocks each query block of a chunk keeps: an estimator's scores, and a rule that cuts them off."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.block_selection import (
    BlockSelection,
    choose_block_selection,
    select_blocks,
    share_budgets,
    tile_order,
)
from kernels.dispatch import Choice
from stem_core.budget import PromptBudget
from stem_core.config import StemConfig
from stem_core.context import QuantizedKV
from stem_core.estimators import ESTIMATORS, Chunk, KeyState

# Of its row's budget a head keeps at least and at most so much where heads share. The floor is for what an estimator
# does not see: a head whose attention looks diffuse still keeps its best blocks. The cap bounds the width of the
# selection, and the time of the attention tiles that run longest.
HEAD_FLOOR = 0.2
HEAD_CAP = 4.0


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
    rule = selection_rule(config)
    selection = rule.keep(scores, config, budget, start // config.block_size, impl)
    return replace(selection, order=tile_order(selection.counts, k.shape[1])) if rule.uneven else selection


@dataclass(frozen=True)
class Rule:
    """How scores become kept blocks.

    keep: (scores as of Estimator.scores, config, the prompt's budget, query block of the scores' first row, impl) to
        the selection. Heads and rows may keep different numbers of blocks, as long as every query block keeps at most
        H times its budget (what the prompt's density says) and what it keeps depends on no other query block.
    choose: its implementation for tensors on a device.
    uneven: heads of a row keep very different numbers of blocks, so that the attention's tiles are put in order.
    """

    keep: Callable[[Tensor, StemConfig, PromptBudget, int, str], BlockSelection]
    choose: Callable[[torch.device], Choice]
    uneven: bool = False


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


def best_of_all_heads(
    scores: Tensor, config: StemConfig, budget: PromptBudget, first_row: int, impl: str = "auto"
) -> BlockSelection:
    """The heads of a row share their budgets by scores, which are shares of attention; then each keeps its highest."""
    assert ESTIMATORS[config.estimator].shares, "other scores do not compare across heads"
    last_row = first_row + scores.shape[2]
    budgets = budget.rows(first_row, last_row, scores.device)
    rows = {"first_row": first_row, "sink_blocks": config.sink_blocks, "local_blocks": config.local_blocks}
    counts = share_budgets(scores, budgets, floor=HEAD_FLOOR, cap=HEAD_CAP, impl=impl, **rows)
    most = min(last_row, math.ceil(HEAD_CAP * budget.max_blocks(first_row, last_row)))
    return select_blocks(scores, counts, max_blocks=most, impl=impl, **rows)


RULES: dict[str, Rule] = {
    "rows": Rule(best_of_each_row, choose_block_selection),
    "heads": Rule(best_of_all_heads, choose_block_selection, uneven=True),
}


def selection_rule(config: StemConfig) -> Rule:
    """The rule that the config's estimator asks for."""
    return RULES[ESTIMATORS[config.estimator].rule(config)]
