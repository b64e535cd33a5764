"""The engine's thread: whatever one request comes to, the others get their completions."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from patience import patient

from pipeline.engine.config import Completion, Request, SharedPrompt
from pipeline.workers.loop import EngineLoop


class Gated:
    """Completes what it holds, one a step, when the gate is open; refuses ids that it holds."""

    max_context = 100

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.held: list[str] = []

    @property
    def has_work(self) -> bool:
        return bool(self.held) and self.gate.is_set()

    def add_shared(self, shared: SharedPrompt) -> None:
        names = [request.request_id for request in shared.requests]
        if set(names) & set(self.held):
            raise ValueError("in the engine already")
        self.held += names

    def step(self) -> list[Completion]:
        return [Completion(self.held.pop(0), "ok")]

    def abort(self, request_id: str) -> bool:
        return False

    def describe(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        return


def test_a_doubled_id_does_not_cost_the_first_request_its_completion() -> None:
    engine = Gated()
    loop = EngineLoop(lambda: engine)
    (first,), (second,) = (loop.submit(SharedPrompt([1], (Request("a#2.0", [1], 1),))) for _ in range(2))
    with pytest.raises(ValueError, match="in the engine already"):
        second.result(timeout=patient(10))
    engine.gate.set()
    loop.abort([])  # wakes it
    assert first.result(timeout=patient(10)).status == "ok"
    loop.close()
