"""What a job tells Prometheus through Ray: its rows as they are written, and what is in flight.

Ray shows a metric as ray_<name>, a counter with _total at its end. What Ray does (seen on 2.60) says where to count:
- A counter stays when its process ends; a gauge goes two report intervals (20 s) after it was last set. So sums over
  counters never fall, gauges are set every second, and a dead worker's vanish by themselves.
- What is recorded before ray.init() is lost. So rows are tallied first and handed to Ray later.
- A histogram's sum is made of the middles of its buckets. So seconds and tokens have counters too, which are exact.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from pipeline.errors import one_line
from pipeline.results.rows import COLUMNS, PHASES
from pipeline.workers.loop import EngineLike

EVERY = 1.0
SECONDS = (
    0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 90.0,
    120.0, 300.0, 600.0, 1800.0, 3600.0,
)  # fmt: skip
SHARES = tuple(n / 20 for n in range(1, 21))


@dataclass(frozen=True)
class Metric:
    """A metric as Ray knows it. labels: names; their values come from short lists, except `worker`. buckets: bounds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """What Prometheus calls it."""
        ends = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}[self.kind]
        return tuple(f"ray_{self.name}{end}" for end in ends)


def _observed(column: str, name: str, buckets: tuple[float, ...]) -> Metric:
    """The distribution of a result column."""
    meaning = next(each.meaning for each in COLUMNS if each.name == column)
    return Metric(f"stemline_{name}", "histogram", f"{meaning}; of documents that are ok", buckets=buckets)


DOCUMENTS = Metric(
    "stemline_documents",
    "counter",
    "rows written, one for each document and question; attention is stem, dense, or none",
    ("status", "attention"),
)
PROMPT_TOKENS = Metric(
    "stemline_prompt_tokens", "counter", "tokens read for rows written; those that questions share count once"
)
OUTPUT_TOKENS = Metric("stemline_output_tokens", "counter", "tokens generated for rows written")
PHASE_SECONDS = Metric(
    "stemline_phase_seconds", "counter", "where time went, of rows written: their columns <phase>_seconds", ("phase",)
)
WORKERS_LOST = Metric(
    "stemline_workers_lost", "counter", "workers given up; another is started while documents are left", ("reason",)
)
PENDING = Metric("stemline_pending_documents", "gauge", "documents without a result: waiting, in_flight", ("state",))
WORKERS = Metric("stemline_workers", "gauge", "workers: live (they take documents), starting", ("state",))
ARENA_USED = Metric("stemline_arena_used_tokens", "gauge", "tokens of the KV arena that documents hold", ("worker",))
ARENA_CAPACITY = Metric("stemline_arena_capacity_tokens", "gauge", "tokens that the KV arena has", ("worker",))

# Result columns that make observations, and those that make counts.
OBSERVED = {
    "time_to_first_token": _observed("time_to_first_token", "time_to_first_token_seconds", SECONDS),
    **{name: _observed(name, name, SECONDS) for name in ("queue_seconds", "prefill_seconds", "decode_seconds")},
    "density": _observed("density", "density_ratio", SHARES),
}
ADDED = {"prompt_tokens": (PROMPT_TOKENS, ()), "output_tokens": (OUTPUT_TOKENS, ())} | {
    f"{phase}_seconds": (PHASE_SECONDS, (phase,)) for phase in PHASES
}
METRICS = (
    DOCUMENTS, PROMPT_TOKENS, OUTPUT_TOKENS, PHASE_SECONDS, *OBSERVED.values(), WORKERS_LOST, PENDING, WORKERS,
    ARENA_USED, ARENA_CAPACITY,
)  # fmt: skip
_COLUMNS = list(dict.fromkeys(["status", "attention", "prefix_tokens", *OBSERVED, *ADDED]))


