"""Disks: full, damaged, half written; and merges beside readers. Locks are in test_locks."""

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
from result_rows import make_row

from pipeline import read_results
from pipeline.errors import JobError
from pipeline.job.job import run
from pipeline.results.parts import compact, done_rows, part_names, recover
from pipeline.results.rows import result_schema
from pipeline.results.sink import Sink
from pipeline.results.store import Store
from pipeline.settings.config import JobConfig

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


@pytest.mark.usefixtures("ray_here")
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
    sink.add(make_row("a", "x", "ok"))
    real = Store._put

    def put(store: Store, name: str, data: Any) -> None:
        real(store, name, data)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_put", put)
        with pytest.raises(JobError, match="Input/output error"):
            sink.flush()
    sink.add(make_row("b", "x", "ok"))
    sink.flush()
    sink.add(make_row("c", "x", "ok"))
    sink.flush()
    found = [pq.read_table(store.open(name))["document_id"].to_pylist() for name in part_names(store)]
    assert found == [["a", "b"], ["c"]]


def test_a_flipped_bit_in_a_part_is_found(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    sink = sink_of(store)
    sink.add(make_row("a", "x", "ok", output="some words of an answer " * 20))
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
        sink.add(make_row(name, "x", "ok"))
    parts = part_names(store)
    (tmp_path / "part-000000-merged.parquet").write_bytes(b"PAR1 cut off")
    (tmp_path / "compaction.json").write_text(json.dumps({"merged": "part-000000-merged.parquet", "replaced": parts}))
    assert "damaged" in recover(store)[0]
    assert ids(tmp_path) == ["a", "b", "c"]


def test_a_reader_is_not_disturbed_by_a_merge(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    sink = sink_of(store)
    for i in range(60):
        sink.add(make_row(f"d{i:02}", "x", "ok"))
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


def test_temporary_files_of_others_stay(tmp_path: Path) -> None:
    for name in ("mine.tmp", ".manifest.json.0a1b2c3d.tmp", "probe-0a1b2c3d.tmp"):
        (tmp_path / name).write_text("x")
    recover(Store(str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.tmp"]


def test_doubled_rows_are_found_before_anything_is_done(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    sink = sink_of(store)
    sink.add(make_row("a", "x", "ok"))
    (tmp_path / "part-000009-copy.parquet").write_bytes((tmp_path / part_names(store)[0]).read_bytes())
    with pytest.raises(JobError, match="more than one row"):
        done_rows(store)
