"""The part of a job that runs on Ray: workers on a connected cluster, and what looks after them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pipeline.engine.laps import Laps
from pipeline.errors import JobError
from pipeline.job.configs import make_worker_config
from pipeline.job.plan import Survey
from pipeline.job.progress import Progress
from pipeline.results.rows import Row
from pipeline.results.sink import Sink
from pipeline.source import Catalogue, Document
from pipeline.workers.cluster_size import ClusterSize
from pipeline.workers.heartbeat import heartbeat
from pipeline.workers.metrics import JobMetrics
from pipeline.workers.pool import EventKind
from pipeline.workers.ray_pool import Cluster, RayPool, Share, divide, room_for, room_now
from pipeline.workers.scheduler import Limits, Scheduler, hang_after


class RayRun:
    """Takes documents to workers and their rows to the sink, once: make it, `run` it.

    documents: what is left of the survey's. laps: of the job's start, what was done before.
    engine_factory, grace: see make_worker_config. should_stop: asked between
    events. Raises JobError if the cluster cannot hold the workers.
    """

    def __init__(
        self,
        survey: Survey,
        documents: Catalogue,
        cluster: Cluster,
        *,
        sink: Sink,
        progress: Progress,
        metrics: JobMetrics,
        should_stop: Callable[[], bool],
        engine_factory: str,
        grace: float | None,
        laps: Laps,
    ) -> None:
        config = survey.config
        self._laps = laps
        self._start_seconds: dict[str, float] = {}
        self._sink, self._progress, self._metrics = sink, progress, metrics
        share = divide(cluster, config.device, config.workers, len(documents), config.gpus_per_worker)
        worker_config = make_worker_config(
            config, survey.questions, survey.today, share.device, share.threads, kept=survey.catalogue.kept,
            engine_factory=engine_factory, grace=grace,
        )  # fmt: skip
        self._heartbeat = heartbeat(cluster.local)
        self._pool = RayPool(worker_config, share, local=cluster.local)
        room = room_for(cluster, share.device, config.gpus_per_worker)
        self._tell_begin(share, room, len(documents))
        self._scheduler = Scheduler(
            self._pool,
            documents.documents(),
            len(documents),
            Limits(
                workers=share.workers,
                max_attempts=config.max_attempts,
                hang_after=hang_after(config.deadline, worker_config.grace),
            ),
            self._done,
            tick=self._tick,
            should_stop=should_stop,
            log=progress.message,
            on_loss=self._lost,
        )
        self._size: ClusterSize | None = None
        if config.workers == "auto" and not cluster.local:
            now = partial(room_now, share, config.gpus_per_worker)
            self._size = ClusterSize(room, now, self._scheduler.resize, progress.message)

    def run(self) -> dict[str, Any]:
        """Process the documents; where the time went. Raises StopRequestedError on request, and JobError.

        Whatever way it ends, what is finished is written and the workers are gone.
        """
        with contextlib.closing(self._pool), self._metrics, _flushed(self._sink):
            self._scheduler.run()
            self._sink.flush()
            return self._stats()

    def _tell_begin(self, share: Share, room: int, documents: int) -> None:
        what = f"{share.workers} worker{'s' * (share.workers != 1)} on {share.device}"
        self._progress.message(f"starting {what} for {documents:,} document{'s' * (documents != 1)}")
        if share.device == "cuda" and share.workers > room:
            self._progress.message(f"the cluster has room for {room} of them now; the others wait until it has more")

    def _done(self, rows: list[Row], document: Document) -> None:
        self._progress.add(rows, document.size_bytes)
        self._sink.add(*rows)

    def _tick(self) -> None:
        scheduler = self._scheduler
        self._sink.tick()
        self._heartbeat.check()
        self._progress.workers(scheduler.live, scheduler.starting, scheduler.in_flight)
        if (read := self._pool.reading()) is not None:
            self._progress.reading(read)
        self._progress.tick()
        self._metrics.tick(scheduler.waiting, scheduler.in_flight, scheduler.live, scheduler.starting)
        if scheduler.started:
            self._progress.start_clock()
            self._note_start()
        if self._size is not None:
            self._size.tick()

    def _note_start(self) -> None:
        """Note where the seconds went until the first worker was ready, if that is not done."""
        if self._start_seconds:
            return
        before = dict(self._laps.seconds)
        self._laps.end("worker")
        inside: dict[str, float] = next(iter(self._scheduler.started.values())).get("start_seconds", {})
        process = self._laps.seconds["worker"] - sum(inside.values())
        self._start_seconds = {**before, "worker process": max(0.0, process), **inside}

    def _lost(self, kind: EventKind) -> None:
        self._metrics.worker_lost(kind)
        if self._size is not None:
            self._size.worker_lost()

    def _stats(self) -> dict[str, Any]:
        """Seconds of all engines, readers and workers together, of the run, and of its start (the parts)."""
        workers = self._pool.stats()
        names = ("engine_seconds", "reader_seconds", "span_seconds")
        return {
            "workers": len(workers),
            "seconds": self._progress.seconds,
            "start_seconds": {name: round(seconds, 3) for name, seconds in self._start_seconds.items()},
            **{name: sum(item[name] for item in workers) for name in names},
            "documents": self._sink.rows_written,
        }


@contextlib.contextmanager
def _flushed(sink: Sink) -> Iterator[None]:
    """Write what is finished before anything else is cleared away, also when the block fails."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(JobError):  # the reason why the block failed is told, not this
            sink.flush()
        raise
    sink.flush()
