"""What the scheduler sees of workers, wherever they run: what they did, and what they can be told."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from pipeline.engine.config import ModelRefusedError
from pipeline.results.rows import Row
from pipeline.source import Document
from pipeline.workers.loop import EngineBrokenError, describe_error

T = TypeVar("T")
WorkerId = int
EventKind = Literal["started", "start_failed", "result", "failed", "hung", "died"]


@dataclass(frozen=True)
class Event:
    """Something that a worker did.

    started: it takes documents; `info` says how many. start_failed: it never will; `reason`, and if it is `final`, no
    other worker will either. result: `rows` of `document_id`, one for each question. failed: its engine broke; hung: it
    does not answer; died: the process is gone. `reason` says more.
    """

    kind: EventKind
    worker: WorkerId
    document_id: str = ""
    rows: list[Row] = field(default_factory=list)
    reason: str = ""
    final: bool = False
    info: dict[str, Any] = field(default_factory=dict)


class Pool(Protocol):
    """Workers, wherever they run: Ray actors, or a simulation."""

    def start(self) -> WorkerId:
        """Begin to start a worker; an event tells when it is there."""
        ...

    def submit(self, worker: WorkerId, document: Document, careful: bool) -> None:
        """Give a document to a started worker. careful: it is alone there, and is to use less memory at a time."""
        ...

    def wait(self, timeout: float) -> list[Event]:
        """Events since the last call; waits up to `timeout` seconds for the first."""
        ...

    def kill(self, worker: WorkerId) -> None:
        """End a worker; no more events come from it."""
        ...


def failed_start(worker: WorkerId, error: BaseException) -> Event:
    """A worker did not start, with an exception."""
    final = isinstance(error, ModelRefusedError)
    return Event("start_failed", worker, reason=describe_error(error), final=final)


def failed_call(worker: WorkerId, document_id: str, error: BaseException) -> Event:
    """A document came back with an exception: the worker's engine is broken, or it hangs."""
    hung = isinstance(error, EngineBrokenError) and error.hung
    return Event("hung" if hung else "failed", worker, document_id, reason=describe_error(error))


def one_loss_each(events: Sequence[Event]) -> list[Event]:
    """`events` with one loss of each worker: one that is lost fails all its calls. What it had finished comes first."""
    results = [event for event in events if event.kind in ("result", "started")]
    losses = {event.worker: event for event in reversed(events) if event.kind not in ("result", "started")}
    return results + list(losses.values())


def drained(waiting: queue.SimpleQueue[T], timeout: float) -> list[T]:
    """All that is in a queue; waits up to `timeout` seconds for the first."""
    found: list[T] = []
    with contextlib.suppress(queue.Empty):
        found.append(waiting.get(timeout=timeout))
        while True:
            found.append(waiting.get_nowait())
    return found
