"""The engine in a thread of its own, so that documents are read and tokenised while it computes."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from pipeline.engine.config import Completion, SharedPrompt, SoFar
from pipeline.errors import JobError, one_line

T = TypeVar("T")


class EngineLike(Protocol):
    """What a worker needs of an engine (pipeline.engine.Engine; tests bring their own)."""

    @property
    def max_context(self) -> int: ...
    @property
    def has_work(self) -> bool: ...
    @property
    def arena_use(self) -> tuple[int, int]: ...
    @property
    def so_far(self) -> dict[str, SoFar]: ...

    def add_shared(self, shared: SharedPrompt) -> None: ...
    def step(self) -> list[Completion]: ...
    def abort(self, request_id: str) -> bool: ...
    def describe(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


class EngineBrokenError(Exception):
    """The engine raised, or (hung) something in the worker does not return; only a new process can go on."""

    def __init__(self, message: str, hung: bool = False) -> None:
        super().__init__(message, hung)
        self.hung = hung

    def __str__(self) -> str:
        return str(self.args[0])


def describe_error(error: BaseException) -> str:
    """An exception's message, with its type unless the message is made for people."""
    text = one_line(error)
    return text if isinstance(error, JobError | EngineBrokenError) else f"{type(error).__name__}: {text}"


class EngineLoop:
    """Builds an engine and steps it as long as it has work. All engine calls happen in one thread."""

    def __init__(self, build: Callable[[], EngineLike]) -> None:
        self._build = build
        self._calls: queue.SimpleQueue[Callable[[EngineLike], None] | None] = queue.SimpleQueue()
        self._waiting: dict[str, Future[Completion]] = {}
        self._failure: EngineBrokenError | None = None
        self.ready: Future[EngineLike] = Future()
        self.busy_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, shared: SharedPrompt) -> list[Future[Completion]]:
        """Hand requests that begin alike to the engine; a future for each.

        The futures raise EngineBrokenError if the engine breaks.
        """
        futures: list[Future[Completion]] = [Future() for _ in shared.requests]

        def add(engine: EngineLike) -> None:
            wanted = [future.set_running_or_notify_cancel() for future in futures]
            if not any(wanted):  # given up before the engine saw them
                return
            try:
                engine.add_shared(shared)
            except Exception as error:  # an id that is in the engine already, say; its own futures must not suffer
                for future, is_wanted in zip(futures, wanted, strict=True):
                    if is_wanted:
                        future.set_exception(error)
            else:
                for request, future, is_wanted in zip(shared.requests, futures, wanted, strict=True):
                    if is_wanted:
                        self._waiting[request.request_id] = future

        if self._failure:
            for future in futures:
                future.set_exception(self._failure)
        else:
            self._calls.put(add)
        return futures

    def abort(self, request_ids: list[str]) -> Future[None]:
        """Drop requests; done when the engine has let go of them, which a hung engine never does."""
        future: Future[None] = Future()
        request_ids = list(request_ids)

        def drop(engine: EngineLike) -> None:
            for request_id in request_ids:
                engine.abort(request_id)
                self._waiting.pop(request_id, None)
            _tell(future, None)

        self._calls.put(drop)
        return future

    def so_far(self) -> Future[dict[str, SoFar]]:
        """What the engine says of its requests between two steps; a hung engine never does."""
        future: Future[dict[str, SoFar]] = Future()
        self._calls.put(lambda engine: _tell(future, engine.so_far))
        return future

    def close(self, wait: float = 0.0) -> None:
        """Let the thread end after its current step; wait up to so many seconds until its memory is free."""
        self._calls.put(None)
        if wait:
            self._thread.join(wait)

    def _run(self) -> None:
        self.ready.set_running_or_notify_cancel()  # who waits for it may leave; the engine is closed by close() then
        try:
            engine = self._build()
        except BaseException as error:
            self.ready.set_exception(error)
            return
        self.ready.set_result(engine)
        try:
            while self._take_calls(engine):
                begin = time.perf_counter()
                done = engine.step()
                self.busy_seconds += time.perf_counter() - begin
                for completion in done:
                    future = self._waiting.pop(completion.request_id, None)
                    if future:
                        future.set_result(completion)
            engine.close()
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold the engine's tensors, and the error is kept
            with contextlib.suppress(Exception):
                engine.close()
            self._fail(error)

    def _take_calls(self, engine: EngineLike) -> bool:
        """Run what was asked for, waiting for it while there is no work; False to end."""
        while True:
            try:
                call = self._calls.get(block=not engine.has_work)
            except queue.Empty:
                return True
            if call is None:
                return False
            call(engine)

    def _fail(self, error: BaseException) -> None:
        self._failure = EngineBrokenError(f"{type(error).__name__}: {error}")
        self._failure.__cause__ = error
        for future in self._waiting.values():
            future.set_exception(self._failure)
        self._waiting.clear()
        while True:  # a request that came in meanwhile must not wait for ever
            call = self._calls.get()
            if call is None:
                return
            call(_Broken(self._failure))


def _tell(future: Future[T], result: T) -> None:
    """The result to who waits for it, if anyone still does."""
    if future.set_running_or_notify_cancel():
        future.set_result(result)


class _Broken:
    """Stands in for an engine that failed."""

    max_context = 0
    has_work = False
    arena_use = (0, 0)

    def __init__(self, failure: EngineBrokenError) -> None:
        self._failure = failure

    @property
    def so_far(self) -> dict[str, SoFar]:
        return {}

    def add_shared(self, shared: SharedPrompt) -> None:
        raise self._failure

    def abort(self, request_id: str) -> bool:
        return False

    def step(self) -> list[Completion]:
        raise self._failure

    def describe(self) -> dict[str, Any]:
        raise self._failure

    def close(self) -> None:
        return
