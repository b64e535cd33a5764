"""The engine's thread: whatever one request comes to, the others get their completions."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import pytest
from patience import patient

from pipeline.engine.config import Completion, Request, SharedPrompt, SoFar
from pipeline.workers.loop import EngineBrokenError, EngineLoop


class Gated:
    """Completes what it holds, one a step, when the gate is open; refuses ids that it holds."""

    max_context = 100

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.held: list[str] = []
        self.closed = threading.Event()

    @property
    def so_far(self) -> dict[str, SoFar]:
        return {}

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
        self.closed.set()


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


class Tensors:
    """What a step holds."""


class Breaking(Gated):
    """Its step raises, with something large at hand."""

    held_by_step: weakref.ref[Tensors]

    def step(self) -> list[Completion]:
        large = Tensors()
        self.held_by_step = weakref.ref(large)
        raise RuntimeError("the device is gone")


def test_a_broken_engine_gives_its_memory_back_at_once() -> None:
    engine = Breaking()
    loop = EngineLoop(lambda: engine)
    engine.gate.set()
    (asked,) = loop.submit(SharedPrompt([1], (Request("a", [1], 1),)))
    with pytest.raises(EngineBrokenError, match="RuntimeError: the device is gone"):
        asked.result(timeout=patient(10))
    assert engine.closed.is_set()
    assert engine.held_by_step() is None, "kept by the error's traceback"
    loop.close()


def test_an_engine_that_nobody_waits_for_any_more_is_closed() -> None:
    engine, begun, build = Gated(), threading.Event(), threading.Event()

    def building() -> Gated:
        begun.set()
        assert build.wait(patient(10))
        return engine

    loop = EngineLoop(building)
    assert begun.wait(patient(10))
    loop.ready.cancel()  # as when a load is interrupted
    loop.close()
    build.set()
    assert engine.closed.wait(patient(10))


def test_who_stops_waiting_for_an_abort_breaks_nothing() -> None:
    engine = Gated()
    building = threading.Event()
    loop = EngineLoop(lambda: engine if building.wait(patient(10)) else None)
    for future in (loop.abort(["a"]), loop.so_far()):
        assert future.cancel()
    building.set()
    (asked,) = loop.submit(SharedPrompt([1], (Request("a", [1], 1),)))
    engine.gate.set()
    loop.abort([])  # wakes it
    assert asked.result(timeout=patient(10)).status == "ok"
    loop.close()
