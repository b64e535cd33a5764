"""The decode batch: one row per live document, all of its state in static device tensors.

A step reads and advances the rows without the host: a captured CUDA graph replays it, and several steps can be in
flight before the host looks at a token. A row that stopped has length 0 from then on, so that steps launched before the
host knew change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.token_mask import mask_tokens
from pipeline.engine.kv.arena import Extent
from pipeline.engine.run.lookup import DRAFTS
from pipeline.engine.run.sampling import greedy, penalise, sample, uniforms

TOKEN, START, LENGTH, EMITTED, LIMIT, BOUND, SEED, TOP_K, PREFIX_START, PREFIX_LENGTH = range(10)
FIELDS = 10
# Stop ids per document; models have a handful of end-of-sequence ids.
MAX_STOP_IDS = 32
# What a step reports for a row: a token id, or one of these.
IDLE, NOT_FINITE = -1, -2


@dataclass(frozen=True)
class RowStart:
    """What a document brings into its row once its prompt is in the arena.

    prefix_start, prefix_tokens: where the beginning of its prompt lies that it shares, and how many of prompt_tokens
    that are; `extent` has the others. 0 tokens: it shares nothing. prompt_ids: int64, all of them, where a
    repetition_penalty other than 1 asks for them. bound: tokens by which a RoPE that goes by a
    document's length goes; None: by all that it can come to.
    """

    extent: Extent
    prompt_tokens: int
    max_new_tokens: int
    seed: int
    stop_ids: tuple[int, ...]
    temperature: float
    top_p: float
    top_k: int = 0  # all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    prompt_ids: np.ndarray | None = None
    prefix_start: int = 0
    prefix_tokens: int = 0
    bound: int | None = None


class DecodeBatch:
    """State of `rows` documents.

    ints: int64 [FIELDS + MAX_STOP_IDS, rows]; by row: the newest token, the extent's start, tokens in the arena with
        the newest one counted (0: idle), tokens generated, their limit, RowStart.bound, the seed, top_k (0: all), the
        start of the shared prefix's extent and the tokens there (0: none), and the stop ids (-1 where fewer).
    floats: float32 [4, rows]: temperature, top_p, min_p, repetition_penalty. seen: int32 [rows, ceil(vocabulary / 32)]:
        the tokens of prompt and output of rows with a penalty (pipeline.engine.run.sampling.penalise).
    report: int64 [rows]: what the last step gave. verified: int64 [rows, 1 + DRAFTS]: what the last step with drafts
        gave, IDLE behind a row's last token. drafts: int64 [rows, DRAFTS]: what the newest such step verifies, IDLE
        behind a row's last draft.
    members: int32 [rows, rows]: the rows that share a prefix, in ascending order, and -1 behind them; groups in the
        order of their first rows, so that those of the first n rows are among the first n. largest_group: rows of the
        largest one, 0 if there is none.
    """

    def __init__(self, rows: int, device: torch.device, vocabulary: int) -> None:
        self.rows = rows
        self.ints = torch.zeros(FIELDS + MAX_STOP_IDS, rows, dtype=torch.int64, device=device)
        self.floats = torch.zeros(4, rows, dtype=torch.float32, device=device)
        self.seen = torch.zeros(rows, -(-vocabulary // 32), dtype=torch.int32, device=device)
        self.report = torch.full((rows,), IDLE, dtype=torch.int64, device=device)
        self.verified = torch.full((rows, 1 + DRAFTS), IDLE, dtype=torch.int64, device=device)
        self.drafts = torch.full((rows, DRAFTS), IDLE, dtype=torch.int64, device=device)
        self.members = torch.full((rows, rows), -1, dtype=torch.int32, device=device)
        self.largest_group = 0
        self._prefixes: dict[int, int] = {}  # by row: where its prefix begins
        self._groups = 0

    def begin(self, row: int, start: RowStart) -> None:
        """Fill a row, in stream order and without waiting. Its first token comes from `advance` on prefill logits."""
        stops = [*start.stop_ids, *[-1] * (MAX_STOP_IDS - len(start.stop_ids))]
        if len(stops) > MAX_STOP_IDS:
            raise ValueError(f"at most {MAX_STOP_IDS} stop ids are supported, got {len(start.stop_ids)}")
        bound = start.prompt_tokens + start.max_new_tokens if start.bound is None else start.bound
        values = [0, start.extent.start, start.prompt_tokens, 0, start.max_new_tokens, bound, start.seed, start.top_k]
        values += [start.prefix_start, start.prefix_tokens, *stops]
        ints = torch.tensor(values, dtype=torch.int64)
        settings = [start.temperature, start.top_p, start.min_p, start.repetition_penalty]
        floats = torch.tensor(settings, dtype=torch.float32)
        if self.ints.is_cuda:
            ints, floats = ints.pin_memory(), floats.pin_memory()
        self.ints[:, row].copy_(ints, non_blocking=True)
        self.floats[:, row].copy_(floats, non_blocking=True)
        if start.prompt_ids is not None:
            there = np.zeros(32 * self.seen.shape[1], dtype=bool)
            there[start.prompt_ids] = True
            words = torch.from_numpy(np.packbits(there, bitorder="little").view(np.int32))
            self.seen[row].copy_(words.pin_memory() if self.seen.is_cuda else words, non_blocking=True)
        self._prefixes.pop(row, None)
        if start.prefix_tokens:
            self._prefixes[row] = start.prefix_start
        self._regroup()

    def clear(self, row: int) -> None:
        """Make a row idle."""
        self.ints[LENGTH, row] = 0
        self._prefixes.pop(row, None)
        self._regroup()

    def move(self, source: int, target: int) -> None:
        """Move a document to another row; the old row becomes idle."""
        self.ints[:, target] = self.ints[:, source]
        self.floats[:, target] = self.floats[:, source]
        self.seen[target] = self.seen[source]
        if source in self._prefixes:
            self._prefixes[target] = self._prefixes[source]
        self.clear(source)

    def _regroup(self) -> None:
        """Set `members`, in stream order and without waiting."""
        groups: dict[int, list[int]] = {}
        for row in sorted(self._prefixes):
            groups.setdefault(self._prefixes[row], []).append(row)
        self.largest_group = max(map(len, groups.values()), default=0)
        changed = max(len(groups), self._groups)
        self._groups = len(groups)
        if changed:
            table = [rows + [-1] * (self.rows - len(rows)) for rows in groups.values()]
            table += [[-1] * self.rows] * (changed - len(groups))
            members = torch.tensor(table, dtype=torch.int32)
            self.members[:changed].copy_(members.pin_memory() if self.members.is_cuda else members, non_blocking=True)

    def advance(self, logits: Tensor, first: int, sampled: bool, masks: Tensor | None = None) -> None:
        """Take the next token of rows [first, first + S) from logits [S, V], and stop the rows that are done.

        sampled: whether any of them may have a temperature or a repetition penalty; False saves the sort.
        masks: int32 [S, W + 1], what may come next in which of them (pipeline.engine.run.masks.TokenMasks); the logits
        are changed in place. None: anything in all of them.
        """
        rows = slice(first, first + logits.shape[0])
        ints = self.ints[:, rows]
        live = ints[LENGTH] > 0
        finite = torch.isfinite(logits.amax(dim=-1))
        if masks is not None:
            mask_tokens(logits, masks[:, :-1], masks[:, -1])
        token = self._choose(logits, rows, ints[EMITTED], sampled)
        if sampled:
            word = (token // 32)[:, None]
            bit = (1 << token % 32).to(torch.int32)[:, None]
            self.seen[rows].scatter_(1, word, self.seen[rows].gather(1, word) | bit)
        emitted = ints[EMITTED] + live
        stopped = (ints[FIELDS:] == token).any(dim=0) | (emitted >= ints[LIMIT]) | ~finite
        self.report[rows] = token.masked_fill(~finite, NOT_FINITE).masked_fill(~live, IDLE)
        ints[TOKEN] = token.masked_fill(~finite, 0)
        ints[EMITTED] = emitted
        ints[LENGTH] = (ints[LENGTH] + 1).masked_fill(~live | stopped, 0)

    def advance_verified(self, logits: Tensor, sampled: bool, masks: Tensor | None = None) -> None:
        """Take the next tokens of rows [0, S) from logits [S, L, V] behind their newest tokens and L - 1 drafts.

        masks: int32 [S * L, W + 1], as in advance(), by row and place; the logits are changed in place.
        What comes behind a draft counts if the draft is the very token that was chosen before it, greedily or with the
        draw of its place in the output. So a row gets the tokens that single steps would have given it, as many of them
        as it guessed and one more. Rows with a repetition penalty must not be among them: each draft would change the
        scores behind it.
        """
        S, L = logits.shape[:2]
        rows = slice(0, S)
        ints = self.ints[:, rows]
        live = ints[LENGTH] > 0
        after = torch.arange(L, device=logits.device)
        finite = torch.isfinite(logits.amax(dim=-1))
        if masks is not None:
            mask_tokens(logits.view(S * L, -1), masks[:, :-1], masks[:, -1])
        # One place after the other: sampling sorts, and all places together would take L times the memory.
        chosen = [self._choose(logits[:, place], rows, ints[EMITTED] + place, sampled) for place in range(L)]
        tokens = torch.stack(chosen, dim=1)
        right = tokens[:, :-1] == self.drafts[rows, : L - 1]
        reached = torch.cat([live[:, None], right], dim=1).cumprod(dim=1)
        stops = (ints[FIELDS:, :, None] == tokens).any(dim=0) | ~finite
        stops |= ints[EMITTED][:, None] + after + 1 >= ints[LIMIT][:, None]
        stopped_before = stops.cumsum(dim=1) - stops.long()
        taken = (reached > 0) & (stopped_before == 0)
        count = taken.sum(dim=1)
        newest = tokens.masked_fill(~finite, 0).gather(1, (count - 1).clamp(min=0)[:, None])[:, 0]
        self.verified[rows, :L] = tokens.masked_fill(~finite, NOT_FINITE).masked_fill(~taken, IDLE)
        ints[TOKEN] = newest
        ints[EMITTED] += count
        ints[LENGTH] = (ints[LENGTH] + count).masked_fill(~live | (taken & stops).any(dim=1), 0)

    def _choose(self, logits: Tensor, rows: slice, emitted: Tensor, sampled: bool) -> Tensor:
        """The next tokens int64 [S] of rows of which each has emitted so many, from logits [S, V]."""
        if not sampled:
            return greedy(logits)
        ints = self.ints[:, rows]
        temperatures, top_ps, min_ps, penalties = self.floats[:, rows]
        scores = penalise(logits, self.seen[rows], penalties)
        return sample(scores, temperatures, top_ps, ints[TOP_K], min_ps, uniforms(ints[SEED], emitted))
