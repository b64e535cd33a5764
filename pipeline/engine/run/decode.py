"""Decode: steps of the whole batch, as CUDA graphs on GPUs, and tokens read back behind them."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from kernels.decode_attention import Prefixes
from kernels.prompt_lookup import find_drafts
from pipeline.engine.kv.arena import Arena
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.run.batch import (
    BOUND,
    EMITTED,
    IDLE,
    LENGTH,
    LIMIT,
    PREFIX_LENGTH,
    PREFIX_START,
    START,
    TOKEN,
    DecodeBatch,
)
from pipeline.engine.run.graphs import Graphs
from pipeline.engine.run.lookup import DRAFTS
from stem_core.errors import first_line

Tag = TypeVar("Tag")


def batch_bucket(rows: int, max_rows: int) -> int:
    """The next power of two, at most `max_rows`."""
    return min(1 << (rows - 1).bit_length(), max_rows)


def group_bucket(rows: int) -> int:
    """The next power of two of the rows that share a prefix; 0 for none."""
    return 1 << (rows - 1).bit_length() if rows else 0


@dataclass(frozen=True)
class StepKey:
    """What a captured step is specialised to: the rows [0, rows), whether any of them samples, how many share a prefix
    at most (0: no document has one), and the drafts that each row verifies (0 or DRAFTS).

    Not the documents' lengths: the decode kernel cuts each document into a fixed number of shares of its own length, so
    the longest length that the engine admits can bound every step, and no result depends on a neighbour's length.
    """

    rows: int
    sampled: bool
    shared: int = 0
    drafts: int = 0


class DecodeRunner:
    """Runs decode steps of a DecodeBatch against the arena; documents come to at most `max_context` tokens.

    A step is one graph. Where rows are masked it is two, forward() and sample(), so that the host computes the masks,
    for which it needs the token before, while the device is in the first; and three where rows verify drafts, which
    draft() finds, so that the host can read those, too.

    masks: int32 [rows * places, W + 1], what sample() reads (pipeline.engine.run.masks.TokenMasks); None: no row is
    ever masked. lookup: whether steps with drafts may come.
    """

    def __init__(
        self,
        runner: ModelRunner,
        arena: Arena,
        batch: DecodeBatch,
        max_context: int,
        use_graphs: bool,
        masks: Tensor | None = None,
        lookup: bool = False,
    ) -> None:
        self._runner = runner
        self._arena = arena
        self._batch = batch
        self._max_context = max_context
        self._lookup = lookup
        self._capturer = Graphs(runner.devices) if use_graphs else None
        self._masks = masks
        # What forward() leaves to sample(): a captured one's is always the same tensor.
        self._logits: dict[StepKey, Tensor] = {}
        self._warm: set[Hashable] = set()
        # By step, or part of one; None for what cannot be captured.
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self.mode = "cuda graphs" if use_graphs else "eager"

    def run(self, key: StepKey) -> None:
        """One step of rows [0, key.rows): launched, not waited for.

        The first step of a key runs eagerly (kernels compile and handles are made), the second is captured.
        """
        self._launch(key, lambda: self._step(key))

    def draft(self, key: StepKey) -> None:
        """Find the drafts that forward() of the same step verifies (DecodeBatch.drafts): launched, not waited for."""
        self._launch(("draft", replace(key, sampled=False)), lambda: self._find_drafts(key))

    def forward(self, key: StepKey) -> None:
        """The model's part of a step of rows [0, key.rows): launched, not waited for. sample() must follow."""
        self._launch(("forward", replace(key, sampled=False)), lambda: self._forward(key))

    def sample(self, key: StepKey) -> None:
        """The rest of the step that forward() began: masks, the rows' next tokens."""
        forward = ("forward", replace(key, sampled=False))
        if forward in self._graphs and self._graphs[forward] is None:  # its logits are another tensor each time
            self._sample(key)
        else:
            self._launch(("sample", key), lambda: self._sample(key))

    def _launch(self, part: Hashable, work: Callable[[], None]) -> None:
        """Run `work` eagerly for the first time; then capture it, and replay that from then on."""
        if self._capturer is None or part not in self._warm:
            work()
            self._warm.add(part)
            return
        if part not in self._graphs:
            self._graphs[part] = self._capture(self._capturer, part, work)
        graph = self._graphs[part]
        if graph is None:
            work()
        else:
            self._capturer.replay(graph)

    @torch.inference_mode()
    def prepare(self) -> None:
        """Capture the steps that take most memory, those of all rows: the others, when they first come, fit the same.

        So the first token waits for few of them, and a job captures those alone that it has. All rows must be idle:
        only the scratch token is written.
        """
        if self._capturer is None and self._runner.device.type != "cuda":
            return
        rows = self._batch.rows
        for _ in range(1 if self._capturer is None else 2):
            self.run(StepKey(rows, sampled=True))
            if self._lookup:
                self.run(StepKey(rows, sampled=False, drafts=DRAFTS))
            if self._masks is not None:
                for drafts in (0, DRAFTS) if self._lookup else (0,):
                    key = StepKey(rows, sampled=True, drafts=drafts)
                    if drafts:
                        self.draft(key)
                    self.forward(key)
                    self.sample(key)

    def launch_kernels(self) -> None:
        """Launch the kernels of steps of every number of rows, to compile them (pipeline.engine.memory.rehearsal).

        The tokens are given, since what kernels find means nothing then. All rows must be idle.
        """
        buckets = sorted({batch_bucket(rows, self._batch.rows) for rows in range(1, self._batch.rows + 1)})
        # Triton compiles apart for 1, for multiples of 16, and for other numbers.
        for rows in {(rows == 1, rows % 16 == 0): rows for rows in buckets}.values():
            self._decode(StepKey(rows, sampled=False))
            if self._lookup:
                key = StepKey(rows, sampled=False, drafts=DRAFTS)
                self._find_drafts(key)
                self._batch.drafts.fill_(IDLE)
                self._verify_drafts(key)

    def _step(self, key: StepKey) -> None:
        if key.drafts:
            self._find_drafts(key)
            self._batch.advance_verified(self._verify_drafts(key), key.sampled)
        else:
            self._batch.advance(self._decode(key), 0, key.sampled)

    def _forward(self, key: StepKey) -> None:
        self._logits[replace(key, sampled=False)] = self._verify_drafts(key) if key.drafts else self._decode(key)

    def _sample(self, key: StepKey) -> None:
        assert self._masks is not None
        logits = self._logits[replace(key, sampled=False)]
        masks = self._masks[: key.rows * (1 + key.drafts)]
        if key.drafts:
            self._batch.advance_verified(logits, key.sampled, masks)
        else:
            self._batch.advance(logits, 0, key.sampled, masks)

    def _decode(self, key: StepKey) -> Tensor:
        """Logits [rows, V] behind the rows' newest tokens."""
        ints = self._batch.ints[:, : key.rows]
        where = ints[START], ints[LENGTH], ints[BOUND], self._arena, self._max_context, self._prefixes(key)
        return self._runner.decode(ints[TOKEN], *where)

    def _verify_drafts(self, key: StepKey) -> Tensor:
        """Logits [rows, 1 + key.drafts, V] behind the rows' newest tokens and drafts."""
        ints = self._batch.ints[:, : key.rows]
        drafts = self._batch.drafts[: key.rows]
        tokens = torch.cat([ints[TOKEN][:, None], drafts.clamp(min=0)], dim=1)
        where = ints[START], ints[LENGTH], ints[BOUND], self._arena, self._max_context, self._prefixes(key)
        return self._runner.verify(tokens, (drafts >= 0).sum(dim=1), *where)

    def _find_drafts(self, key: StepKey) -> None:
        """Set DecodeBatch.drafts, as many for each row as it may all emit."""
        ints = self._batch.ints[:, : key.rows]
        lengths = ints[LENGTH]
        before = ints[PREFIX_LENGTH] if key.shared else torch.zeros_like(lengths)
        # The newest token lies with the others from here on; its keys and values come in this step, too.
        slots = (ints[START] + lengths - 1 - before).masked_fill(lengths == 0, self._arena.scratch)
        self._arena.ids.index_copy_(0, slots, ints[TOKEN].to(torch.int32))
        drafts, counts = find_drafts(
            self._arena.ids,
            ints[START],
            lengths,
            drafts=key.drafts,
            max_length=self._max_context,
            prefix_starts=ints[PREFIX_START] if key.shared else None,
            prefix_lengths=before if key.shared else None,
        )
        counts = counts.minimum(ints[LIMIT] - ints[EMITTED] - 1)
        there = torch.arange(key.drafts, device=counts.device) < counts[:, None]
        self._batch.drafts[: key.rows] = drafts.masked_fill(~there, IDLE)

    def _prefixes(self, key: StepKey) -> Prefixes | None:
        """What rows of a step share; None for nothing."""
        if not key.shared:
            return None
        ints = self._batch.ints[:, : key.rows]
        return Prefixes(
            starts=ints[PREFIX_START],
            lengths=ints[PREFIX_LENGTH].to(torch.int32),
            members=self._batch.members[: key.rows, : key.shared],
            max_length=self._max_context,
        )

    def _capture(self, capturer: Graphs, part: Hashable, work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """The captured step; None, and a warning, for a model whose step cannot be captured."""
        try:
            return capturer.capture(work)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.mode = f"eager for {part} at least (capture failed: {first_line(error)})"
            warnings.warn(f"decode steps {part} run without CUDA graphs: {error}", RuntimeWarning, stacklevel=3)
            return None


class Readback(Generic[Tag]):
    """Brings each step's report to the host without stalling the device.

    values: of a report at most. push() starts a copy, pop() waits for the oldest one. On a GPU a copy lands in pinned
    memory, followed by an event.
    """

    def __init__(self, values: int, depth: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        # A slot is used again only after its report was popped.
        self._slots = [torch.empty(values, dtype=torch.int64, pin_memory=self._on_gpu) for _ in range(depth)]
        self._events = [torch.cuda.Event() for _ in range(depth)] if self._on_gpu else []
        self._pending: deque[tuple[int, torch.Size, Tag]] = deque()
        self._next = 0

    def __len__(self) -> int:
        return len(self._pending)

    def push(self, report: Tensor, tag: Tag) -> None:
        """Queue a copy of a contiguous report, int64 [S, L]; `tag` comes back with it."""
        if len(self._pending) == len(self._slots):
            raise RuntimeError(f"{len(self._slots)} reports are pending already: pop one first")
        slot = self._next
        self._next = (slot + 1) % len(self._slots)
        self._slots[slot][: report.numel()].copy_(report.view(-1), non_blocking=True)
        if self._on_gpu:
            self._events[slot].record()
        self._pending.append((slot, report.shape, tag))

    def pop(self) -> tuple[list[list[int]], Tag]:
        """The oldest report, waited for."""
        slot, shape, tag = self._pending.popleft()
        if self._on_gpu:
            self._events[slot].synchronize()
        return self._slots[slot][: shape.numel()].view(shape).tolist(), tag

    def clear(self) -> None:
        """Forget what is pending."""
        self._pending.clear()
