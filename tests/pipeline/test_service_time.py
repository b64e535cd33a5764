"""What workers that have not answered yet are taken to have done."""

from __future__ import annotations

import pytest

from pipeline.workers.service_time import ServiceTime, Shift


def test_work_is_guessed_from_what_documents_took_so_far() -> None:
    service_time, first, second = ServiceTime(), Shift(), Shift()
    service_time.joins(first, 0.0)
    service_time.joins(second, 10.0)
    service_time.gets(first, 0.0)
    service_time.gets(second, 10.0)
    assert service_time.done(15.0, 6) == 0.0, "nothing has ended: nothing is known"
    for held in (2, 1, 0):
        service_time.ends(first, 20.0, held)
    service_time.gets(first, 20.0)
    # Three documents in 20 + 10 seconds of workers: 10 s for each.
    assert service_time.done_by(second, 20.0, 4) == pytest.approx(1.0)
    assert service_time.done_by(first, 20.0, 4) == 0.0
    assert service_time.done(20.0, 8) == pytest.approx(1.0)
    # Then 50 seconds of workers: 16.7 s for each.
    assert service_time.done_by(second, 30.0, 4) == pytest.approx(20 / (50 / 3))
    assert service_time.done(30.0, 8) == pytest.approx(30 / (50 / 3))
    assert service_time.done(30.0, 1) == 1.0, "never more than there is"
    assert service_time.done_by(second, 1e6, 4) <= 4


def test_a_result_says_that_the_others_have_only_begun() -> None:
    service_time, shift = ServiceTime(), Shift()
    service_time.joins(shift, 0.0)
    service_time.gets(shift, 0.0)
    service_time.ends(shift, 5.0, held=2)
    assert service_time.done_by(shift, 5.0, 2) == 0.0
    service_time.gets(shift, 7.0)
    assert service_time.done_by(shift, 10.0, 3) == pytest.approx(5 / 10), (
        "since the result, not since the newest document"
    )


def test_workers_that_leave_take_their_work_along_and_leave_their_time() -> None:
    service_time, gone, left, idle = ServiceTime(), Shift(), Shift(), Shift()
    for shift in (gone, left, idle):
        service_time.joins(shift, 0.0)
    for shift in (gone, left):
        service_time.gets(shift, 0.0)
    service_time.ends(left, 10.0, held=1)
    service_time.leaves(gone, 10.0)
    assert service_time.done(10.0, 5) == 0.0
    # 30 seconds of workers until then, 20 since.
    assert service_time.done(20.0, 5) == pytest.approx(10 / 50)
    service_time.leaves(idle, 20.0)
    assert service_time.done(20.0, 5) == pytest.approx(10 / 50)
