"""What Ray adds: real actors that do nothing, fed through the Ray pool by the job's scheduler and writer."""

from __future__ import annotations

import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from pipeline.results.rows import Row, result_schema
from pipeline.results.sink import Sink
from pipeline.results.store import Store
from pipeline.source import Document
from pipeline.workers.metrics import JobMetrics
from pipeline.workers.ray_pool import RayPool, Share, connected
from pipeline.workers.scheduler import Limits, Scheduler
from tools.simulate.cost import H100
from tools.simulate.pool import SimulatedPool
from tools.simulate.run import catalogue

# Documents before the clock starts: Ray's connections to its actors are made with the first calls.
WARM = 0.2


class IdleWorker:
    """Stands in for pipeline.workers.worker.Worker: every document is done at once."""

    def __init__(self, config: Any) -> None:
        pool = SimulatedPool(H100, 256, start_seconds=0, failures=0, driver_seconds=0, seed=0)
        self._make_row = pool.make_row

    async def load(self) -> dict[str, Any]:
        """Say how many documents it takes."""
        return {"max_live": H100.max_live}

    async def process(self, document: Document, careful: bool = False) -> list[Row]:
        """A full row."""
        return [self._make_row(document, 0.0, 0.0, 0)]


@dataclass(frozen=True)
class Overhead:
    """documents_per_second: that one driver fed to the actors and wrote, on this machine, which the actors share.
    cpu_seconds: of the driver process for each document, all its threads. documents: that were counted.
    """

    actors: int
    documents: int
    documents_per_second: float
    cpu_seconds: float


def measure(actors: int, documents: int) -> Overhead:
    """Feed documents to `actors` actors. Raises JobError if Ray cannot be started."""
    listing = catalogue(np.full(documents, 1000))
    begun = cpu = 0.0
    done_count = counted = 0

    def done(rows: list[Row], document: Document) -> None:
        nonlocal done_count, begun, cpu, counted
        sink.add(*rows)
        done_count += 1
        if not begun and done_count >= WARM * documents:
            begun, cpu, counted = time.perf_counter(), _cpu(), documents - done_count

    def tick() -> None:
        sink.tick()
        metrics.tick(scheduler.waiting, scheduler.in_flight, scheduler.live, scheduler.starting)

    with tempfile.TemporaryDirectory(prefix="stemline_overhead_") as folder, connected("local"):
        metrics = JobMetrics(lambda message: None)
        sink = Sink(
            Store(str(Path(folder))), result_schema(), flush_documents=64, flush_seconds=10.0, written=metrics.written
        )
        pool = RayPool(cast(Any, None), Share("cpu", actors, 0.001, 0.0, 1), local=True, worker_class=IdleWorker)
        scheduler = Scheduler(pool, listing.documents(), documents, Limits(workers=actors), done, tick=tick)
        scheduler.run()
        sink.flush()
        seconds, cpu = time.perf_counter() - begun, _cpu() - cpu
        pool.close()
    return Overhead(actors, counted, counted / seconds, cpu / counted)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
