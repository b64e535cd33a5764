"""Which document goes to which worker when, and who is to blame when one dies. Knows nothing of Ray.

An event costs the same with ten workers as with thousands: nothing here goes through all workers or all documents.
"""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import JobError
from pipeline.results.rows import Row, failed_rows
from pipeline.source import Document
from pipeline.workers.pool import Event, EventKind, Pool, WorkerId
from pipeline.workers.service_time import ServiceTime, Shift

# What a document is blamed with when its worker is lost in this way while it holds nothing else.
BLAME = {"died": "worker_died", "failed": "error", "hung": "timeout"}


@dataclass(frozen=True)
class Limits:
    """Bounds of a run. Times in seconds.

    workers: wanted at the start; `Scheduler.resize` changes it. max_attempts: times a document may end its worker
    before it is given up, counting the first, shared one. start_tries: failed starts in a row after which the job ends
    if no worker runs or still starts, and else pauses start_pause before each further try. hang_after: a document is
    out so long with no sign of life, then its worker is killed; 0 never. ahead: documents that a worker holds beyond
    those it decodes. settle: after a resize, for so long no worker that still starts is given up for being too many:
    those on a node that left end by themselves.
    """

    workers: int
    max_attempts: int = 3
    start_tries: int = 3
    start_pause: float = 60.0
    hang_after: float = 0.0
    ahead: int = 2
    settle: float = 10.0


def hang_after(deadline: float, grace: float) -> float:
    """Limits.hang_after for documents with a deadline: after their worker had time to give each up by itself.

    deadline: seconds, 0 for none. grace: for how long a worker waits then for its engine (pipeline.workers.worker).
    """
    return deadline + 3 * grace if deadline else 0.0


@dataclass
class Assignment:
    """A document on its way. attempts: times given to a worker. shared: this time it is not alone in its worker.

    careful: it came to grief before, so it is alone this time and its prefill goes in smaller steps. worker: that has
    it, since sent_at.
    """

    document: Document
    attempts: int = 0
    shared: bool = False
    careful: bool = False
    worker: WorkerId = -1
    sent_at: float = 0.0


@dataclass
class WorkerState:
    """A worker as the scheduler sees it. capacity 0: not started. alone: it holds a suspect and gets nothing else."""

    capacity: int = 0
    held: dict[str, Assignment] = field(default_factory=dict)
    alone: bool = False
    shift: Shift = field(default_factory=Shift)


class StopRequestedError(Exception):
    """The run was asked to stop; what was finished has been handed over."""


