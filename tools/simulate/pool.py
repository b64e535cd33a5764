"""pipeline.workers.pool.Pool over simulated engines, in virtual time."""

from __future__ import annotations

import heapq
import random
import time
from typing import Any

import pyarrow as pa

from pipeline.results.columns import columns_of, utc_now
from pipeline.results.rows import EngineFields, Outcome, Row, WorkerFields
from pipeline.source import Document
from pipeline.workers.pool import Event, WorkerId
from tools.simulate.cost import EngineCost
from tools.simulate.engine import SimulatedEngine

BYTES_PER_TOKEN = 4
# Somewhere in it begins every output, so that Parquet finds no two alike.
TEXT = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz      ", k=1 << 16))
CHARACTERS_PER_TOKEN = 4
# What a worker says of itself and of its settings.
NAMES: dict[str, Any] = {
    each.name: "simulated"
    for each in columns_of(WorkerFields)
    if each.type == pa.string() and not each.nullable and each.name != "worker"
}


class SimulatedPool:
    """Workers that start after `start_seconds` and up to `start_spread` more, each at random, and of which `failures`
    an hour die, any of them, at any time.

    driver_seconds: the driver is busy so long with every event, besides; meanwhile others gather.
    busy: seconds of work of all engines. cpu: processor seconds of this simulation itself.
    """

    def __init__(
        self, cost: EngineCost, new_tokens: int, *, start_seconds: float, failures: float, driver_seconds: float,
        seed: int, start_spread: float = 0.0,
    ) -> None:  # fmt: skip
        self._cost, self._new_tokens = cost, new_tokens
        self._start_seconds, self._start_spread, self._driver_seconds = start_seconds, start_spread, driver_seconds
        self._failures = failures / 3600
        self._chance = random.Random(seed)
        self._now = 0.0
        self._engines: dict[WorkerId, SimulatedEngine[str]] = {}
        self._documents: dict[str, tuple[Document, float]] = {}  # those that are out, and since when
        self._agenda: list[tuple[float, WorkerId]] = []  # when something ends in a worker
        self._starting: set[WorkerId] = set()
        self._next_failure = self._draw_failure()
        self._begun = utc_now()
        self._count = 0
        self._gone = 0.0  # busy seconds of workers that died
        self.cpu = 0.0
        self.deaths = 0
        self.first_ready = self.last_row = 0.0

    def clock(self) -> float:
        """Virtual seconds."""
        return self._now

    @property
    def busy(self) -> float:
        """Seconds of work of all engines, lost work included."""
        return self._gone + sum(engine.busy_seconds for engine in self._engines.values())

    def start(self) -> WorkerId:
        """Begin to start a worker."""
        self._count += 1
        self._engines[self._count] = SimulatedEngine(self._cost, self._new_tokens)
        self._starting.add(self._count)
        late = self._chance.uniform(0.0, self._start_spread) if self._start_spread else 0.0
        heapq.heappush(self._agenda, (self._now + self._start_seconds + late, self._count))
        return self._count

    def submit(self, worker: WorkerId, document: Document, careful: bool) -> None:
        """Give a document to a worker."""
        begin = time.thread_time()
        self._documents[document.document_id] = (document, self._now)
        engine = self._engines[worker]
        before = engine.next_at
        engine.add(self._now, document.document_id, document.size_bytes // BYTES_PER_TOKEN)
        self._enter(worker, engine, before)
        self.cpu += time.thread_time() - begin

    def kill(self, worker: WorkerId) -> None:
        """End a worker."""
        self._gone += self._engines.pop(worker).busy_seconds
        self._starting.discard(worker)

    def wait(self, timeout: float) -> list[Event]:
        """What happened until now, or else what happens first within `timeout` virtual seconds."""
        begin = time.thread_time()
        until = self._now + timeout
        events: list[Event] = []
        while (at := self._next_at()) <= (self._now if events else until):
            self._now = max(self._now, at)
            events += self._happen(at)
        if not events:
            self._now = until
        self._now += self._driver_seconds * len(events)
        self.cpu += time.thread_time() - begin
        return events

    def _next_at(self) -> float:
        while self._agenda:
            at, worker = self._agenda[0]
            engine = self._engines.get(worker)
            if engine is not None and (worker in self._starting or engine.next_at == at):
                return min(at, self._next_failure)
            heapq.heappop(self._agenda)  # of a worker that is gone, or does something else by now
        return self._next_failure

    def _happen(self, at: float) -> list[Event]:
        if at == self._next_failure:
            self._next_failure = at + self._draw_failure()
            alive = [worker for worker in self._engines if worker not in self._starting]
            if not alive:
                return []
            self.deaths += 1
            return [Event("died", self._chance.choice(alive), reason="simulated")]
        _, worker = heapq.heappop(self._agenda)
        engine = self._engines[worker]
        if worker in self._starting:
            self._starting.remove(worker)
            self.first_ready = self.first_ready or at
            return [Event("started", worker, info={"max_live": self._cost.max_live})]
        done = engine.advance(at)
        self._enter(worker, engine, None)
        self.last_row = max(self.last_row, at)
        return [
            Event("result", worker, name, rows=[self.make_row(*self._documents.pop(name), at, worker)]) for name in done
        ]

    def _enter(self, worker: WorkerId, engine: SimulatedEngine[str], before: float | None) -> None:
        if engine.next_at is not None and engine.next_at != before:
            heapq.heappush(self._agenda, (engine.next_at, worker))

    def _draw_failure(self) -> float:
        return self._chance.expovariate(self._failures) if self._failures else float("inf")

    def make_row(self, document: Document, since: float, now: float, worker: WorkerId) -> Row:
        """The row of a document that a worker took at `since` and has done now."""
        tokens = document.size_bytes // BYTES_PER_TOKEN
        prefill = self._cost.prefill(tokens)
        at = self._chance.randrange(len(TEXT) // 2)
        return Row(
            document_id=document.document_id, source=document.source,
            outcome=Outcome(
                status="ok", output=TEXT[at : at + CHARACTERS_PER_TOKEN * self._new_tokens], finish_reason="length"
            ),
            from_engine=EngineFields(
                prompt_tokens=tokens, output_tokens=self._new_tokens, attention="stem", attention_reason="",
                density=0.297, kernel="simulated", prefill_seconds=prefill,
                decode_seconds=self._cost.alone(tokens, self._new_tokens) - prefill, time_to_first_token=prefill,
            ),
            from_worker=WorkerFields(
                **NAMES, total_seconds=now - since, worker=f"simulated/{worker}", input_hash="0" * 16,
                started_at=self._begun,
            ),
            input_stamp=document.stamp,
        )  # fmt: skip
