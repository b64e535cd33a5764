"""How far a worker says that it is with the documents that it holds."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from fake_engine import FakeEngine
from patience import patient
from result_rows import make_row

from pipeline import summarize
from pipeline.engine.config import Completion, SoFar
from pipeline.job.progress import Progress
from pipeline.results.rows import Row
from pipeline.source import Document, Locator
from pipeline.workers import ray_pool
from pipeline.workers.ray_pool import RayPool, Share
from pipeline.workers.work import request_id
from pipeline.workers.worker import Work, Worker

T = TypeVar("T")

FAKE: dict[str, Any] = {"engine_factory": "fake_engine:FakeEngine", "device": "cpu"}


class Loop:
    """A loop around an engine that is at work at these requests."""

    def __init__(self, requests: dict[str, SoFar]) -> None:
        self._requests = requests

    def so_far(self) -> Future[dict[str, SoFar]]:
        future: Future[dict[str, SoFar]] = Future()
        future.set_result(self._requests)
        return future


def document(name: str) -> Document:
    return Document(name, name, Locator("", name, "text", 0, 1), 6000)


def work(name: str, read: int = 0, written: int = 0) -> Work:
    return Work(document(name), cast(Any, None), 0.0, so_far=SoFar(read, written, 2.0 * read, 3.0 * written))


class TimedEngine(FakeEngine):
    """Takes 2 seconds to read each request, and 3 to write."""

    def step(self) -> list[Completion]:
        return [replace(each, prefill_seconds=2.0, decode_seconds=3.0) for each in super().step()]


@pytest.mark.parametrize("questions", [["What?"], ["What?", "Why?"]])
def test_what_has_ended_counts_as_what_it_came_to(
    questions: list[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job tells of these tokens, and they must not become fewer at its end."""
    works: list[Work] = []

    def kept(*args: Any, **more: Any) -> Work:
        works.append(Work(*args, **more))
        return works[-1]

    monkeypatch.setattr("pipeline.workers.worker.Work", kept)
    more = {**FAKE, "engine_factory": f"{__name__}:TimedEngine"}
    rows = summarize(["A text."], model=model, question=questions, max_new_tokens=50, **more).to_pylist()
    read = sum(row["prompt_tokens"] - row["prefix_tokens"] for row in rows)
    ended = SoFar(read, sum(row["output_tokens"] for row in rows), 2.0 * len(rows), 3.0 * len(rows))
    assert [work.so_far for work in works] == [ended]


def test_reading_is_what_the_engine_is_at_and_what_it_is_done_with() -> None:
    worker = Worker.__new__(Worker)
    at_work = {
        request_id("a#b", "what", ""): SoFar(300, 20, 3.0, 0.2),
        request_id("a#b", "why", ""): SoFar(50, 4, 0.5, 0.1),
        request_id("parts", "what", "3.1"): SoFar(100, 1),
        request_id("gone", "what", ""): SoFar(9, 9),
    }
    worker._loop = cast(Any, Loop(at_work))
    worker._works = {"a#b": work("a#b"), "parts": work("parts", 400, 30), "not tokenized": work("not tokenized")}
    assert asyncio.run(worker.reading()) == {
        "a#b": (350, 24, 3.5, pytest.approx(0.3), 6000),
        "parts": (500, 31, 800.0, 90.0, 6000),
        "not tokenized": (0, 0, 0.0, 0.0, 6000),
    }


class OneStep(Worker):
    """Says that it has read 600 tokens, and ends a document when `release` is set."""

    release = False

    def __init__(self, config: None) -> None:
        self._name = ""

    async def load(self) -> dict[str, Any]:
        return {}

    async def reading(self) -> dict[str, SoFar]:
        return {"a": SoFar(600, 0), "b": SoFar(50, 0)}

    async def process(self, document: Document, careful: bool = False) -> list[Row]:
        while not OneStep.release or document.document_id != "a":
            await asyncio.sleep(0.01)
        return [make_row(document.document_id, "x", prompt_tokens=600, output_tokens=8)]

    def close(self, wait: float) -> None:
        pass


def until(call: Callable[[], T]) -> T:
    """The first answer that is not empty."""
    end = time.monotonic() + patient(20)
    while not (found := call()):
        assert time.monotonic() < end
    return found


@pytest.mark.usefixtures("ray_here")
def test_a_document_counts_once_though_its_worker_was_asked_before_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs steps are long, and so are the ways of answers."""
    monkeypatch.setattr(ray_pool, "READING_EVERY", 0.0)
    monkeypatch.setattr(OneStep, "release", False)
    pool = RayPool(cast(Any, None), Share("cpu", 1, 1.0, 0.0, 1), local=False, worker_class=OneStep)
    progress = Progress(2, 12_000, stream=io.StringIO())
    worker = pool.start()
    until(lambda: pool.wait(0.1))
    for name in ("a", "b"):
        pool.submit(worker, document(name), False)
    progress.reading(until(pool.reading))
    assert " 650 tokens " in progress.line()
    OneStep.release = True
    [ended] = until(lambda: pool.wait(0.1))
    progress.add(ended.rows, 6000)
    assert " 658 tokens " in progress.line()
    progress.reading(pool.reading() or {})  # said before the document ended
    pool.close()
    assert " 658 tokens " in progress.line()
