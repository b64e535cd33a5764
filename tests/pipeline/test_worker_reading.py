"""How far a worker says that it is with the documents that it holds."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any, cast

from pipeline.source import Document
from pipeline.workers.worker import Work, Worker


class Loop:
    """An engine's loop that has read 600 tokens."""

    def tokens_read(self) -> Future[int]:
        future: Future[int] = Future()
        future.set_result(600)
        return future


def work(size: int, tokens: int, ended: int) -> Work:
    return Work(Document("d", "d", cast(Any, None), size), cast(Any, None), 0.0, tokens=tokens, ended=ended)


def test_reading_is_a_share_of_what_the_documents_come_to() -> None:
    worker = Worker.__new__(Worker)
    worker._loop = cast(Any, Loop())
    worker._works = {}
    assert asyncio.run(worker.reading()) == (600, 0)
    worker._works = {"long": work(8000, 1500, 0), "in parts": work(2000, 500, 400), "not tokenized": work(9000, 0, 0)}
    assert asyncio.run(worker.reading()) == (1000, 5000), "half of the 2,000 tokens of the two that the engine has got"
