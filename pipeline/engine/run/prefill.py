"""Prefill: one document at a time, in chunks, straight into its arena extent."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.kv.arena import Arena, Extent
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.run.readings import ProbeReadings, probe_readings
from stem_core.config import StemConfig
from stem_core.context import PrefillContext, PromptGoesOn, Select
from stem_core.policy import DENSE_BLOCK_SIZE, cutting_window


def chunk_size(chunk_tokens: int, attention: StemConfig | None) -> int:
    """`chunk_tokens` rounded up to whole blocks, so that every chunk but a prompt's last ends on a block boundary."""
    block = DENSE_BLOCK_SIZE if attention is None else attention.block_size
    return -(-chunk_tokens // block) * block


@dataclass(frozen=True)
class AttentionPlan:
    """How a prompt attends: before it runs a matter of its length alone, then also of what is measured
    (max_output_error).

    Its fields are those of the same names in pipeline.results.rows.EngineFields.
    density: the mean of density_by_layer.
    output_error: of the sampled query block that is furthest from dense attention, mean over its rows and the sparse
    layers (see stem_core.output_error); None where nothing was measured.
    """

    attention: str
    attention_reason: str
    density: float
    density_by_layer: tuple[float, ...]
    output_error: float | None = None


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


def dense_instead(runner: ModelRunner, plan: AttentionPlan, prompt_tokens: int, reason: str) -> AttentionPlan:
    """The plan of a prompt that was begun as `plan` says and is read densely after all."""
    cut = [cutting_window(prompt_tokens, window) is not None for _, window in runner.layers]
    densities = tuple(old if windowed else 1.0 for old, windowed in zip(plan.density_by_layer, cut, strict=True))
    return AttentionPlan("dense", reason, sum(densities) / len(densities), densities, plan.output_error)


class Prefill:
    """The prefill of one document. Without a max_output_error nothing here waits for the device.

    With one, step() waits for the chunk before its own, and in the end for the last, and begins again, densely and in
    the same extent, as soon as a sampled query block of these is beyond it. What is sampled, and so the decision,
    depends neither on other documents nor on chunk_tokens.

    prompt_ids: int64 [prompt tokens]. chunk_tokens: see chunk_size(). every_row: run the last layer on all tokens, for
    those who look at every row, and measure nothing; otherwise only on the last block, since nothing else reads its
    output. select: see PrefillContext. plan: how the prompt attends, as far as it is known.
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
        select: Select | None = None,
    ) -> None:
        self._runner = runner
        self._ids = self._runner.on_device(prompt_ids)
        self._bound = torch.full((1,), len(prompt_ids) + max_new_tokens, device=runner.device)
        self._arena = arena
        self._extent = extent
        self._chunk = chunk_tokens
        self.plan = attention_plan(runner, len(prompt_ids))
        self._measured = None if every_row else probe_readings(runner, len(prompt_ids))
        self._context = PrefillContext(
            prompt_length=len(prompt_ids),
            quantized=arena.quantized(extent),
            last_layer=None if every_row else runner.last_layer,
            probe=None if self._measured is None else self._measured.probe,
            select=select,
        )
        # Budgets are copied to the layers' devices now: a copy between launches would wait for all that is queued.
        for policy, window in runner.layers:
            budget = policy.budget(len(prompt_ids), window)
            if budget.budgets is not None:
                budget.rows(0, 1, runner.layer_devices[policy.layer])

    @property
    def start(self) -> int:
        """Tokens that are prefilled."""
        return self._context.start

    @property
    def chunk_tokens(self) -> int:
        """Tokens that a step reads at most."""
        return self._chunk

    @property
    def done(self) -> bool:
        return self.start >= self._context.prompt_length

    def step(self, rows: Sequence[int] | None = None) -> Tensor | None:
        """Run the next chunk. Returns logits [1, V] of its last token, which is the prompt's last one when done.

        None for an earlier chunk, unless every_row, and where the prefill begins again.
        rows: with every_row, positions in the prompt, of this chunk, whose logits [len(rows), V] are returned instead.
        """
        begin = self._context.start
        end = min(begin + self._chunk, self._context.prompt_length)
        wanted = None if rows is None else torch.tensor([row - begin for row in rows], device=self._ids.device)
        logits = None
        with suppress(PromptGoesOn):
            logits = self._runner.prefill(
                self._ids[:, begin:end], self._arena, self._extent, self._context, self._bound, wanted
            )
        self._context.start = end
        if self._measured is not None:
            self._measured.send(begin, end)
            # The device has this chunk to do while the host waits for the one before.
            if self._went_beyond(self._measured, newest=0 if self.done else 1):
                self._measured = None
                self._context = replace(self._context, start=0, keys={}, windows={}, probe=None, dense=True)
                return None
        return logits

    def _went_beyond(self, measured: ProbeReadings, newest: int) -> bool:
        """Whether one of the sampled blocks, of all chunks but the newest, has too large an error; `plan` says so."""
        for index, error in measured.read(newest):
            self.plan = replace(self.plan, output_error=max(error, self.plan.output_error or 0.0))
            if not error <= measured.limit:  # not a number is beyond it, too
                tokens = self._context.prompt_length
                first, end = measured.probe.tokens(index, tokens)
                found = f"attention output is off by {error:.4f} (tokens {first:,} to {end - 1:,})"
                reason = f"sparse prefill's {found}, --max-output-error allows {measured.limit}"
                self.plan = dense_instead(self._runner, self.plan, tokens, reason)
                return True
        return False
