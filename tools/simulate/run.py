"""One simulated job: how near it comes to the ideal, and what it costs the driver."""

from __future__ import annotations

import io
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import psutil
import pyarrow as pa

from pipeline.errors import JobError
from pipeline.job.progress import Progress
from pipeline.results.parts import compact, part_names, read_results
from pipeline.results.rows import Row, result_schema
from pipeline.results.sink import Sink
from pipeline.results.store import Store
from pipeline.source import FORMATS, Catalogue, Document, SourceFile
from pipeline.source.catalogue import in_shard
from pipeline.workers.metrics import JobMetrics
from pipeline.workers.scheduler import Limits, Scheduler
from tools.simulate.cost import EngineCost, lengths, share
from tools.simulate.pool import BYTES_PER_TOKEN, SimulatedPool


@dataclass(frozen=True)
class Plan:
    """What to simulate. failures: deaths of workers in an hour, all together. start_spread: seconds, up to which each
    worker starts later. driver_ms: the driver is busy so long with each document, for Ray. output: folder for real
    rows; empty: rows are counted only. shard: (i, n).
    """

    workers: int
    documents: int
    cost: EngineCost
    median: int = 32_768
    sigma: float = 1.0
    longest: int = 130_816
    new_tokens: int = 256
    seed: int = 0
    failures: float = 0.0
    start_seconds: float = 60.0
    start_spread: float = 0.0
    driver_ms: float = 0.0
    shard: tuple[int, int] = (0, 1)
    output: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of it. Virtual seconds: makespan (from the first worker's readiness to the last row), ideal (of that,
    the least possible), start. Shares of 1: of_ideal, idle (of all workers, over the makespan). Real processor seconds
    of the driver: driver_cpu, of it in the writer writer_cpu; wall_seconds of the whole simulation, its own part
    included. Bytes of the process: memory_before the first document, memory_most.
    """

    workers: int
    documents: int
    tokens: int
    makespan: float
    ideal: float
    ideal_work: float
    longest_alone: float
    of_ideal: float
    idle: float
    deaths: int
    computed_again: int
    driver_cpu: float
    writer_cpu: float
    wall_seconds: float
    memory_before: int
    memory_most: int
    lost: int
    doubled: int
    statuses: dict[str, int]
    parts: int

    @property
    def exact(self) -> bool:
        """Every document has one row."""
        return not self.lost and not self.doubled

    @property
    def driver_documents_per_second(self) -> float:
        """Documents that the driver's own code, without Ray, can hand out and take back in a second."""
        return self.documents / self.driver_cpu


def catalogue(tokens: np.ndarray) -> Catalogue:
    """A listing of documents of these lengths, as of one JSON-lines file."""
    count = len(tokens)
    size = tokens * BYTES_PER_TOKEN
    starts = np.concatenate([[0], np.cumsum(size)[:-1]])
    columns = np.stack([np.zeros(count, np.int64), starts, size, size, np.arange(count)], axis=1)
    ids = pa.array((f"doc-{number:08}" for number in range(count)), pa.large_string())
    file = SourceFile(
        "", "/simulated.jsonl", "simulated.jsonl", "simulated.jsonl", FORMATS["jsonl"], int(size.sum()), 0
    )
    return Catalogue([file], ids, columns, {}, [])


