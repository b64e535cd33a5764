"""The scheduler over workers that exist only here: order, blame, replacement, bounds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from result_rows import make_row

from pipeline.errors import JobError
from pipeline.results.rows import Row
from pipeline.source import Document, Locator
from pipeline.workers.pool import Event, EventKind, one_loss_each
from pipeline.workers.scheduler import Limits, Scheduler, StopRequestedError

Behave = Callable[["Workers", int, Document], Event | None]


def document(name: str) -> Document:
    return Document(name, f"{name}.txt", Locator("", name, "text", 0, 1), 1)


class Workers:
    """A pool in virtual time: each wait lets every worker finish its first document, as `behave` says."""

    def __init__(self, behave: Behave, max_live: int = 2, starts: Sequence[str] = ()) -> None:
        self.behave, self.max_live, self.starts = behave, max_live, iter(starts)
        self.held: dict[int, list[Document]] = {}
        self.fresh: list[int] = []
        self.count = 0
        self.time = 0.0
        self.most_held = 0
        self.order: list[str] = []
        self.careful: list[str] = []
        self.slower: list[str] = []
        self.notes: list[str] = []

    def clock(self) -> float:
        return self.time

    def start(self) -> int:
        self.count += 1
        self.held[self.count] = []
        self.fresh.append(self.count)
        return self.count

    def submit(self, worker: int, item: Document, careful: bool) -> None:
        self.held[worker].append(item)
        self.order.append(item.document_id)
        if careful:
            assert self.held[worker] == [item], "a suspect is alone"
            self.careful.append(item.document_id)
        self.most_held = max(self.most_held, sum(map(len, self.held.values())))

    def kill(self, worker: int) -> None:
        self.held.pop(worker, None)

    def wait(self, timeout: float) -> list[Event]:
        self.time += timeout
        events, later = [], []
        for worker in self.fresh:
            problem = next(self.starts, "")
            final = problem.startswith("refused")
            info = {"max_live": self.max_live, "engine": {"slower": self.slower, "notes": self.notes}}
            if problem == "later":
                later.append(worker)
            else:
                kind: EventKind = "start_failed" if problem else "started"
                events.append(Event(kind, worker, reason=problem, final=final, info=info))
        self.fresh = later
        for worker, items in list(self.held.items()):
            event = self.behave(self, worker, items[0]) if items else None
            if event:
                if event.kind == "result":
                    items.pop(0)
                events.append(event)
        return events


def ok(workers: Workers, worker: int, item: Document, status: str = "ok") -> Event:
    row = make_row(item.document_id, item.source, status)
    return Event("result", worker, item.document_id, rows=[row])


def run(names: list[str], behave: Behave, *, workers: int = 2, **options: Any) -> tuple[list[Row], Workers, Scheduler]:
    pool = Workers(behave, starts=options.pop("starts", ()))
    rows: list[Row] = []
    should_stop = options.pop("should_stop", lambda: False)
    scheduler = Scheduler(
        pool,
        map(document, names),
        len(names),
        Limits(workers=workers, **options),
        lambda found, item: rows.extend(found),
        clock=pool.clock,
        should_stop=should_stop,
    )
    scheduler.run()
    return rows, pool, scheduler


def by_id(rows: list[Row]) -> dict[str, Row]:
    assert len({row.document_id for row in rows}) == len(rows), "one row a document"
    return {row.document_id: row for row in rows}


NAMES = [f"d{i}" for i in range(40)]


def test_a_slower_path_and_notes_are_told_once() -> None:
    told: list[str] = []
    pool = Workers(ok)
    pool.slower = ["prefill runs on triton, not gluon: too old", "decode runs on reference, not triton: none"]
    pool.notes = ["fp8: attention and KV of layer 0 stay in bf16"]
    Scheduler(pool, map(document, NAMES), len(NAMES), Limits(workers=2), lambda *_: None, log=told.append).run()
    assert pool.count == 2
    assert told == [*pool.slower, *pool.notes]


def test_documents_go_out_in_order_and_come_back_once() -> None:
    rows, pool, _ = run(NAMES, ok)
    assert sorted(by_id(rows)) == sorted(NAMES)
    assert pool.order == NAMES
    assert {row.attempts for row in rows} == {1}
    assert pool.most_held <= 2 * (2 + 2), "bounded by the workers, not by the documents"


def test_no_more_workers_than_documents_and_a_fair_share_at_the_end() -> None:
    _, pool, _ = run(NAMES[:3], ok, workers=8)
    assert pool.count == 3
    _, pool, _ = run(NAMES[:4], ok, workers=2)
    assert pool.most_held <= 4


def test_at_the_end_no_document_waits_where_another_worker_could_begin_it() -> None:
    """Worker 1 is busy with what it holds; worker 2 is not to take what worker 1 would soon be free for."""
    held_then_left = []

    def behave(pool: Workers, worker: int, item: Document) -> Event | None:
        held_then_left.append((len(pool.held[2]), len(NAMES) - len(pool.order)))
        return ok(pool, worker, item) if worker == 2 or len(pool.order) == len(NAMES) else None

    rows, pool, _ = run(NAMES, behave)
    assert sorted(by_id(rows)) == sorted(NAMES)
    assert max(held for held, left in held_then_left if left > pool.max_live) == 2 + 2, "two ahead before"
    late = [held for held, left in held_then_left if 0 < left < pool.max_live]
    assert late
    assert max(late) <= pool.max_live
    assert run(NAMES[:4], ok, workers=1)[1].most_held == 4, "one worker alone takes what it can"


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_guilty_document_is_found_and_the_innocent_finish(workers: int) -> None:
    def behave(pool: Workers, worker: int, item: Document) -> Event | None:
        if any(held.document_id == "d7" for held in pool.held[worker]):
            return Event("died", worker, item.document_id, reason="killed")
        return ok(pool, worker, item)

    rows, pool, _ = run(NAMES, behave, workers=workers)
    found = by_id(rows)
    assert [name for name, row in found.items() if row.outcome.status != "ok"] == ["d7"]
    assert found["d7"].outcome.status == "worker_died"
    assert found["d7"].attempts == 3
    assert "killed" in found["d7"].outcome.error
    assert len(found) == len(NAMES)
    assert max(row.attempts for name, row in found.items() if name != "d7") == 2
    assert pool.count == workers + 3


@pytest.mark.parametrize(("kind", "status", "attempts"), [("failed", "error", 3), ("hung", "timeout", 2)])
def test_broken_and_hung_engines_are_blamed_as_such(kind: Any, status: str, attempts: int) -> None:
    def behave(pool: Workers, worker: int, item: Document) -> Event | None:
        if any(held.document_id == "d3" for held in pool.held[worker]):
            return Event(kind, worker, item.document_id, reason="why")
        return ok(pool, worker, item)

    found = by_id(run(NAMES, behave)[0])
    assert {name: row.outcome.status for name, row in found.items() if row.outcome.status != "ok"} == {"d3": status}
    assert found["d3"].attempts == attempts


def test_random_deaths_lose_and_double_nothing() -> None:
    for seed in range(30):
        chance = random.Random(seed)
        guilty = set(chance.sample(NAMES, 3))

        def behave(
            pool: Workers, worker: int, item: Document, chance: Any = chance, guilty: Any = guilty
        ) -> Event | None:
            if guilty & {held.document_id for held in pool.held[worker]} or chance.random() < 0.02:
                return Event("died", worker, item.document_id, reason="x")
            return ok(pool, worker, item) if chance.random() < 0.7 else None

        found = by_id(run(NAMES, behave, workers=3)[0])
        assert sorted(found) == sorted(NAMES)
        assert {name for name, row in found.items() if row.outcome.status == "worker_died"} >= guilty


@pytest.mark.parametrize("status", ["oom", "timeout"])
def test_a_document_that_fails_beside_others_gets_one_try_alone(status: str) -> None:
    def behave(pool: Workers, worker: int, item: Document) -> Event | None:
        crowded = len(pool.held[worker]) > 1
        bad = item.document_id == "d9" or (item.document_id == "d5" and crowded)
        return ok(pool, worker, item, status if bad else "ok")

    found = by_id(run(NAMES, behave, workers=1)[0])
    assert {name: row.outcome.status for name, row in found.items() if row.outcome.status != "ok"} == {"d9": status}
    assert (found["d5"].attempts, found["d9"].attempts, found["d1"].attempts) == (2, 2, 1)


def test_out_of_memory_without_company_gets_one_careful_try() -> None:
    rows, pool, _ = run(["only"], lambda pool, worker, item: ok(pool, worker, item, "oom"), workers=1)
    assert (rows[0].outcome.status, rows[0].attempts) == ("oom", 2)
    assert pool.careful == ["only"]

    def behave(pool: Workers, worker: int, item: Document) -> Event | None:
        return ok(pool, worker, item, "ok" if item.document_id in pool.careful else "oom")

    rows, pool, _ = run(["only"], behave, workers=1)
    assert (rows[0].outcome.status, rows[0].attempts) == ("ok", 2)


def test_silence_ends_a_worker() -> None:
    def behave(pool: Workers, worker: int, item: Document) -> Event | None:
        silent = any(held.document_id == "d2" for held in pool.held[worker])
        return None if silent else ok(pool, worker, item)

    found = by_id(run(NAMES, behave, hang_after=5.0)[0])
    assert {name: row.outcome.status for name, row in found.items() if row.outcome.status != "ok"} == {"d2": "timeout"}


def test_workers_that_never_start_end_the_job_with_the_reason() -> None:
    with pytest.raises(JobError, match="no worker could start in 3 tries; the last reason: third"):
        run(NAMES, ok, workers=1, starts=["first", "second", "third", "fourth"])


def test_what_no_worker_can_start_with_ends_the_job_at_once_unless_one_runs() -> None:
    with pytest.raises(JobError, match=r"^refused: the model$"):
        run(NAMES, ok, workers=2, starts=["refused: the model", *["later"] * 9])
    rows, pool, _ = run(NAMES, ok, workers=2, starts=["", "refused: on an older node"])
    assert len(by_id(rows)) == len(NAMES)
    assert pool.count > 2


def test_workers_that_still_start_are_waited_for() -> None:
    rows, pool, _ = run(NAMES, ok, workers=4, starts=[*["no room"] * 3, "later", *["later"] * 9, ""])
    assert len(by_id(rows)) == len(NAMES)
    with pytest.raises(JobError, match="no worker could start in 4 tries; the last reason: too slow"):
        run(NAMES, ok, workers=4, starts=[*["no room"] * 3, *["later"] * 9, "too slow"], start_pause=0.1)


def test_some_failed_starts_are_survived() -> None:
    rows, _, _ = run(NAMES, ok, workers=1, starts=["first", "second"])
    assert len(by_id(rows)) == len(NAMES)
    rows, pool, _ = run(NAMES, ok, workers=2, starts=["", *["no room"] * 50])
    assert len(by_id(rows)) == len(NAMES)
    assert pool.count == 4, "it stops trying while another worker does the job"
    rows, pool, _ = run(NAMES, ok, workers=2, starts=["", *["no room"] * 3], start_pause=1.0)
    assert pool.count == 5, "it tries again after a pause, in case a node has joined"
    assert len(by_id(rows)) == len(NAMES)


def test_a_stop_keeps_what_is_finished() -> None:
    calls = iter(range(100))
    with pytest.raises(StopRequestedError):
        run(NAMES, ok, should_stop=lambda: next(calls) > 3)


def test_a_lost_worker_is_told_of_once_and_behind_what_it_had_finished() -> None:
    lost = [Event("failed", 1, name, reason=f"of {name}") for name in "ab"]
    others = [Event("start_failed", 2), Event("result", 1, "c"), Event("started", 3)]
    told = [(event.kind, event.worker, event.document_id) for event in one_loss_each([*lost, *others])]
    assert told[:2] == [("result", 1, "c"), ("started", 3, "")]
    assert sorted(told[2:]) == [("failed", 1, "a"), ("start_failed", 2, "")]