class Scheduler:
    """Gives documents to workers in the order they come and hands every document's rows to `done` exactly once.

    A document with all its questions is one piece of work: it is in one worker, blamed and tried again as a whole.

    Memory: it holds the documents that are out, the suspects, and nothing of what is finished or still to come.
    """

    def __init__(
        self,
        pool: Pool,
        documents: Iterator[Document],
        count: int,
        limits: Limits,
        done: Callable[[list[Row], Document], None],
        *,
        tick: Callable[[], None] = lambda: None,
        should_stop: Callable[[], bool] = lambda: False,
        log: Callable[[str], None] = lambda message: None,
        on_loss: Callable[[EventKind], None] = lambda kind: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._documents = documents
        self._to_come = count
        self._limits = limits
        self._done = done
        self._tick = tick
        self._should_stop = should_stop
        self._log = log
        self._on_loss = on_loss
        self._clock = clock
        self._wanted, self._resized_at = limits.workers, 0.0
        self._workers: dict[WorkerId, WorkerState] = {}
        self._starting: OrderedDict[WorkerId, None] = OrderedDict()  # those that do not take documents yet
        # Documents that are out, by id, longest out first: the first is the one that may be overdue.
        self._out: OrderedDict[str, Assignment] = OrderedDict()
        # (documents held, worker) of every worker with room, the emptiest first. A worker's number changes more often
        # than it is looked at: an entry that no longer holds is passed over when it comes up.
        self._room: list[tuple[int, WorkerId]] = []
        self._suspects: deque[Assignment] = deque()
        self._service_time = ServiceTime()
        self._failed_starts = 0
        self._next_start = 0.0
        self.started: dict[WorkerId, dict[str, Any]] = {}
        self._lines_shown: set[str] = set()

    def run(self) -> None:
        """Work until every document has its row. Raises JobError if no worker starts, StopRequestedError on request."""
        while self._left:
            if self._should_stop():
                raise StopRequestedError
            self._staff()
            self._dispatch()
            for event in self._pool.wait(0.2):
                self._handle(event)
            self._end_hangs()
            self._tick()

    @property
    def in_flight(self) -> int:
        """Documents that workers hold."""
        return len(self._out)

    @property
    def waiting(self) -> int:
        """Documents that no worker holds."""
        return self._to_come + len(self._suspects)

    @property
    def live(self) -> int:
        """Workers that take documents."""
        return len(self._workers) - len(self._starting)

    @property
    def starting(self) -> int:
        """Workers that do not take documents yet."""
        return len(self._starting)

    @property
    def _left(self) -> int:
        return self.waiting + self.in_flight

    @property
    def _settled(self) -> bool:
        return self._clock() - self._resized_at >= self._limits.settle

    def resize(self, workers: int) -> None:
        """Want another number of workers from now on.

        Fewer: those that still start are given up, the latest first. Workers that take documents are kept.
        """
        self._wanted, self._resized_at = workers, self._clock()

    def _staff(self) -> None:
        """Start workers up to the number wanted, never more than documents are left; give up starts that are too many.

        Else Ray would look for room for them, and an autoscaler make some.
        """
        while self._starting and len(self._workers) > self._wanted and self._settled:
            worker, _ = self._starting.popitem()
            self._pool.kill(worker)
            del self._workers[worker]
        wanted = min(self._wanted, self._left)
        failing = self._failed_starts >= self._limits.start_tries
        if failing and self._workers and (not self.live or self._clock() < self._next_start):
            return  # go on with those that run or still start, and see later if there is room again
        while len(self._workers) < wanted:
            worker = self._pool.start()
            self._workers[worker] = WorkerState()
            self._starting[worker] = None

    def _dispatch(self) -> None:
        """One document at a time to the worker that holds fewest, so that none hoards what another could do."""
        while self._room and self.waiting:
            held, worker = self._room[0]
            state = self._workers.get(worker)
            if state is None or state.alone or len(state.held) != held or held >= state.capacity:
                heapq.heappop(self._room)  # it no longer holds
            elif self._suspects and not held:
                state.alone = True
                assignment = self._suspects.popleft()
                assignment.careful = True
                self._send(worker, state, assignment)
            elif self._to_come and self._takes(state, held):
                self._to_come -= 1
                self._send(worker, state, Assignment(next(self._documents)))
            else:
                return

    def _takes(self, state: WorkerState, held: int) -> bool:
        """Whether a worker takes another document: at most its share of the work that is left, and none that only waits
        there when what is to come is less than a batch for each of the others.
        """
        batch = state.capacity - self._limits.ahead
        if held >= batch and self._to_come <= batch * (len(self._workers) - 1):
            return False
        now = self._clock()
        share = (self._left - self._service_time.done(now, self.in_flight)) / len(self._workers)
        return held - self._service_time.done_by(state.shift, now, held) < share

    def _has_room(self, worker: WorkerId, state: WorkerState) -> None:
        """Enter a worker into the queue of those that take documents, if it does."""
        if len(state.held) < state.capacity and not state.alone:
            heapq.heappush(self._room, (len(state.held), worker))

    def _send(self, worker: WorkerId, state: WorkerState, assignment: Assignment) -> None:
        assignment.attempts += 1
        assignment.worker, assignment.sent_at = worker, self._clock()
        assignment.shared = bool(state.held)
        self._service_time.gets(state.shift, assignment.sent_at)
        for other in state.held.values():
            other.shared = True
        state.held[assignment.document.document_id] = self._out[assignment.document.document_id] = assignment
        self._has_room(worker, state)
        self._pool.submit(worker, assignment.document, assignment.careful)

    def _handle(self, event: Event) -> None:
        state = self._workers.get(event.worker)
        if state is None:
            return  # of a worker that was given up in the meantime
        if event.kind == "started":
            state.capacity = int(event.info["max_live"]) + self._limits.ahead
            del self._starting[event.worker]
            self._failed_starts = 0
            self.started[event.worker] = event.info
            engine = event.info.get("engine", {})
            for line in (*engine.get("slower", ()), *engine.get("notes", ())):
                if line not in self._lines_shown:
                    self._lines_shown.add(line)
                    self._log(line)
            self._service_time.joins(state.shift, self._clock())
            self._has_room(event.worker, state)
        elif event.kind == "start_failed":
            self._start_failed(event)
        elif event.kind == "result":
            self._result(state, event)
        else:
            self._lost(event.worker, state, event.reason, event.kind)

    def _result(self, state: WorkerState, event: Event) -> None:
        assignment = state.held.pop(event.document_id)
        del self._out[event.document_id]
        state.alone = False
        self._service_time.ends(state.shift, self._clock(), len(state.held))
        self._has_room(event.worker, state)
        ended = {row.outcome.status for row in event.rows}
        # Neighbours, or the size of the steps, may be why: it gets one try alone.
        if ("oom" in ended and not assignment.careful) or ("timeout" in ended and assignment.shared):
            self._suspects.append(assignment)
        else:
            self._finish(event.rows, assignment.document, assignment.attempts)

    def _lost(self, worker: WorkerId, state: WorkerState, reason: str, kind: EventKind) -> None:
        """Give a worker up. What it held is tried again, each document alone, until one is lost alone too often."""
        self._pool.kill(worker)
        del self._workers[worker]
        if state.capacity:
            self._service_time.leaves(state.shift, self._clock())
        held = list(state.held.values())
        for document_id in state.held:
            del self._out[document_id]
        status = BLAME[kind]
        self._on_loss(kind)
        self._log(f"worker {worker} lost with {len(held)} documents: {reason}")
        # A hang costs a whole deadline, so one alone is proof enough.
        if len(held) == 1 and (held[0].attempts >= self._limits.max_attempts or status == "timeout"):
            document, attempts = held[0].document, held[0].attempts
            times = f"each of {attempts} attempts, in the last it was alone" if attempts > 1 else "its only attempt"
            what = f"its worker was lost in {times}: {reason}"
            self._finish(failed_rows(document, status, what), document, attempts)
        else:
            self._suspects.extend(held)

    def _start_failed(self, event: Event) -> None:
        self._pool.kill(event.worker)
        del self._workers[event.worker], self._starting[event.worker]
        self._failed_starts += 1
        self._on_loss(event.kind)
        self._next_start = self._clock() + self._limits.start_pause
        if event.final and not self.live:
            raise JobError(event.reason)
        self._log(f"a worker could not start ({self._failed_starts}): {event.reason}")
        if self._failed_starts >= self._limits.start_tries and not self._workers:
            raise JobError(f"no worker could start in {self._failed_starts} tries; the last reason: {event.reason}")

    def _end_hangs(self) -> None:
        while self._limits.hang_after and self._out:
            assignment = next(iter(self._out.values()))
            if self._clock() - assignment.sent_at <= self._limits.hang_after:
                return
            reason = f"no answer {self._limits.hang_after:g} s after it got {assignment.document.document_id!r}"
            self._lost(assignment.worker, self._workers[assignment.worker], reason, "hung")

    def _finish(self, rows: list[Row], document: Document, attempts: int) -> None:
        for row in rows:
            row.attempts = attempts
        self._done(rows, document)
