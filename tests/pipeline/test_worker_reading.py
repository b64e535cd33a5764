"""How far a worker says that it is with the documents that it holds."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline import summarize
from pipeline.source import Document
from pipeline.workers.worker import Work, Worker

FAKE: dict[str, Any] = {"engine_factory": "fake_engine:FakeEngine", "device": "cpu"}


class Loop:
    """An engine's loop that has read 600 tokens."""

    def tokens_read(self) -> Future[int]:
        future: Future[int] = Future()
        future.set_result(600)
        return future


def work(size: int, tokens: int, ended: int) -> Work:
    return Work(Document("d", "d", cast(Any, None), size), cast(Any, None), 0.0, tokens=tokens, ended=ended)


@pytest.mark.parametrize("questions", [["What?"], ["What?", "Why?"]])
def test_what_has_ended_counts_as_what_it_came_to(
    questions: list[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as what it could have come to: a job tells of these tokens, and they must not become fewer at its end."""
    works: list[Work] = []

    def kept(*args: Any, **more: Any) -> Work:
        works.append(Work(*args, **more))
        return works[-1]

    monkeypatch.setattr("pipeline.workers.worker.Work", kept)
    rows = summarize(["A text."], model=model, question=questions, max_new_tokens=50, **FAKE).to_pylist()
    came = sum(row["prompt_tokens"] - row["prefix_tokens"] + row["output_tokens"] for row in rows)
    assert [(work.tokens, work.ended) for work in works] == [(came, came)]


def test_reading_is_a_share_of_what_the_documents_come_to() -> None:
    worker = Worker.__new__(Worker)
    worker._loop = cast(Any, Loop())
    worker._works = {}
    assert asyncio.run(worker.reading()) == (600, 0)
    worker._works = {"long": work(8000, 1500, 0), "in parts": work(2000, 500, 400), "not tokenized": work(9000, 0, 0)}
    assert asyncio.run(worker.reading()) == (1000, 5000), "half of the 2,000 tokens of the two that the engine has got"
