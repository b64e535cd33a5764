"""The part of a prompt that several requests share, on its way through the engine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.engine.document import Document
from pipeline.engine.kv.arena import Extent, aligned
from pipeline.engine.run.prefill import AttentionPlan, Prefill


@dataclass(eq=False)
class Prefix:
    """A SharedPrompt's prefix_ids, int64 [tokens], and the requests that stand behind it.

    It enters the arena with room for the longest of them, the lane, which it keeps while any wait: whatever else fills
    the arena, they come in one after the other at least. Those that fit beside the lane get extents of their own. The
    prefix's extent is given back when its last request has ended.

    waiting: requests that have not begun, in order. live: those that have. lane_free: whether nobody is in the lane.
    plan: how the prefix attends, once it has started. seconds: in which it was read.
    """

    ids: np.ndarray
    chunk_tokens: int | None = None
    waiting: deque[Document] = field(default_factory=deque)
    live: list[Document] = field(default_factory=list)
    extent: Extent | None = None
    lane: Extent | None = None
    lane_free: bool = True
    prefill: Prefill | None = None
    plan: AttentionPlan | None = None
    overtaken: int = 0
    started: float = 0.0
    seconds: float = 0.0
    _charged: bool = False

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

    def charge(self) -> tuple[int, float]:
        """For a request that ends: the prefix's tokens that were read for another one, and the seconds that are its to
        pay. The first that ends of those that share it pays.
        """
        if self._charged:
            return self.tokens, 0.0
        self._charged = self.started > 0
        return 0, self.seconds
