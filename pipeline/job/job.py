"""A whole job: list the input, settle what is left to do, run it, report."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from typing import Any

import numpy as np

from pipeline.engine.laps import Laps
from pipeline.errors import JobError, one_line, visible
from pipeline.imports import check_kernels
from pipeline.interruptible import stop_signals
from pipeline.job import manifest
from pipeline.job.on_finish import broken_off, finished, notify
from pipeline.job.plan import JobPlan, make_plan, survey_input
from pipeline.job.progress import Progress
from pipeline.location import safe_name
from pipeline.results.parts import COMPACT_ABOVE, compact, part_names, recover, remove_rows
from pipeline.results.rows import failed_rows
from pipeline.results.sink import Sink
from pipeline.results.store import Store
from pipeline.results.summary import JobReport, summarize_results
from pipeline.settings.config import JobConfig, from_mapping
from pipeline.source import Catalogue
from pipeline.workers.metrics import JobMetrics


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
    """Run a job, and tell --on-finish. engine_factory, progress, grace: for tests and benchmarks. Raises JobError."""
    try:
        report = _complete(config, engine_factory, progress, grace)
    except JobError as error:
        if config.on_finish:
            notify(config.on_finish, broken_off(safe_name(config.output), error), _to_stderr)
        raise
    if config.on_finish:
        notify(config.on_finish, finished(report), _to_stderr)
    return report


def _to_stderr(message: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads it, it is closed, there is none
        print(visible(message), file=sys.stderr, flush=True)


def _complete(config: JobConfig, engine_factory: str, progress: Progress | None, grace: float | None) -> JobReport:
    laps = Laps()
    survey = survey_input(config)
    store = Store(config.output)
    store.create()
    with store.locked():
        messages = [*survey.messages, *recover(store)]
        plan = make_plan(survey, store)
        remove_rows(store, plan.stale_errors)
        messages += plan.messages
        if not len(plan.pending):
            _note_finished(store, plan)
            what = "their rows" if len(survey.questions.names) > 1 else "a row"
            messages.append(f"nothing to do: all {len(survey.catalogue):,} documents have {what} in {store.name}")
            names = survey.questions.names
            return summarize_results(store, len(survey.catalogue), names, messages=tuple(messages))
        if plan.already:
            messages.append(f"going on: {plan.already:,} rows are there, {len(plan.pending):,} documents are left")
        laps.end("listing")
        return _Run(plan, store, messages, progress, laps).execute(engine_factory, grace)


def _note_finished(store: Store, plan: JobPlan) -> None:
    """Write the manifest of a job that died behind its last row, or whose manifest is damaged."""
    found = {}
    with contextlib.suppress(JobError):
        found = manifest.load(store) or {}
    asked = list(plan.survey.questions.names)
    if found.get("state") != "finished" or (found.get("questions"), found.get("asked")) != (plan.asked, asked):
        _save_manifest(store, plan, "finished")


def _save_manifest(store: Store, plan: JobPlan, state: str, **more: Any) -> None:
    survey = plan.survey
    more |= {"state": state, "documents": len(survey.catalogue), "prompt_date": survey.today}
    more |= {"questions": plan.asked, "asked": survey.questions.names, "prompt": survey.questions.frame()}
    manifest.save(store, survey.config, survey.prints, **more)


class _Run:
    """A job that has documents left, from the manifest's "running" to its "finished" or "stopped". `execute` is all.

    progress: of tests and benchmarks, else one that tells on standard error. laps: what was done before.
    """

    def __init__(self, plan: JobPlan, store: Store, messages: list[str], progress: Progress | None, laps: Laps) -> None:
        config = plan.survey.config
        self._begun = time.monotonic()
        self._laps = laps
        self._plan, self._store, self._messages = plan, store, messages
        most = plan.survey.questions.most_tokens(config.max_new_tokens)
        self._progress = progress or Progress(len(plan.pending), plan.pending.total_bytes, most=most)
        self._metrics = JobMetrics(self._progress.message)
        self._sink = Sink(
            store,
            plan.survey.columns,
            flush_documents=config.flush_documents,
            flush_seconds=config.flush_seconds,
            replaces=plan.replaced,
            written=self._metrics.written,
        )
        self._stats: dict[str, Any] = {}
        self._stopped = False

    def execute(self, engine_factory: str, grace: float | None) -> JobReport:
        """Give every document that is left its row, as far as nobody stops it. Raises JobError."""
        _save_manifest(self._store, self._plan, "running")
        for message in self._messages:
            self._progress.message(message)
        try:
            left = self._write_unreadable()
            if len(left):
                self._process(left, engine_factory, grace)
            self._sink.flush()
        finally:
            self._progress.finish()
        return self._conclude()

    def _write_unreadable(self) -> Catalogue:
        """Rows for documents that the listing already found unreadable; what is left to process."""
        pending = self._plan.pending
        readable = np.ones(len(pending), dtype=bool)
        for position in sorted(pending.errors):
            document = pending.document(position)
            rows = failed_rows(document, "error", document.error)
            readable[position] = False
            self._progress.add(rows, document.size_bytes)
            self._sink.add(*rows)
        return pending.select(readable) if pending.errors else pending

    def _process(self, documents: Catalogue, engine_factory: str, grace: float | None) -> None:
        """Take documents through workers on Ray."""
        # Ray and the engine are imported here, so that "nothing to do" and user errors come at once.
        from ray.exceptions import RayError

        from pipeline.job.ray_run import RayRun
        from pipeline.workers.ray_pool import connected
        from pipeline.workers.scheduler import StopRequestedError

        survey = self._plan.survey
        try:
            with connected(survey.config.ray_address) as cluster, _StopFlag() as flag:
                self._laps.end("Ray")
                work = RayRun(
                    survey, documents, cluster, sink=self._sink, progress=self._progress, metrics=self._metrics,
                    should_stop=flag.is_set, engine_factory=engine_factory, grace=grace,
                    laps=self._laps,
                )  # fmt: skip
                try:
                    self._stats = work.run()
                except StopRequestedError:
                    self._stopped = True
        except (RayError, ConnectionError) as error:  # the latter of Ray's client
            raise JobError(f"Ray failed: {one_line(error, 300)}; what was finished is written, run it again") from None

    def _conclude(self) -> JobReport:
        """Tidy up, note how it ended, and report."""
        survey, store, messages = self._plan.survey, self._store, list(self._messages)
        if not self._stopped and survey.config.compact and len(part_names(store)) > COMPACT_ABOVE:
            compact(store)
        state = "stopped" if self._stopped else "finished"
        told = {"seconds": time.monotonic() - self._begun, "start_seconds": self._stats.get("start_seconds", {})}
        _save_manifest(store, self._plan, state, **told)
        if self._stopped:
            messages.append("stopped; what was finished is written, the same command goes on from there")
            if self._sink.rows_to_replace:
                what = f"{self._sink.rows_to_replace:,} rows that were to be done again are the earlier ones"
                messages.append(what)
        return summarize_results(
            store, len(survey.catalogue), survey.questions.names, done_now=self._sink.rows_written,
            seconds=self._progress.seconds, stopped=self._stopped, messages=tuple(messages), stats=self._stats,
        )  # fmt: skip


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
