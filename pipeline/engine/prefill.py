"""Prefill: one document at a time, in chunks, straight into its arena extent."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.arena import Arena, Extent
from pipeline.engine.cache import PrefillCache
from pipeline.engine.runner import ModelRunner
from stem_core.config import StemConfig
from stem_core.context import PrefillContext, PromptGoesOn
from stem_core.policy import DENSE_BLOCK_SIZE, cutting_window


def chunk_size(chunk_tokens: int, attention: StemConfig | None) -> int:
    """`chunk_tokens` rounded up to whole blocks, so that every chunk but a prompt's last ends on a block boundary."""
    block = DENSE_BLOCK_SIZE if attention is None else attention.block_size
    return -(-chunk_tokens // block) * block


@dataclass(frozen=True)
class AttentionPlan:
    """How a prompt of one length attends, before it runs: budgets depend on nothing else.

    density_by_layer: of each layer of the model, in its order; `density` is their mean.
    """

    attention: str
    reason: str
    density: float
    density_by_layer: tuple[float, ...] = ()


def attention_plan(runner: ModelRunner, prompt_tokens: int) -> AttentionPlan:
    """Stem or dense, why it is not what was asked for, and the density over all layers."""
    densities = tuple(policy.density(prompt_tokens, window) for policy, window in runner.layers)
    density = sum(densities) / len(densities)
    if all(policy.config is None for policy, _ in runner.layers):
        return AttentionPlan("dense", "", density, densities)
    # Leading layers are dense because that was asked for.
    others = [(policy, window) for policy, window in runner.layers if not policy.leading]
    uncut = [policy for policy, window in others if cutting_window(prompt_tokens, window) is None]
    why_dense = [policy.budget(prompt_tokens, None).reason for policy in uncut]
    if "" not in why_dense:
        reason = why_dense[0] if why_dense else "every layer is dense or has a sliding window"
        return AttentionPlan("dense", reason, density, densities)
    windows = len(others) - len(uncut)
    reason = f"{windows} of {len(runner.layers)} layers keep to their sliding window" if windows else ""
    return AttentionPlan("stem", reason, density, densities)


class Prefill:
    """The prefill of one document. Nothing here waits for the device.

    prompt_ids: int64 [prompt tokens]. chunk_tokens: see chunk_size(). every_row: run the last layer on all chunks, for
    those who look at hidden states; otherwise only on the last one, since nothing else reads its output.
    """

    def __init__(
        self,
        runner: ModelRunner,
        arena: Arena,
        extent: Extent,
        prompt_ids: np.ndarray,
        max_new_tokens: int,
        chunk_tokens: int,
        every_row: bool = False,
    ) -> None:
        device = runner.device
        ids = torch.from_numpy(prompt_ids)
        if device.type == "cuda":
            ids = ids.pin_memory()
        self._ids = ids.to(device, non_blocking=True)[None]
        self._runner = runner
        self._bound = torch.full((1,), len(prompt_ids) + max_new_tokens, device=device)
        self._arena = arena
        self._extent = extent
        self._chunk = chunk_tokens
        self._context = PrefillContext(
            prompt_length=len(prompt_ids),
            quantized=arena.quantized(extent),
            last_layer=None if every_row else runner.layers[-1][0].layer,
        )
        # Budgets are copied to the layers' devices now: a copy between launches would wait for all that is queued.
        for policy, window in runner.layers:
            budget = policy.budget(len(prompt_ids), window)
            if budget.budgets is not None:
                budget.rows(0, 1, runner.layer_devices[policy.layer])

    @property
    def done(self) -> bool:
        return self._context.start >= self._context.prompt_length

    def step(self) -> Tensor | None:
        """Run the next chunk. Returns logits [1, V] of its last token, which is the prompt's last one when done.

        None for an earlier chunk, unless every_row.
        """
        begin = self._context.start
        end = min(begin + self._chunk, self._context.prompt_length)
        positions = torch.arange(begin, end, device=self._ids.device)[None]
        cache = PrefillCache(self._arena, self._extent, seen=begin)
        logits = None
        with suppress(PromptGoesOn):
            logits = self._runner.logits(self._ids[:, begin:end], positions, cache, self._context, self._bound)
        self._context.start = end
        return logits
