"""The driver itself is killed or asked to stop: what was finished is there, the next run does the rest."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest
from patience import patient
from shell import ray_names

from jobs.cli import run_main
from tools.faults import processes
from tools.faults.runs import AHEAD, LIVE, kills, prepare

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ray_names():
        monkeypatch.delenv(name)


def test_a_driver_killed_at_a_random_moment_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """In the first seconds; one that is killed at work is in test_questions_killed."""
    outcome = kills(
        tmp_path / "run", documents=400, workers=1, seed=3, worker_every=float("inf"), driver_every=0.0,
        first_kill=(2.0, 8.0), max_driver_kills=1, max_seconds=240.0,
    )  # fmt: skip
    assert outcome.driver_kills == 1
    assert outcome.refused == []
    assert outcome.count is not None
    assert outcome.count.exact
    assert outcome.count.statuses == {"ok": 400}
    assert outcome.count.again <= outcome.recomputed_bound
    assert outcome.left_over == [], "a killed driver leaves no worker behind"


def test_sigterm_writes_what_is_finished_within_three_seconds(tmp_path: Path) -> None:
    # Nothing would be written by number or by time, so what is there was written because of the signal.
    place = prepare(tmp_path / "run", 3000, 1, flush_documents=100_000, flush_seconds=100_000, max_new_tokens=32)
    with processes.driver(place.arguments, place.log, place.engine_log) as driver:
        until = time.monotonic() + patient(120)
        while not place.engine_log.exists() or place.engine_log.read_bytes().count(b"\n") < 60:
            assert driver.poll() is None, place.log.read_text()
            assert time.monotonic() < until, place.log.read_text()
            time.sleep(0.05)
        assert not list(place.output.glob("part-*.parquet"))
        begun = place.engine_log.read_bytes().count(b"\n")
        processes.kill(driver.pid, signal.SIGTERM)
        time.sleep(3.0)  # what `ray job stop` gives
        below = processes.descendants(driver.pid)
        processes.kill(driver.pid)
        driver.wait()
    processes.left_over(below, 15.0)
    count = place.count()
    assert count.doubled == 0
    assert sum(count.statuses.values()) >= begun - LIVE - AHEAD, "all but what was still in the engine"


def test_a_driver_does_not_outlive_the_tool_that_started_it(tmp_path: Path) -> None:
    place = prepare(tmp_path / "run", 20, 1)
    with (
        pytest.raises(KeyboardInterrupt),
        processes.driver(place.arguments, place.log, place.engine_log) as driver,
    ):
        raise KeyboardInterrupt
    assert driver.poll() is not None


@pytest.mark.parametrize(("ended", "code"), [(signal.SIGTERM, 130), (0, 0), (3, 3)])
def test_a_job_that_is_stopped_while_ray_starts_ends_as_any_that_is_stopped(ended: int, code: int) -> None:
    with pytest.raises(SystemExit) as told:
        run_main(lambda arguments: sys.exit(ended), [])
    assert told.value.code == code
