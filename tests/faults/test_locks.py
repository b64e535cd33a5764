"""One job for one output: locks of folders, claims in object stores; holders that crash, freeze or sleep."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from patience import patient

from pipeline.errors import JobError
from pipeline.results import lock
from pipeline.results.store import Store


@pytest.mark.parametrize("name", [".lock", "."])
def test_an_output_that_cannot_be_locked_is_one_line(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC if name == ".lock" else errno.ENOLCK, "no locks available")

    monkeypatch.setattr(*((os, "open") if name == ".lock" else (lock.fcntl, "flock")), refuse)
    with pytest.raises(JobError, match="no locks available"):
        Store(str(tmp_path)).lock()


@pytest.fixture(autouse=True)
def one_call_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow's mock file system crashes when one thread reads a file that another writes. Single calls wait for each
    other; what comes between them still races."""
    turn = threading.RLock()

    def waiting(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any) -> Any:
            with turn:
                return method(*args)

        return call

    for name in ("list", "read", "put", "delete"):
        monkeypatch.setattr(Store, name, waiting(getattr(Store, name)))


@pytest.fixture
def fast_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(lock, "LEASE_SECONDS", 1.2)


@pytest.mark.usefixtures("fast_claims")
def test_in_an_object_store_the_second_job_is_refused_and_a_crashed_one_is_followed() -> None:
    place = "mock:///locks/out"
    first, second = Store(place), Store(place)
    first.create()
    first.lock()
    with pytest.raises(JobError, match=f"another job is writing there .process {os.getpid()}"):
        second.lock()
    assert len(first.list(lock.CLAIM)) == 1, "the refused one leaves nothing"
    assert first._lock is not None
    first._lock._stop.set()  # type: ignore[attr-defined]  # it crashes: no more signs of life
    second.lock()
    first._lock._renewed -= 5  # type: ignore[attr-defined]  # so long it was away
    with pytest.raises(JobError, match="this job gave way"):
        first.write("part-000000-x.parquet", b"late")
    second.write("part-000000-y.parquet", b"in time")
    assert second.list("part-") == ["part-000000-y.parquet"]
    second.unlock()
    assert second.list(lock.CLAIM) == []


@pytest.mark.usefixtures("fast_claims")
def test_of_jobs_that_start_at_once_at_most_one_gets_in() -> None:
    place = "mock:///locks/race"
    Store(place).create()
    stores = [Store(place) for _ in range(8)]
    entered: list[Store] = []
    barrier = threading.Barrier(len(stores))

    def enter(store: Store) -> None:
        barrier.wait()
        try:
            store.lock()
        except JobError:
            return
        entered.append(store)

    threads = [threading.Thread(target=enter, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entered) <= 1
    for store in entered:
        store.unlock()
    Store(place).lock()


def test_a_claim_that_cannot_be_renewed_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.4)
    store = Store("mock:///locks/lost")
    store.create()
    store.lock()
    store.delete(store.list(lock.CLAIM)[0])  # another job took it for a crashed one's
    threading.Event().wait(0.3)
    for change in (
        lambda: store.write("part-000000-x.parquet", b"late"),
        lambda: store.delete("compaction.json"),
        lambda: store.rename("a.parquet", "b.parquet"),
    ):
        with pytest.raises(JobError, match="another job took its claim"):
            change()
    store.unlock()


def test_a_renewal_under_way_does_not_outlive_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    store = Store("mock:///locks/slow")
    store.create()
    store.lock()
    real, begun = store.put, threading.Event()

    def slow(name: str, data: bytes) -> None:
        begun.set()
        threading.Event().wait(0.3)
        real(name, data)

    monkeypatch.setattr(store, "put", slow)
    assert begun.wait(patient(10))
    store.unlock()
    threading.Event().wait(0.5)
    assert store.list(lock.CLAIM) == []


@pytest.mark.usefixtures("fast_claims")
def test_a_job_that_was_frozen_for_a_lease_does_not_take_its_claim_back() -> None:
    store = Store("mock:///locks/frozen")
    store.create()
    store.lock()
    claim = store._lock
    assert isinstance(claim, lock.ClaimLock)
    claim._renewed -= 5
    assert claim._thread is not None
    claim._thread.join(10)
    before = claim._renewed
    with pytest.raises(JobError, match="this job gave way: its claim could not be renewed"):
        store.write("part-000000-x.parquet", b"late")
    assert claim._renewed == before
    store.unlock()


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_job_whose_folder_was_removed_writes_into_no_other(tmp_path: Path, made_anew: bool) -> None:
    store, other = Store(str(tmp_path / "out")), Store(str(tmp_path / "out"))
    store.create()
    store.lock()
    store.write("part-000000-x.parquet", b"in time")
    shutil.rmtree(tmp_path / "out")
    other.create()
    if made_anew:
        other.lock()
    with pytest.raises(JobError, match=r"this job gave way: its folder, or \.lock in it, was removed"):
        store.write("part-000001-x.parquet", b"late")
    assert other.list("part-") == []
    store.unlock()
    other.unlock()


def test_a_holder_whose_machine_slept_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    """time.monotonic stands still then; played by a step of the other clock."""
    store = Store("mock:///locks/slept")
    store.create()
    store.lock()
    real = lock._now
    monkeypatch.setattr(lock, "_now", lambda: real() + 3600)
    with pytest.raises(JobError, match=r"its claim could not be renewed for 36\d\d s"):
        store.write("part-000000-x.parquet", b"late")
    store.unlock()
    assert abs(real() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 5
