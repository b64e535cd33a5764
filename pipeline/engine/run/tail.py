"""Prefill of what stands behind a shared prefix."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.kv.arena import Arena, Extent
from pipeline.engine.model.runner import ModelRunner

# Tokens of one step, each a row of decode attention: what a question has, and enough to fill a GPU. Long ones cost a
# reading of the weights and of the prefix a step.
TAIL_CHUNK = 128


class TailPrefill:
    """Reads the tokens behind a prefix, densely, in chunks of TAIL_CHUNK whatever else is set. Waits for nothing.

    prefix: the extent that holds the prefix_tokens tokens before them. extent: of these tokens and of the output.
    tail_ids: int64 [tokens]. max_length: a bound on prefixes, the same for all.
    """

    def __init__(
        self,
        runner: ModelRunner,
        arena: Arena,
        prefix: Extent,
        prefix_tokens: int,
        extent: Extent,
        tail_ids: np.ndarray,
        max_length: int,
    ) -> None:
        self._runner = runner
        self._arena = arena
        self._prefix = prefix
        self._prefix_tokens = prefix_tokens
        self._extent = extent
        self._ids = runner.on_device(tail_ids)
        self._bound = torch.full((1,), prefix_tokens, device=runner.device)
        self._max_length = max_length
        self._read = 0
        if arena.states is not None:
            arena.states.copy(prefix.start, extent.start)

    @property
    def done(self) -> bool:
        return self._read == self._ids.shape[1]

    def step(self, every_token: bool = False) -> Tensor:
        """Read the next chunk. Returns logits [1, V] of its last token, or [L, V] of each."""
        ids = self._ids[:, self._read : self._read + TAIL_CHUNK]
        logits = self._runner.read_behind(
            ids, self._arena, self._prefix, self._prefix_tokens, self._extent, self._read, self._bound,
            self._max_length, every_token,
        )  # fmt: skip
        self._read += ids.shape[1]
        return logits
