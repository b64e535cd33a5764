"""The part of a prompt that several requests share, on its way through the engine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.engine.document import Document
from pipeline.engine.kv.arena import ALIGNMENT, Extent, aligned
from pipeline.engine.run.prefill import AttentionPlan, Prefill


@dataclass(eq=False)
class Prefix:
    """The beginning of a SharedPrompt, int64 [tokens], and the requests that stand behind it.

    It is prefix_ids up to the last whole unit of the arena (ALIGNMENT); `rest`, what is left of them, each request
    reads with its own tokens. So what lies in the lane lies behind the prefix without a gap.

    It enters the arena with room for the longest of them, the lane, which it keeps while any wait: whatever else fills
    the arena, they come in one after the other at least. Those that fit beside the lane get extents of their own. The
    prefix's extent is given back when its last request has ended.

    waiting: requests that have not begun, in order. live: those that have. lane_free: whether nobody is in the lane.
    in_one_piece: whether its one request is in the lane and goes on as any document does whose prompt was read at once.
    plan: how the prefix attends, once it has started. seconds: in which it was read.
    """

    ids: np.ndarray
    rest: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    chunk_tokens: int | None = None
    waiting: deque[Document] = field(default_factory=deque)
    live: list[Document] = field(default_factory=list)
    extent: Extent | None = None
    lane: Extent | None = None
    lane_free: bool = True
    in_one_piece: bool = False
    prefill: Prefill | None = None
    plan: AttentionPlan | None = None
    overtaken: int = 0
    started: float = 0.0
    seconds: float = 0.0
    _charged: bool = False

    @staticmethod
    def of(prefix_ids: np.ndarray, chunk_tokens: int | None, requests: int, states: bool) -> Prefix:
        """states: whether the model keeps states, which the prefix and its requests have each for themselves."""
        whole = len(prefix_ids) // ALIGNMENT * ALIGNMENT or len(prefix_ids)
        prefix = Prefix(prefix_ids[:whole], prefix_ids[whole:], chunk_tokens)
        prefix.in_one_piece = requests == 1 and whole % ALIGNMENT == 0 and not states
        return prefix

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def need(self) -> int:
        """Arena tokens to begin with: the prefix and its lane, which lie in one piece."""
        return aligned(self.tokens) + max(document.need for document in self.waiting)

    @property
    def documents(self) -> Sequence[Document]:
        """Those that have not begun."""
        return self.waiting

    @property
    def is_read(self) -> bool:
        """Whether requests can begin."""
        return self.extent is not None and self.prefill is None and self.started > 0

    def enter(self, extent: Extent) -> None:
        """Begin in an extent of `need` tokens."""
        size = aligned(self.tokens)
        self.extent = Extent(extent.start, size)
        self.lane = Extent(extent.start + size, extent.tokens - size)
        self.started = time.perf_counter()

    def stop_clock(self) -> None:
        """The prefix was read, or reading it failed."""
        self.seconds = time.perf_counter() - self.started

    @property
    def owed_seconds(self) -> float:
        """Seconds in which it was read, as long as no request has paid for them."""
        return 0.0 if self._charged else self.seconds

    def charge(self) -> tuple[int, float]:
        """For a request that ends: the prefix's tokens that were read for another one, and the seconds that are its to
        pay. The first that ends of those that share it pays.
        """
        if self._charged:
            return self.tokens, 0.0
        self._charged = self.started > 0
        return 0, self.seconds
