"""The threads in which a worker reads and tokenises, so that the next prompts are ready when its engine asks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from pipeline.source.processes import TOGETHER
from pipeline.workers.work import Work

T = TypeVar("T")


class ReadingThreads:
    """One that reads and tokenises, and those that wait for converting processes. busy_seconds: of the former."""

    def __init__(self) -> None:
        self._reader = ThreadPoolExecutor(1, "reader")
        self._converting = ThreadPoolExecutor(TOGETHER, "converting")
        self.busy_seconds = 0.0

    async def run(self, call: Callable[..., T], *args: Any) -> T:
        """What `call` returns in the reader thread."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, call, *args)

    async def run_for(self, work: Work, call: Callable[..., T], *args: Any, converts: bool = False) -> tuple[T, float]:
        """The same for a document: the result and its seconds. The wait before counts as queueing.

        converts: it waits for another process, in a thread that is there for that.
        """
        asked = time.perf_counter()

        def timed() -> tuple[T, float, float]:
            begin = time.perf_counter()
            try:
                result = call(*args)
            finally:
                if not converts:
                    self.busy_seconds += time.perf_counter() - begin
            return result, begin, time.perf_counter()

        executor = self._converting if converts else self._reader
        result, begin, end = await asyncio.get_running_loop().run_in_executor(executor, timed)
        work.fields.queue_seconds += begin - asked
        return result, end - begin

    def idle(self) -> Future[None]:
        """Done when the reader has done all that it was given, which one that hangs never does."""
        return self._reader.submit(lambda: None)

    def close(self) -> None:
        """Begin nothing more."""
        for executor in (self._reader, self._converting):
            executor.shutdown(wait=False, cancel_futures=True)
