"""What Ray is told about a job: each written row once, whatever happened to it, and never at a document's expense."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from engine_models import TINY_READER
from result_rows import make_row

from pipeline import read_results
from pipeline.engine import Engine, EngineConfig, Request
from pipeline.job.job import run
from pipeline.job.progress import Progress
from pipeline.results.rows import STATUSES, Row, result_schema, to_table
from pipeline.results.sink import Sink
from pipeline.results.store import Store
from pipeline.results.summary import JobReport
from pipeline.settings.config import JobConfig
from pipeline.workers import metrics as metrics_module
from pipeline.workers.metrics import ADDED, DOCUMENTS, METRICS, OBSERVED, JobMetrics, report_arena

DASHBOARD = Path(__file__).parents[2] / "examples" / "monitoring" / "dashboard.json"


class Recorded:
    """What was recorded through stand-ins for Ray's classes, by metric and label values."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.gauges: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(list)
        self.observed: dict[str, list[float]] = defaultdict(list)

    def counter(self, name: str, meaning: str, labels: tuple[str, ...]) -> Any:
        def inc(value: float, tags: dict[str, str]) -> None:
            assert value > 0, "Ray's counters refuse 0"
            assert tuple(tags) == labels
            self.counts[name, tuple(tags.values())] += value

        return type("Counter", (), {"inc": staticmethod(inc)})

    def gauge(self, name: str, meaning: str, labels: tuple[str, ...]) -> Any:
        def set_(value: float, tags: dict[str, str]) -> None:
            self.gauges[name, tuple(tags.values())].append(value)

        return type("Gauge", (), {"set": staticmethod(set_)})

    def histogram(self, name: str, meaning: str, buckets: list[float], labels: tuple[str, ...]) -> Any:
        assert buckets == sorted(buckets)
        assert buckets[0] > 0, "Ray's histograms refuse 0"
        return type("Histogram", (), {"observe": staticmethod(lambda value, tags: self.observed[name].append(value))})

    def total(self, name: str) -> float:
        return sum(value for (found, _), value in self.counts.items() if found == name)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    import ray.util.metrics

    recorded = Recorded()
    for name in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(ray.util.metrics, name, getattr(recorded, name.lower()))
    return recorded


def refuse(*arguments: Any) -> None:
    raise RuntimeError("the agent is not there")


def row(name: str = "d", status: str = "ok", **values: Any) -> Row:
    return make_row(name, "d.txt", status, **values)


def job(docs: Path, out: Path, model: Path, stream: io.StringIO | None = None, **settings: Any) -> JobReport:
    defaults = {"workers": 1, "max_new_tokens": 8, "device": "cpu", "flush_documents": 3, "max_attempts": 1}
    config = JobConfig(input=str(docs), output=str(out), model=str(model), **(defaults | settings))  # type: ignore[arg-type]
    progress = Progress(9, 9, stream=stream) if stream else None
    return run(config, engine_factory="fake_engine:FakeEngine", grace=1.0, progress=progress)


