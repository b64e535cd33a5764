"""A whole job: list the input, settle what is left to do, run it, report."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from pipeline import manifest
from pipeline.answering import stop_signals
from pipeline.config import JobConfig, from_mapping
from pipeline.errors import JobError, one_line
from pipeline.imports import check_kernels
from pipeline.metrics import JobMetrics
from pipeline.plan import Plan, Survey, make_plan, make_worker_config, survey_input
from pipeline.progress import Progress
from pipeline.repair import remove_rows
from pipeline.rows import Row, failed_row, result_schema
from pipeline.sink import COMPACT_ABOVE, Sink, compact, part_names, recover
from pipeline.source import Catalogue, Document
from pipeline.store import Store
from pipeline.summary import JobReport, summarize_results


def run_job(config: JobConfig | None = None, **settings: Any) -> JobReport:
    """Run a job and report on it: run_job(input="docs/", output="out/", model="path", ...).

    settings: the fields of JobConfig. Raises JobError if the job cannot run; documents that fail do not raise, they
    have rows (report.counts, read_results).
    """
    check_kernels()
    if config is None:
        settings = from_mapping(settings, "run_job()")
        config = JobConfig(**settings)
    elif settings:
        raise JobError("run_job() takes a JobConfig or settings, not both")
    return run(config)


def run(
    config: JobConfig, *, engine_factory: str = "", progress: Progress | None = None, grace: float | None = None
) -> JobReport:
    """Run a job. engine_factory, progress, grace: for tests and benchmarks. Raises JobError."""
    survey = survey_input(config)
    store = Store(config.output)
    store.create()
    with store.locked():
        messages = [*survey.messages, *recover(store)]
        plan = make_plan(survey, store)
        remove_rows(store, plan.repaired)
        messages += plan.messages
        if not len(plan.pending):
            _note_finished(store, plan.survey)
            messages.append(f"nothing to do: all {len(survey.catalogue):,} documents have a row in {store.name}")
            return summarize_results(store, len(survey.catalogue), messages=tuple(messages))
        if plan.already:
            messages.append(f"going on: {plan.already:,} rows are there, {len(plan.pending):,} documents are left")
        return _execute(plan, store, messages, engine_factory, progress, grace)


def _note_finished(store: Store, survey: Survey) -> None:
    """Write the manifest of a job that died behind its last row, or whose manifest is damaged."""
    state = None
    with contextlib.suppress(JobError):
        state = (manifest.load(store) or {}).get("state")
    if state != "finished":
        _save_manifest(store, survey, "finished")


def _save_manifest(store: Store, survey: Survey, state: str, **more: Any) -> None:
    more |= {"state": state, "documents": len(survey.catalogue), "prompt_date": survey.today}
    manifest.save(store, survey.config, survey.prints, **more)


def _execute(
    plan: Plan, store: Store, messages: list[str], engine_factory: str, progress: Progress | None, grace: float | None
) -> JobReport:
    # Ray and the engine are imported here, so that "nothing to do" and user errors come at once.
    from ray.exceptions import RayError

    from pipeline.cluster_size import ClusterSize
    from pipeline.pool import EventKind
    from pipeline.pulse import pulse
    from pipeline.ray_pool import RayPool, connected, divide, room_for, room_now
    from pipeline.scheduler import Limits, Scheduler, StopRequestedError

    survey, config, begun = plan.survey, plan.survey.config, time.monotonic()
    _save_manifest(store, survey, "running")
    schema = result_schema(survey.catalogue.kept)
    progress = progress or Progress(len(plan.pending), plan.pending.total_bytes)
    metrics = JobMetrics(progress.message)
    sink = Sink(
        store, schema, flush_documents=config.flush_documents, flush_seconds=config.flush_seconds,
        replaces=plan.replaced, written=metrics.written,
    )  # fmt: skip
    for message in messages:
        progress.message(message)
    left = _write_unreadable(plan.pending, sink, progress)
    stats: dict[str, Any] = {}
    stopped = False
    clock = _Clock(progress)

    def done(row: Row, document: Document) -> None:
        progress.add(row, document.size_bytes)
        sink.add(row)

    def tick() -> None:
        sink.tick()
        heart.check()
        progress.workers(scheduler.live, scheduler.starting, scheduler.in_flight)
        progress.tick()
        metrics.tick(scheduler.waiting, scheduler.in_flight, scheduler.live, scheduler.starting)
        clock.start_once(bool(scheduler.started))
        if size is not None:
            size.tick()

    def lost(kind: EventKind) -> None:
        metrics.worker_lost(kind)
        if size is not None:
            size.worker_lost()

    size: ClusterSize | None = None
    try:
        if len(left):
            with connected(config.ray_address) as cluster, _StopFlag() as flag:
                share = divide(cluster, config.device, config.workers, len(left), config.gpus_per_worker)
                worker_config = make_worker_config(survey, share.device, share.threads, engine_factory, grace)
                heart = pulse(cluster.local)
                pool = RayPool(worker_config, share, local=cluster.local)
                limits = Limits(
                    workers=share.workers,
                    max_attempts=config.max_attempts,
                    hang_after=config.deadline + 3 * worker_config.grace if config.deadline else 0.0,
                )
                workers, documents = "s" * (share.workers != 1), "s" * (len(left) != 1)
                progress.message(
                    f"starting {share.workers} worker{workers} on {share.device} for {len(left):,} document{documents}"
                )
                room = room_for(cluster, share.device, config.gpus_per_worker)
                if share.device == "cuda" and share.workers > room:
                    progress.message(f"the cluster has room for {room} of them now; the others wait until it has more")
                scheduler = Scheduler(
                    pool,
                    left.documents(),
                    len(left),
                    limits,
                    done,
                    tick=tick,
                    should_stop=flag.is_set,
                    log=progress.message,
                    on_loss=lost,
                )
                if config.workers == "auto" and not cluster.local:
                    now = partial(room_now, share, config.gpus_per_worker)
                    size = ClusterSize(room, now, scheduler.resize, progress.message)
                with contextlib.closing(pool), metrics, _flushed(sink):
                    try:
                        scheduler.run()
                        sink.flush()
                        stats = _stats(pool, clock.seconds, sink)
                    except StopRequestedError:
                        stopped = True
        sink.flush()
    except (RayError, ConnectionError) as error:  # the latter of Ray's client
        raise JobError(f"Ray failed: {one_line(error, 300)}; what was finished is written, run it again") from None
    finally:
        progress.finish()
    if not stopped and config.compact and len(part_names(store)) > COMPACT_ABOVE:
        compact(store)
    state = "stopped" if stopped else "finished"
    _save_manifest(store, survey, state, seconds=time.monotonic() - begun)
    if stopped:
        messages.append("stopped; what was finished is written, the same command goes on from there")
        if sink.rows_to_replace:
            messages.append(f"{sink.rows_to_replace:,} documents that were to be done again have their earlier rows")
    return summarize_results(
        store, len(survey.catalogue), done_now=sink.rows_written, seconds=clock.seconds, stopped=stopped,
        messages=tuple(messages), stats=stats,
    )  # fmt: skip


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


class _Clock:
    """Seconds since the first worker was ready."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._begun = 0.0

    def start_once(self, ready: bool) -> None:
        if ready and not self._begun:
            self._begun = time.monotonic()
            self._progress.start_clock()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun if self._begun else 0.0