def simulate(plan: Plan) -> Outcome:
    """Run a job. Raises JobError if --output cannot be written or holds results."""
    begun = time.perf_counter()
    listing = catalogue(lengths(plan.documents, plan.median, plan.sigma, plan.longest, plan.seed))
    if plan.shard != (0, 1):
        listing = listing.select(in_shard(listing.ids.to_pylist(), *plan.shard))
    pool = SimulatedPool(
        plan.cost, plan.new_tokens, start_seconds=plan.start_seconds, failures=plan.failures,
        driver_seconds=plan.driver_ms / 1000, seed=plan.seed, start_spread=plan.start_spread,
    )  # fmt: skip
    writer = _Writer(plan, pool)
    progress = Progress(len(listing), listing.total_bytes, most=plan.new_tokens, stream=io.StringIO(), clock=pool.clock)
    finished = np.zeros(plan.documents, dtype=np.uint8)
    attempts = memory = 0
    next_look = 0.0  # at the memory
    statuses: Counter[str] = Counter()

    def done(rows: list[Row], document: Document) -> None:
        nonlocal attempts
        (row,) = rows
        finished[int(row.document_id[4:])] += 1
        statuses[row.outcome.status] += 1
        attempts += row.attempts
        progress.add(rows, document.size_bytes)
        writer.add(row)

    def tick() -> None:
        nonlocal memory, next_look
        writer.tick()
        progress.workers(scheduler.live, scheduler.starting, scheduler.in_flight)
        progress.tick()
        if pool.clock() >= next_look:
            next_look = pool.clock() + 5.0
            memory = max(memory, resident())

    scheduler = Scheduler(
        pool, listing.documents(), len(listing), Limits(workers=plan.workers, hang_after=4000.0), done, tick=tick,
        clock=pool.clock,
    )  # fmt: skip
    before, cpu = resident(), time.thread_time()
    scheduler.run()
    writer.close()
    cpu = time.thread_time() - cpu - pool.cpu
    makespan = pool.last_row - pool.first_ready
    tokens = listing.columns[:, 3] // BYTES_PER_TOKEN
    work, alone = share(tokens, plan.workers, plan.cost, plan.new_tokens)
    asked = np.zeros(plan.documents, dtype=np.uint8)
    asked[[int(name[4:]) for name in listing.ids.to_pylist()]] = 1
    wrong = writer.count(plan.documents) if plan.output else finished
    return Outcome(
        workers=plan.workers,
        documents=len(listing),
        tokens=int(tokens.sum()),
        makespan=makespan,
        ideal=max(work, alone),
        ideal_work=work,
        longest_alone=alone,
        of_ideal=max(work, alone) / makespan,
        idle=1 - pool.busy / (plan.workers * makespan),
        deaths=pool.deaths,
        computed_again=attempts - len(listing),
        driver_cpu=cpu,
        writer_cpu=writer.cpu,
        wall_seconds=time.perf_counter() - begun,
        memory_before=before,
        memory_most=max(memory, resident()),
        lost=int((wrong < asked).sum()),
        doubled=int((wrong > asked).sum()),
        statuses=dict(statuses),
        parts=writer.parts,
    )


class _Writer:
    """The job's writer with its metrics if there is an output; it counts its own processor time."""

    def __init__(self, plan: Plan, pool: SimulatedPool) -> None:
        self._store, self._sink, self.cpu, self.parts = Store(plan.output) if plan.output else None, None, 0.0, 0
        if self._store is not None:
            self._store.create()
            if part_names(self._store):
                raise JobError(f"--output {self._store.name}: it holds results; give another folder")
            self._metrics = JobMetrics(lambda message: None, clock=pool.clock)
            self._sink = Sink(
                self._store, result_schema(), flush_documents=64, flush_seconds=10.0, clock=pool.clock,
                written=self._metrics.written,
            )  # fmt: skip

    def add(self, row: Row) -> None:
        if self._sink is not None:
            begin = time.thread_time()
            self._sink.add(row)
            self.cpu += time.thread_time() - begin

    def tick(self) -> None:
        if self._sink is not None:
            begin = time.thread_time()
            self._sink.tick()
            self._metrics.tick(0, 0, 0, 0)
            self.cpu += time.thread_time() - begin

    def close(self) -> None:
        if self._sink is not None and self._store is not None:
            begin = time.thread_time()
            self._sink.flush()
            self.parts = len(part_names(self._store))
            compact(self._store)
            self.cpu += time.thread_time() - begin

    def count(self, documents: int) -> np.ndarray:
        """How many rows each document has, as any Parquet reader sees them, uint8 [documents]."""
        assert self._store is not None
        ids = read_results(self._store.location, ["document_id"])["document_id"].to_pylist()
        return np.bincount([int(name[4:]) for name in ids], minlength=documents).astype(np.uint8)


def resident() -> int:
    """Bytes of memory of this process."""
    return psutil.Process().memory_info().rss
