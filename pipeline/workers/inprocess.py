"""The job's worker in this process instead of a Ray actor: for notebooks, and inside Ray Data's own actors."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

from pipeline.inputs import TextReader
from pipeline.source import Document, DocumentReader
from pipeline.workers.pool import Event, WorkerId, drained, failed_call, failed_start, one_loss_each
from pipeline.workers.work import WorkerConfig
from pipeline.workers.worker import Worker

# How long a closed engine may take to end its current step and give its memory back.
CLOSE_SECONDS = 60.0


class LocalPool:
    """pipeline.workers.pool.Pool with one worker in this process. The worker stays for the next run.

    Its coroutines run in an event loop of their own: a notebook's is busy with the cell that waits for them.
    """

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._reader: DocumentReader = TextReader(config.text_column, list(config.kept), config.reading)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._worker: Worker | None = None
        self._info: dict[str, Any] = {}  # of a worker that is ready
        self._count = 0
        self._hung = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="worker", daemon=True)
        self._thread.start()

    def load(self) -> dict[str, Any]:
        """Load the model, if it is not loaded yet; the worker's description. Raises what loading raises."""
        if not self._info:
            worker = self._new_worker()
            try:
                self._info = self._spawn(worker.load()).result()
            except BaseException:
                self.kill(self._count)
                raise
        return self._info

    def read_with(self, reader: DocumentReader) -> None:
        """Read the documents of the next run with `reader`."""
        self._reader = reader
        if self._worker is not None:
            self._worker.read_with(reader)

    def start(self) -> WorkerId:
        """Hand out the worker that is there, or begin to load one."""
        if self._info:
            self._events.put(Event("started", self._count, info=self._info))
            return self._count
        worker, number = self._new_worker(), self._count

        def loaded(future: Future[dict[str, Any]]) -> None:
            if future.cancelled():
                return
            if error := future.exception():
                self._events.put(failed_start(number, error))
                return
            if number == self._count:
                self._info = future.result()
            self._events.put(Event("started", number, info=future.result()))

        self._spawn(worker.load()).add_done_callback(loaded)
        return number

    def submit(self, worker: WorkerId, document: Document, careful: bool) -> None:
        """Give a document to the worker."""
        assert self._worker is not None

        def done(future: Future[Any]) -> None:
            if future.cancelled():
                return
            error, name = future.exception(), document.document_id
            if error is None:
                self._events.put(Event("result", worker, name, rows=future.result()))
            else:
                event = failed_call(worker, name, error)
                self._hung = event.kind == "hung"
                self._events.put(event)

        self._spawn(self._worker.process(document, careful)).add_done_callback(done)

    def wait(self, timeout: float) -> list[Event]:
        """Events since the last call; waits up to `timeout` seconds for the first."""
        return one_loss_each(drained(self._events, timeout))

    def kill(self, worker: WorkerId) -> None:
        """Give a worker up, with all that it holds. A step of the engine that does not end is left to itself."""
        if worker == self._count and self._worker is not None:
            gone, self._worker, self._info = self._worker, None, {}
            self._spawn(self._cancel_all()).result()
            gone.close(0.0 if self._hung else CLOSE_SECONDS)

    def drop(self) -> None:
        """Give up all that is running; the model is loaded anew when it is needed."""
        self.kill(self._count)

    def close(self) -> None:
        """Give the model's memory back and end the threads."""
        self.drop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_SECONDS)

    def _new_worker(self) -> Worker:
        self._count += 1
        self._hung = False
        self._worker = Worker(self._config)
        self._worker.read_with(self._reader)
        return self._worker

    def _spawn(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
