"""An engine in virtual time: what it does next, and when that ends."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

from tools.simulate.cost import EngineCost

Key = TypeVar("Key", int, str)


class SimulatedEngine(Generic[Key]):
    """Prefills one document at a time while a place in the batch is free, else decodes all it holds, as
    pipeline.engine.Engine does. next_at: when the present piece of work ends; None while there is none.
    """

    def __init__(self, cost: EngineCost, new_tokens: int) -> None:
        self._cost = cost
        self._new_tokens = new_tokens
        self._waiting: deque[tuple[Key, int]] = deque()
        self._prefilling: tuple[Key, int] | None = None
        self._live: list[tuple[float, Key, int]] = []  # heap by the step that writes the last token
        self._live_tokens = 0
        self._steps = 0.0  # decode steps since the beginning
        self._since = 0.0  # when the present piece of work began
        self.next_at: float | None = None
        self.busy_seconds = 0.0

    def add(self, now: float, key: Key, tokens: int) -> None:
        """Take a document; decoding pauses for its prefill if a place is free."""
        self._waiting.append((key, tokens))
        if self._prefilling is None and len(self._live) < self._cost.max_live:
            self._account(now)
            self._choose(now)

    def advance(self, now: float) -> list[Key]:
        """End the present piece of work, at `next_at`; the documents that are done."""
        self._account(now)
        done = []
        if self._prefilling is not None:
            key, tokens = self._prefilling
            self._prefilling = None
            self._live_tokens += tokens
            # The prefill gave the first token.
            heapq.heappush(self._live, (self._steps + self._new_tokens - 1, key, tokens))
        else:
            self._steps = self._live[0][0]  # not a sum of rounded times
        while self._live and self._live[0][0] <= self._steps:
            _, key, tokens = heapq.heappop(self._live)
            self._live_tokens -= tokens
            done.append(key)
        self._choose(now)
        return done

    @property
    def _step_seconds(self) -> float:
        return self._cost.step + self._cost.step_token * self._live_tokens

    def _account(self, now: float) -> None:
        """Count the work from `_since` to now."""
        if self.next_at is not None:
            self.busy_seconds += now - self._since
            if self._prefilling is None:
                self._steps += (now - self._since) / self._step_seconds

    def _choose(self, now: float) -> None:
        self._since = now
        if self._waiting and len(self._live) < self._cost.max_live:
            self._prefilling = self._waiting.popleft()
            self.next_at = now + self._cost.prefill(self._prefilling[1])
        elif self._live:
            self.next_at = now + max(0.0, self._live[0][0] - self._steps) * self._step_seconds
        else:
            self.next_at = None


def job_seconds(tokens: Sequence[int], cost: EngineCost, new_tokens: int) -> float:
    """Seconds that one engine takes for these documents, all given to it at once."""
    engine: SimulatedEngine[int] = SimulatedEngine(cost, new_tokens)
    for number, length in enumerate(tokens):
        engine.add(0.0, number, length)
    now = 0.0
    while engine.next_at is not None:
        now = engine.next_at
        engine.advance(now)
    return now
