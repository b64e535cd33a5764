"""Which key blocks each query block of a chunk keeps: an estimator's scores, cut off at the rows' budgets."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.block_scores import KeySummary, key_sums_dtype, mass_scores, oam_scores
from kernels.block_selection import BlockSelection, select_blocks
from kernels.bound_scores import KeyBounds, bound_scores
from stem_core.budget import PromptBudget
from stem_core.config import StemConfig
from stem_core.context import KeyState, QuantizedKV


def new_key_state(
    config: StemConfig, k: Tensor, prompt_tokens: int, device: torch.device | None = None
) -> KeyState | None:
    """What `config`'s estimator keeps of a whole prompt's keys between chunks; None if it reads the keys themselves.

    k: [N, Hkv, any, D]; its shape, type and, without `device`, device are those of the prompt's keys.
    """
    shape = k.shape[0], k.shape[1], prompt_tokens, k.shape[3]
    device = k.device if device is None else device
    if config.estimator == "oam":
        return KeySummary.allocate(
            *shape, block_size=config.block_size, stride=config.stride, device=device, dtype=key_sums_dtype(k)
        )
    if config.estimator == "bound":
        return KeyBounds.allocate(
            *shape, block_size=config.block_size, span=config.bound_span, device=device, dtype=k.dtype
        )
    return None


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
    scores = _block_scores(q, k, v, config, start, scale, keys, quantized, impl)
    first, rows = start // config.block_size, scores.shape[2]
    return select_blocks(
        scores,
        budget.rows(first, first + rows, q.device),
        first_row=first,
        sink_blocks=config.sink_blocks,
        local_blocks=config.local_blocks,
        max_blocks=budget.max_blocks(first, first + rows),
        impl=impl,
    )


def _block_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig,
    start: int,
    scale: float | None,
    keys: KeyState | None,
    quantized: QuantizedKV | None,
    impl: str,
) -> Tensor:
    """float32 [N, H, rows, n_keys]."""
    # With keys in fp8, k and v are those of the chunk alone.
    key_start = 0 if quantized is None else start
    if config.estimator == "mass":
        return mass_scores(
            q,
            k if quantized is None else quantized.k[None],
            query_start=start,
            block_size=config.block_size,
            group=config.mass_group,
            rows=config.mass_rows,
            scale=scale,
            scales=None if quantized is None else quantized.scales,
            impl=impl,
        )
    if config.estimator == "bound":
        assert keys is None or isinstance(keys, KeyBounds)
        return bound_scores(
            q,
            k,
            query_start=start,
            block_size=config.block_size,
            group=config.bound_group,
            span=config.bound_span,
            scale=scale,
            bounds=keys,
            key_start=key_start,
            impl=impl,
        )
    assert keys is None or isinstance(keys, KeySummary)
    return oam_scores(
        q,
        k,
        v,
        query_start=start,
        block_size=config.block_size,
        stride=config.stride,
        value_weight=config.value_weight,
        scale=scale,
        summary=keys,
        key_start=key_start,
        fill_above=False,
        impl=impl,
    )