def _stats(pool: Any, seconds: float, sink: Sink) -> dict[str, Any]:
    """Where the time of a run went: seconds of all engines, readers and workers together, and of the run."""
    workers = pool.stats()
    return {
        "workers": len(workers),
        "seconds": seconds,
        "engine_seconds": sum(item["engine_seconds"] for item in workers),
        "reader_seconds": sum(item["reader_seconds"] for item in workers),
        "span_seconds": sum(item["span_seconds"] for item in workers),
        "documents": sink.rows_written,
    }


def _write_unreadable(pending: Catalogue, sink: Sink, progress: Progress) -> Catalogue:
    """Rows for documents that the listing already found unreadable; what is left to process."""
    keep = np.ones(len(pending), dtype=bool)
    for position in sorted(pending.errors):
        document = pending.document(position)
        row = failed_row(document, "error", document.error)
        keep[position] = False
        progress.add(row, document.size_bytes)
        sink.add(row)
    return pending.select(keep) if pending.errors else pending


class _StopFlag(contextlib.AbstractContextManager["_StopFlag"]):
    """Set by SIGTERM, SIGINT or SIGHUP (unless that is ignored: nohup); a second SIGINT interrupts at once.

    Outside the main thread it is never set.
    """

    def __init__(self) -> None:
        self._set = False
        self._before: dict[int, Any] = {}

    def is_set(self) -> bool:
        return self._set

    def __enter__(self) -> _StopFlag:
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self._set and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._set = True
