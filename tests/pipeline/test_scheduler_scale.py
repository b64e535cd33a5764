"""The scheduler with many workers, and with a number of workers that changes."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
from test_scheduler import NAMES, Behave, Workers, by_id, document, ok

from pipeline.results.rows import Row
from pipeline.source import Document
from pipeline.workers.cluster_size import LOOK_EVERY, ClusterSize
from pipeline.workers.pool import Event
from pipeline.workers.scheduler import Limits, Scheduler


def make(names: list[str], pool: Workers, rows: list[Row], tick: Any = lambda: None, **limits: Any) -> Scheduler:
    return Scheduler(
        pool, map(document, names), len(names), Limits(**limits), lambda found, item: rows.extend(found),
        clock=pool.clock, tick=tick,
    )  # fmt: skip


def calls_per_document(workers: int) -> float:
    """Calls that the scheduler makes, Python's own included, for each document."""
    names = [f"d{i}" for i in range(20 * workers)]
    rows: list[Row] = []
    scheduler = make(names, Workers(ok), rows, workers=workers, hang_after=1e9)
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call") and frame.f_code.co_filename.endswith("pipeline/workers/scheduler.py")

    sys.setprofile(count)
    try:
        scheduler.run()
    finally:
        sys.setprofile(None)
    assert len(by_id(rows)) == len(names)
    return calls / len(names)


def test_a_document_costs_the_same_with_many_workers() -> None:
    assert calls_per_document(400) < 1.2 * calls_per_document(8)


def test_more_workers_are_started_when_there_is_room_for_more() -> None:
    pool, rows = Workers(ok), []  # type: ignore[var-annotated]
    scheduler = make(NAMES, pool, rows, tick=lambda: scheduler.resize(5) if len(rows) >= 4 else None, workers=2)
    scheduler.run()
    assert len(by_id(rows)) == len(NAMES)
    assert pool.count == 5


def test_starts_that_are_too_many_are_given_up_and_live_workers_kept() -> None:
    pool, rows = Workers(ok, starts=["", "", *["later"] * 1000]), []  # type: ignore[var-annotated]
    names = [f"d{i}" for i in range(200)]
    starting = []

    def tick() -> None:
        if pool.time >= 2.0 and scheduler.starting == 3 and not starting:
            scheduler.resize(1)
        starting.append(scheduler.starting) if pool.time >= 2.0 else None

    scheduler = make(names, pool, rows, tick, workers=5, settle=1.0)
    scheduler.run()
    assert len(by_id(rows)) == len(names)
    assert starting[0] == 3, "not at once: those on a node that left end by themselves"
    assert starting[-1] == 0
    assert scheduler.live == 2
    assert pool.count == 5, "and none is started again"


def test_random_sizes_deaths_and_hangs_lose_and_double_nothing() -> None:
    for seed in range(30):
        chance = random.Random(seed)

        def behave(pool: Workers, worker: int, item: Document, chance: random.Random = chance) -> Event | None:
            drawn = chance.random()
            if drawn < 0.02:
                return Event("died", worker, item.document_id, reason="x")
            return ok(pool, worker, item, "oom" if drawn > 0.97 else "ok") if drawn > 0.3 else None

        run_resized(behave, chance)


def run_resized(behave: Behave, chance: random.Random) -> None:
    pool, rows = Workers(behave), []  # type: ignore[var-annotated]
    scheduler = make(
        NAMES, pool, rows, lambda: scheduler.resize(chance.randint(1, 9)), workers=3, hang_after=4.0, settle=0.2
    )
    scheduler.run()
    assert sorted(by_id(rows)) == sorted(NAMES)
    assert (scheduler.in_flight, scheduler.waiting) == (0, 0)
    assert scheduler.live + scheduler.starting == len(pool.held)


def test_the_cluster_is_looked_at_now_and_then_and_after_a_loss() -> None:
    now, room, looks = 0.0, 3, 0
    told: list[int] = []
    said: list[str] = []

    def look() -> int:
        nonlocal looks
        looks += 1
        return room

    size = ClusterSize(3, look, told.append, said.append, clock=lambda: now)
    for _ in range(100):
        size.tick()
        now += LOOK_EVERY / 10
    assert looks == 9
    assert told == []
    room = 5
    now += LOOK_EVERY
    size.tick()
    room = 2
    size.worker_lost()
    size.tick()
    room = 0
    size.worker_lost()
    size.tick()
    assert told == [5, 2, 1], "one is wanted even of none"
    assert said[0] == "the cluster has grown: 5 workers instead of 3"
    assert said[1] == "the cluster has shrunk: 2 workers instead of 5"


@pytest.mark.parametrize("documents", [5, 40])
def test_no_worker_is_started_without_a_document_for_it(documents: int) -> None:
    pool, rows = Workers(ok), []  # type: ignore[var-annotated]
    scheduler = make(NAMES[:documents], pool, rows, tick=lambda: scheduler.resize(100), workers=2)
    scheduler.run()
    assert len(by_id(rows)) == documents
    assert pool.count <= documents