class Instruments:
    """Ray's side of METRICS. What fails is told through `warn`, once; then there are no more metrics, and no harm."""

    def __init__(self, warn: Callable[[str], object]) -> None:
        self.failed = False
        self._warn = warn
        self._made: dict[Metric, Callable[[float, dict[str, str]], None]] = {}

    @contextlib.contextmanager
    def careful(self) -> Iterator[None]:
        """Around everything that metrics do: no exception leaves it."""
        try:
            yield
        except Exception as error:
            if not self.failed:
                self.failed = True
                self._warn(f"no metrics from now on: {type(error).__name__}: {one_line(error, 200)}")

    def record(self, metric: Metric, value: float, labels: tuple[str, ...] = ()) -> None:
        """Add to a counter, set a gauge, or observe for a histogram. Raises what Ray raises."""
        if metric not in self._made:
            self._made[metric] = _make(metric)
        self._made[metric](value, dict(zip(metric.labels, labels, strict=True)))


def _make(metric: Metric) -> Callable[[float, dict[str, str]], None]:
    from ray.util import metrics

    if metric.kind == "counter":
        return metrics.Counter(metric.name, metric.meaning, metric.labels).inc
    if metric.kind == "gauge":
        return metrics.Gauge(metric.name, metric.meaning, metric.labels).set
    return metrics.Histogram(metric.name, metric.meaning, list(metric.buckets), metric.labels).observe


class JobMetrics:
    """The driver's metrics. A row counts once: when it is written. `tick` often; a with-block publishes at its end."""

    def __init__(self, warn: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._instruments = Instruments(warn)
        self._clock = clock
        self._published_at = float("-inf")
        self._counts: defaultdict[tuple[Metric, tuple[str, ...]], float] = defaultdict(float)
        self._observations: list[tuple[Metric, float]] = []

    def written(self, rows: pa.Table) -> None:
        """Take note of rows that a part file holds now."""
        with self._instruments.careful():
            for row in rows.select(_COLUMNS).to_pylist():
                self._counts[DOCUMENTS, (row["status"], row["attention"] or "none")] += 1
                for column, key in ADDED.items():
                    self._counts[key] += row[column] or 0
                self._counts[PROMPT_TOKENS, ()] -= row["prefix_tokens"] or 0
                if row["status"] == "ok":
                    found = ((metric, row[column]) for column, metric in OBSERVED.items())
                    self._observations += [(metric, value) for metric, value in found if value is not None]

    def worker_lost(self, reason: str) -> None:
        """Take note of a worker that died, failed, hung or did not start."""
        self._counts[WORKERS_LOST, (reason,)] += 1

    def tick(self, waiting: int, in_flight: int, live: int, starting: int) -> None:
        """Publish, if it is time to. Documents that wait and that workers hold; workers that work and that start."""
        if self._instruments.failed or self._clock() - self._published_at < EVERY:
            return
        self._published_at = self._clock()
        with self._instruments.careful():
            for metric, state, value in (
                (PENDING, "waiting", waiting), (PENDING, "in_flight", in_flight),
                (WORKERS, "live", live), (WORKERS, "starting", starting),
            ):  # fmt: skip
                self._instruments.record(metric, value, (state,))
        self._publish()

    def _publish(self) -> None:
        counts, self._counts = self._counts, defaultdict(float)
        observations, self._observations = self._observations, []
        if self._instruments.failed:
            return
        with self._instruments.careful():
            for (metric, labels), value in counts.items():
                if value:  # Ray's counters refuse 0
                    self._instruments.record(metric, value, labels)
            for metric, value in observations:
                self._instruments.record(metric, value)

    def __enter__(self) -> JobMetrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self._publish()


async def report_arena(engine: EngineLike, worker: str) -> None:
    """Show how full a worker's arena is, every second, as long as the worker lives."""
    ray = sys.modules.get("ray")  # without Ray there is nobody who asks
    if ray is None or not ray.is_initialized():
        return
    instruments = Instruments(logging.getLogger(__name__).warning)
    while not instruments.failed:
        with instruments.careful():
            used, capacity = engine.arena_use
            instruments.record(ARENA_USED, used, (worker,))
            instruments.record(ARENA_CAPACITY, capacity, (worker,))
        await asyncio.sleep(EVERY)