def write(folder: Path, texts: dict[str, str]) -> Path:
    folder.mkdir()
    rows = [json.dumps({"id": name, "text": text}) for name, text in texts.items()]
    (folder / "docs.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.usefixtures("ray_here")
def test_every_row_counts_once_after_a_stop_retries_and_the_loss_of_workers(
    recorded: Recorded,
    tmp_path: Path,
    model: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics_module, "EVERY", 0.0)  # a worker here starts in less than a second
    texts = {f"slow{i}": "SLOW " * (20 - i) for i in range(8)} | {"oom": "OOM", "bad": "ALWAYSOOM", "empty": ""}
    docs, out = write(tmp_path / "docs", texts | {"breaker": "RAISE"}), tmp_path / "out"

    def stop_when_something_is_there() -> None:
        while len(list(out.glob("part-*.parquet"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_something_is_there).start()
    assert job(docs, out, model).stopped
    first = recorded.total("stemline_documents")
    assert first == len(read_results(out)) < len(texts)
    assert job(docs, out, model).counts == {"ok": 9, "error": 2, "oom": 1}

    table = read_results(out)
    rows = table.to_pylist()
    expected = Counter((row["status"], row["attention"] or "none") for row in rows)
    assert {key: value for (name, key), value in recorded.counts.items() if name == "stemline_documents"} == expected
    for column in ("prompt_tokens", "output_tokens"):
        assert recorded.total(f"stemline_{column}") == sum(row[column] or 0 for row in rows) > 0
    queued = sum(row["queue_seconds"] or 0 for row in rows)
    assert recorded.counts["stemline_phase_seconds", ("queue",)] == pytest.approx(queued)
    assert len(recorded.observed["stemline_prefill_seconds"]) == 9
    told = capfd.readouterr().err.count(" lost with ")
    assert recorded.counts["stemline_workers_lost", ("failed",)] == told
    assert told in (1, 2), "once with neighbours, if it had any, and once alone"
    assert set(recorded.gauges["stemline_workers", ("live",)]) == {0, 1}
    assert max(recorded.gauges["stemline_pending_documents", ("in_flight",)]) > 1


def test_a_row_counts_when_it_is_written_and_not_before(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = JobMetrics(pytest.fail)
    store = Store(str(tmp_path))
    sink = Sink(store, result_schema(), flush_documents=99, flush_seconds=99, written=metrics.written)
    sink.add(row("a", prompt_tokens=7))
    sink.add(row("b", kernel=7))  # does not fit the schema: it becomes an error row
    with metrics:
        monkeypatch.setattr(store, "write", lambda *_: refuse())
        with pytest.raises(RuntimeError):
            sink.flush()
    assert not recorded.counts
    monkeypatch.undo()
    monkeypatch.setattr("ray.util.metrics.Counter", recorded.counter)
    with metrics:
        sink.flush()
        sink.flush()
    assert recorded.total("stemline_documents") == 2
    assert recorded.counts["stemline_documents", ("error", "none")] == 1, "as it is in the file"
    assert recorded.total("stemline_prompt_tokens") == 7


def test_what_is_in_flight_is_told_every_second(recorded: Recorded) -> None:
    now = [0.0]
    metrics = JobMetrics(pytest.fail, clock=lambda: now[0])
    for second in (0.0, 0.9, 1.0):
        now[0] = second
        metrics.tick(int(100 - 10 * second), 4, 1, 1)
    assert recorded.gauges["stemline_pending_documents", ("waiting",)] == [100, 90]
    assert recorded.gauges["stemline_workers", ("starting",)] == [1, 1]


@pytest.mark.parametrize("missing", [False, True])
def test_metrics_that_fail_are_told_of_once(missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing:
        monkeypatch.setitem(sys.modules, "ray.util.metrics", None)
        monkeypatch.delattr("ray.util.metrics", raising=False)
    else:
        monkeypatch.setattr("ray.util.metrics.Counter", refuse)
    warnings: list[str] = []
    with JobMetrics(warnings.append) as metrics:
        for _ in range(3):
            metrics.written(to_table([row()], result_schema()))
            metrics.worker_lost("died")
            metrics._publish()
            metrics.tick(1, 1, 1, 0)
    assert len(warnings) == 1
    assert warnings[0].startswith("no metrics from now on: ")


@pytest.mark.usefixtures("ray_here")
def test_a_job_goes_on_without_metrics(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.util.metrics.Gauge", refuse)
    told = io.StringIO()
    docs = write(tmp_path / "docs", {f"d{i}": "SLOW text" for i in range(6)})
    assert job(docs, tmp_path / "out", model, told).counts == {"ok": 6}
    assert told.getvalue().count("no metrics from now on: RuntimeError: the agent is not there") == 1


def test_a_worker_whose_arena_cannot_be_asked_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    with caplog.at_level(logging.WARNING):
        for here in (False, True):
            monkeypatch.setattr(ray, "is_initialized", lambda here=here: here)
            asyncio.run(report_arena(object(), "host/1"))  # type: ignore[arg-type]
    assert [record.message for record in caplog.records] == [
        "no metrics from now on: AttributeError: 'object' object has no attribute 'arena_use'"
    ]


def test_the_arena_shows_what_documents_hold(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(metrics_module, "EVERY", 0.01)
    engine = Engine(EngineConfig(str(TINY_READER), device="cpu", arena_tokens=1000, chunk_tokens=64))

    async def some_reports() -> None:
        report = asyncio.create_task(report_arena(engine, "host/1"))
        await asyncio.sleep(0.1)
        report.cancel()

    seen = []
    engine.add(Request("a", [5] * 100, 28))
    for _ in range(2):
        asyncio.run(some_reports())
        names = ("stemline_arena_used_tokens", "stemline_arena_capacity_tokens")
        seen.append(tuple(recorded.gauges[name, ("host/1",)][-1] for name in names))
        engine.step()
    while engine.has_work:
        engine.step()
    assert seen == [(0, 1024), (128, 1024)]
    assert engine.arena_use == (0, 1024)


def test_labels_take_few_values_and_columns_exist() -> None:
    names = result_schema().names
    assert set(OBSERVED) | set(ADDED) < set(names)
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert {label for metric in METRICS for label in metric.labels} == {
        "status", "attention", "phase", "reason", "state", "worker",
    }  # fmt: skip
    assert DOCUMENTS.labels == ("status", "attention")
    assert len(STATUSES) == 6


def queries() -> list[tuple[str, str]]:
    dashboard = json.loads(DASHBOARD.read_text())
    return [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]]


def test_the_dashboard_asks_for_what_there_is_and_shows_all_of_it() -> None:
    by_series = {series: metric for metric in METRICS for series in metric.series}
    shown = set()
    for title, expression in queries():
        found = re.findall(r"ray_\w+", expression)
        assert found, title
        for series in found:
            assert series in by_series, title
        shown |= {by_series[series].name for series in found}
        labels = {label for series in found for label in by_series[series].labels} | {"le"}
        used = re.findall(r'(\w+)!?="', expression)
        used += [name for group in re.findall(r"by \((.*?)\)", expression) for name in group.split(", ")]
        assert set(used) <= labels, title
    assert shown == {metric.name for metric in METRICS}


def test_the_dashboard_is_one_that_grafana_can_draw() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells), "no panel lies on another"
    assert max(x for x, _ in cells) == 23
    sources = {json.dumps(item["datasource"]) for panel in panels for item in (panel, *panel["targets"])}
    assert sources == {json.dumps({"type": "prometheus", "uid": "${datasource}"})}
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource"]
