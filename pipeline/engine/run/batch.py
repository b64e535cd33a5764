"""The decode batch: one row per live document, all of its state in static device tensors.

A step reads and advances the rows without the host: a captured CUDA graph replays it, and several steps can be in
flight before the host looks at a token. A row that stopped has length 0 from then on, so that steps launched before the
host knew change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.token_mask import mask_tokens
from pipeline.engine.kv.arena import Extent
from pipeline.engine.run.sampling import greedy, sample, uniforms

TOKEN, START, LENGTH, EMITTED, LIMIT, SEED, TOP_K = range(7)
FIELDS = 7
# Stop ids per document; models have a handful of end-of-sequence ids.
MAX_STOP_IDS = 32
# What a step reports for a row: a token id, or one of these.
IDLE, NOT_FINITE = -1, -2


@dataclass(frozen=True)
class RowStart:
    """What a document brings into its row once its prompt is in the arena."""

    extent: Extent
    prompt_tokens: int
    max_new_tokens: int
    seed: int
    stop_ids: tuple[int, ...]
    temperature: float
    top_p: float
    top_k: int = 0  # all
    min_p: float = 0.0


class DecodeBatch:
    """State of `rows` documents.

    ints: int64 [FIELDS + MAX_STOP_IDS, rows]; by row: the newest token, the extent's start, tokens in the arena with
        the newest one counted (0: idle), tokens generated, their limit, the seed, top_k (0: all), and the stop ids (-1
        where fewer).
    floats: float32 [3, rows]: temperature, top_p, min_p. report: int64 [rows]: what the last step gave.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows = rows
        self.ints = torch.zeros(FIELDS + MAX_STOP_IDS, rows, dtype=torch.int64, device=device)
        self.floats = torch.zeros(3, rows, dtype=torch.float32, device=device)
        self.report = torch.full((rows,), IDLE, dtype=torch.int64, device=device)

    def begin(self, row: int, start: RowStart) -> None:
        """Fill a row, in stream order and without waiting. Its first token comes from `advance` on prefill logits."""
        stops = [*start.stop_ids, *[-1] * (MAX_STOP_IDS - len(start.stop_ids))]
        if len(stops) > MAX_STOP_IDS:
            raise ValueError(f"at most {MAX_STOP_IDS} stop ids are supported, got {len(start.stop_ids)}")
        values = [0, start.extent.start, start.prompt_tokens, 0, start.max_new_tokens, start.seed, start.top_k, *stops]
        ints = torch.tensor(values, dtype=torch.int64)
        floats = torch.tensor([start.temperature, start.top_p, start.min_p], dtype=torch.float32)
        if self.ints.is_cuda:
            ints, floats = ints.pin_memory(), floats.pin_memory()
        self.ints[:, row].copy_(ints, non_blocking=True)
        self.floats[:, row].copy_(floats, non_blocking=True)

    def clear(self, row: int) -> None:
        """Make a row idle."""
        self.ints[LENGTH, row] = 0

    def move(self, source: int, target: int) -> None:
        """Move a document to another row; the old row becomes idle."""
        self.ints[:, target] = self.ints[:, source]
        self.floats[:, target] = self.floats[:, source]
        self.clear(source)

    def advance(self, logits: Tensor, first: int, sampled: bool, masks: Tensor | None = None) -> None:
        """Take the next token of rows [first, first + S) from logits [S, V], and stop the rows that are done.

        sampled: whether any of them may have a temperature; False saves the sort.
        masks: int32 [S, W + 1], what may come next in which of them (pipeline.engine.run.masks.TokenMasks); the logits
        are changed in place. None: anything in all of them.
        """
        rows = slice(first, first + logits.shape[0])
        ints = self.ints[:, rows]
        live = ints[LENGTH] > 0
        finite = torch.isfinite(logits.amax(dim=-1))
        if masks is not None:
            mask_tokens(logits, masks[:, :-1], masks[:, -1])
        if sampled:
            draws = uniforms(ints[SEED], ints[EMITTED])
            temperatures, top_ps, min_ps = self.floats[:, rows]
            token = sample(logits, temperatures, top_ps, ints[TOP_K], min_ps, draws)
        else:
            token = greedy(logits)
        emitted = ints[EMITTED] + live
        stopped = (ints[FIELDS:] == token).any(dim=0) | (emitted >= ints[LIMIT]) | ~finite
        self.report[rows] = token.masked_fill(~finite, NOT_FINITE).masked_fill(~live, IDLE)
        ints[TOKEN] = token.masked_fill(~finite, 0)
        ints[EMITTED] = emitted
        ints[LENGTH] = (ints[LENGTH] + 1).masked_fill(~live | stopped, 0)
