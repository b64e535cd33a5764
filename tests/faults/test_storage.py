"""Disks and locks: full, damaged, half written, shared; and object stores, which have neither rename nor locks."""

from __future__ import annotations

import errno
import itertools
import json
import os
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import lock, read_results
from pipeline.config import JobConfig
from pipeline.errors import JobError
from pipeline.job import run
from pipeline.records import new_row, result_schema
from pipeline.sink import Sink, compact, done_rows, part_names, recover
from pipeline.store import Store

FAKE = "fake_engine:FakeEngine"


def job(tmp_path: Path, model: Path, **settings: Any) -> Any:
    docs = tmp_path / "docs.jsonl"
    if not docs.exists():
        docs.write_text("".join(json.dumps({"id": f"d{i}", "text": f"text {i}"}) + "\n" for i in range(12)))
    values = {"input": str(docs), "output": str(tmp_path / "out"), "model": str(model), "device": "cpu", "workers": 1}
    return run(JobConfig(**(values | {"max_new_tokens": 8, "flush_documents": 3} | settings)), engine_factory=FAKE)  # type: ignore[arg-type]


def ids(out: Path) -> list[str]:
    return sorted(read_results(out)["document_id"].to_pylist())


def sink_of(store: Store, flush_documents: int = 1) -> Sink:
    store.create()
    return Sink(store, result_schema(), flush_documents=flush_documents, flush_seconds=10)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_full_disk_ends_the_job_in_one_line_and_the_next_run_goes_on(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, itertools.count()

    def full(descriptor: int) -> None:
        # The first calls are the probe's and the manifest's, file and folder each; then one part fits.
        if next(calls) >= 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JobError, match=r"part-000001.*No space left on device.*what is there stays valid"):
        job(tmp_path, model)
    monkeypatch.undo()
    out = tmp_path / "out"
    assert len(ids(out)) == 3
    assert not list(out.glob(".*.tmp"))
    # Meanwhile the disk loses the end of that part, and a crash leaves a temporary file.
    part = next(out.glob("part-*.parquet"))
    part.write_bytes(part.read_bytes()[:-9])
    (out / ".part-000007-x.parquet.abcd.tmp").write_bytes(b"half")
    report = job(tmp_path, model)
    assert report.counts == {"ok": 12}
    assert any("damaged" in message for message in report.messages)
    assert ids(out) == sorted(f"d{i}" for i in range(12))
    assert not list(out.glob(".*.tmp"))
    # A manifest that is half there is refused in words, and overwritten on request; no row is touched.
    (out / "manifest.json").write_text('{"format": 2, "finge')
    with pytest.raises(JobError, match=r"manifest\.json is damaged .*--force writes a new one"):
        job(tmp_path, model)
    assert job(tmp_path, model, force=True).done_now == 0
    assert ids(out) == sorted(f"d{i}" for i in range(12))


@pytest.mark.parametrize("remote", [False, True])
def test_a_part_that_is_there_though_its_write_failed_is_written_over(
    tmp_path: Path, remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder could not be synced after the rename; the answer of an object store got lost."""
    store = Store("mock:///late/out" if remote else str(tmp_path))
    sink = sink_of(store, flush_documents=100)
    sink.add(new_row("a", "x", "ok"))
    real = Store._put

    def put(store: Store, name: str, data: Any) -> None:
        real(store, name, data)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_put", put)
        with pytest.raises(JobError, match="Input/output error"):
            sink.flush()
    sink.add(new_row("b", "x", "ok"))
    sink.flush()
    sink.add(new_row("c", "x", "ok"))
    sink.flush()
    found = [pq.read_table(store.open(name))["document_id"].to_pylist() for name in part_names(store)]
    assert found == [["a", "b"], ["c"]]


def test_a_flipped_bit_in_a_part_is_found(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    sink = sink_of(store)
    sink.add(new_row("a", "x", "ok", output="some words of an answer " * 20))
    name = part_names(store)[0]
    data = bytearray((tmp_path / name).read_bytes())
    at = data.index(b"\x28\xb5\x2f\xfd") + 12  # inside the first zstd frame
    data[at] ^= 1
    (tmp_path / name).write_bytes(data)
    assert "damaged" in recover(store)[0]
    assert part_names(store) == []


def test_a_merged_part_that_is_damaged_does_not_cost_what_it_replaces(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    sink = sink_of(store)
    for name in "abc":
        sink.add(new_row(name, "x", "ok"))
    parts = part_names(store)
    (tmp_path / "part-000000-merged.parquet").write_bytes(b"PAR1 cut off")
    (tmp_path / "compaction.json").write_text(json.dumps({"merged": "part-000000-merged.parquet", "replaced": parts}))
    assert "damaged" in recover(store)[0]
    assert ids(tmp_path) == ["a", "b", "c"]


def test_a_reader_is_not_disturbed_by_a_merge(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    sink = sink_of(store)
    for i in range(60):
        sink.add(new_row(f"d{i:02}", "x", "ok"))
    problems: list[object] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                found = ids(tmp_path)
            except JobError as error:  # the parts went away three times in a row
                problems.append(error)
            else:
                if found != [f"d{i:02}" for i in range(60)]:
                    problems.append(found)

    reader = threading.Thread(target=read)
    reader.start()
    compact(store)
    stop.set()
    reader.join()
    assert not problems
    assert len(part_names(store)) == 1


@pytest.mark.parametrize("name", [".lock", "."])
def test_an_output_that_cannot_be_locked_is_one_line(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC if name == ".lock" else errno.ENOLCK, "no locks available")

    monkeypatch.setattr(*((os, "open") if name == ".lock" else (lock.fcntl, "flock")), refuse)
    with pytest.raises(JobError, match="no locks available"):
        Store(str(tmp_path)).lock()


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
    assert begun.wait(10)
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


def test_doubled_rows_are_found_before_anything_is_done(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    sink = sink_of(store)
    sink.add(new_row("a", "x", "ok"))
    (tmp_path / "part-000009-copy.parquet").write_bytes((tmp_path / part_names(store)[0]).read_bytes())
    with pytest.raises(JobError, match="more than one row"):
        done_rows(store)
