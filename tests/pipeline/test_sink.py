"""Part files: whole or not there, and one row a document after any interruption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from result_rows import make_row

from pipeline.errors import JobError
from pipeline.job.plan import check_columns
from pipeline.results import parts
from pipeline.results import sink as sinks
from pipeline.results.columns import utc_now
from pipeline.results.parts import compact, done_rows, part_names, read_results, recover
from pipeline.results.rows import COLUMNS, SUMMARY, Row, result_schema, to_table
from pipeline.results.sink import Sink
from pipeline.results.store import Store


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def row(name: str, **values: Any) -> Row:
    return make_row(name, "somewhere", values.pop("status", "ok"), **values)


def make(folder: Path, flush_documents: int = 2, **options: Any) -> tuple[Store, Sink]:
    store = Store(str(folder))
    store.create()
    return store, Sink(store, result_schema(), flush_documents=flush_documents, flush_seconds=10, **options)


def ids(folder: Path) -> list[str]:
    return sorted(read_results(folder)["document_id"].to_pylist())


def test_rows_are_written_by_number_and_by_time(tmp_path: Path) -> None:
    clock = Clock()
    store, sink = make(tmp_path, clock=clock)
    sink.add(row("a"))
    assert part_names(store) == []
    clock.now = 9.9
    sink.tick()
    assert part_names(store) == []
    clock.now = 10.0
    sink.tick()
    assert len(part_names(store)) == 1
    sink.add(row("b"))
    sink.add(row("c"))
    assert len(part_names(store)) == 2
    assert ids(tmp_path) == ["a", "b", "c"]
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_schema_is_the_documented_one(tmp_path: Path) -> None:
    _, sink = make(tmp_path, 1)
    sink.add(row("a", started_at=utc_now(), prompt_tokens=5))
    schema = read_results(tmp_path).schema
    assert schema.names == [column.name for column in COLUMNS]
    assert [schema.field(c.name).type for c in COLUMNS] == [c.type for c in COLUMNS]
    assert schema.field("prompt_tokens").metadata[b"meaning"].startswith(b"tokens of the prompt")
    assert str(schema.field("started_at").type) == "timestamp[us, tz=UTC]"


def test_kept_values_are_written_as_they_are(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    sink = Sink(store, result_schema([pa.field("year", pa.int64())]), flush_documents=3, flush_seconds=10)
    sink.add(row("a", kept={"year": pa.array([1])}))
    sink.add(row("b"))
    sink.add(row("c", output="lone \ud800 surrogate", kept={"year": pa.array([3])}))
    table = {item["document_id"]: item for item in read_results(tmp_path).to_pylist()}
    assert [table[name]["year"] for name in "abc"] == [1, None, 3]
    assert table["c"]["output"] == "lone \\ud800 surrogate"


def test_a_row_that_does_not_fit_costs_no_neighbour(tmp_path: Path) -> None:
    _, sink = make(tmp_path, 2)
    sink.add(row("a", output="fine"))
    sink.add(row("b", attempts=2, prompt_tokens="many"))
    table = {item["document_id"]: item for item in read_results(tmp_path).to_pylist()}
    assert [(table[name]["status"], table[name]["attempts"]) for name in "ab"] == [("ok", 0), ("error", 2)]
    assert "does not fit the result schema" in table["b"]["error"]


def test_kept_columns_must_not_hide_result_columns() -> None:
    with pytest.raises(JobError, match="--keep-columns status"):
        result_schema([pa.field("status", pa.string())])


def test_numbers_go_on_after_a_restart(tmp_path: Path) -> None:
    _, sink = make(tmp_path, 1)
    sink.add(row("a"))
    store, sink = make(tmp_path, 1)
    sink.add(row("b"))
    assert [name.split("-")[1] for name in part_names(store)] == ["000000", "000001"]


def test_what_interruptions_leave_is_cleared(tmp_path: Path) -> None:
    store, sink = make(tmp_path, 1)
    sink.add(row("a"))
    sink.add(row("b"))
    (tmp_path / ".part-000009-x.parquet.abcd.tmp").write_bytes(b"half")
    victim = tmp_path / part_names(store)[1]
    victim.write_bytes(victim.read_bytes()[:-20])
    messages = recover(store)
    assert len(messages) == 1
    assert "is damaged" in messages[0]
    assert ids(tmp_path) == ["a"]
    assert victim.with_name(victim.name + ".damaged").exists()
    assert not list(tmp_path.glob(".*.tmp"))


def test_doubled_rows_are_refused(tmp_path: Path) -> None:
    store, sink = make(tmp_path, 1)
    sink.add(row("a"))
    (tmp_path / "part-copy.parquet").write_bytes((tmp_path / part_names(store)[0]).read_bytes())
    with pytest.raises(JobError, match=r"1 documents have more than one row, e\.g\. 'a'"):
        done_rows(store)


def test_new_rows_take_the_places_of_old_ones(tmp_path: Path) -> None:
    store, sink = make(tmp_path, 2)
    for name, status in [("a", "ok"), ("b", "error"), ("c", "error"), ("d", "timeout"), ("e", "ok")]:
        sink.add(row(name, status=status))
    sink.flush()
    before = part_names(store)
    sink = make(tmp_path, 3, replaces=[(name, SUMMARY) for name in ("b", "c", "d", "never written")])[1]
    assert sink.rows_to_replace == 3
    for name in "bxc":
        sink.add(row(name, output="anew"))
    assert sink.rows_to_replace == 1
    found = {item["document_id"]: item for item in read_results(tmp_path).to_pylist()}
    assert {name: found[name]["output"] for name in found} == {
        "a": None, "b": "anew", "c": "anew", "d": None, "e": None, "x": "anew",
    }  # fmt: skip
    assert found["d"]["status"] == "timeout", "it stays until its document is done again"
    assert part_names(store)[:3] == before
    assert len(part_names(store)) == 4, "only the document that had no row is in a new part"


def test_a_slow_replacement_is_followed_by_a_rest(tmp_path: Path) -> None:
    clock = Clock()
    store, sink = make(tmp_path, 1)
    for name in "abc":
        sink.add(row(name))

    def slow(name: str, data: Any) -> None:
        clock.now += 2.0
        write(name, data)

    write, store.write = store.write, slow  # type: ignore[method-assign]
    sink = Sink(
        store,
        result_schema(),
        flush_documents=1,
        flush_seconds=1,
        replaces=[("a", SUMMARY), ("b", SUMMARY)],
        clock=clock,
    )
    sink.add(row("a", output="anew"))
    assert sink.rows_written == 1
    sink.add(row("b", output="anew"))
    clock.now = 2.0 + sinks.REST * 2.0 - 0.1
    sink.tick()
    assert sink.rows_written == 1
    clock.now += 0.1
    sink.tick()
    assert sink.rows_written == 2


def test_kept_columns_of_other_types_go_into_one(tmp_path: Path) -> None:
    store, _ = make(tmp_path)
    for number, year in enumerate((pa.array([0]), pa.array([1.5]))):
        schema = result_schema([pa.field("year", year.type)])
        check_columns(store, schema)
        Sink(store, schema, flush_documents=1, flush_seconds=1).add(row(str(number), kept={"year": year}))
    assert read_results(tmp_path)["year"].to_pylist() == [0.0, 1.5]
    schema = result_schema([pa.field("year", pa.string())])
    check_columns(store, schema)
    Sink(store, schema, flush_documents=1, flush_seconds=1).add(row("2", kept={"year": pa.array(["MM"])}))
    assert read_results(tmp_path)["year"].to_pylist() == ["0", "1.5", "MM"]
    assert compact(store) == 1
    assert read_results(tmp_path)["year"].to_pylist() == ["0", "1.5", "MM"]


def test_parts_whose_columns_are_another_programs_are_refused(tmp_path: Path) -> None:
    table = pa.table({name: ["x"] for name in ("document_id", "source", "status", "error", "attempts", "output")})
    pq.write_table(table, tmp_path / "part-000000-00000000.parquet")
    with pytest.raises(JobError, match="Field attempts has incompatible types: string vs int32; choose another output"):
        check_columns(Store(str(tmp_path)), result_schema())


class PowerCutError(Exception):
    """The machine goes off."""


@pytest.mark.parametrize("survive", range(8))
def test_compaction_neither_loses_nor_doubles_at_any_interruption(
    tmp_path: Path, survive: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, sink = make(tmp_path, 1)
    names = [f"d{i}" for i in range(5)]
    for name in names:
        sink.add(row(name))
    steps = 0

    def guarded(method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal steps
            if steps == survive:
                raise PowerCutError
            steps += 1
            return method(*arguments)

        return call

    monkeypatch.setattr(store, "write", guarded(store.write))
    monkeypatch.setattr(store, "delete", guarded(store.delete))
    with pytest.raises(PowerCutError):
        compact(store)
    assert ids(tmp_path) == names, "a reader sees every row once even before recovery"
    again = Store(str(tmp_path))
    recover(again)
    assert sorted(done_rows(again)["document_id"].to_pylist()) == names
    assert sorted(pq.read_table(tmp_path)["document_id"].to_pylist()) == names, "so do tools that know nothing of us"
    compact(again)
    assert len(part_names(again)) == 1
    assert ids(tmp_path) == names


def test_compaction_bounds_the_size_of_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, sink = make(tmp_path, 1)
    for i in range(7):
        sink.add(row(str(i)))
    monkeypatch.setattr(parts, "COMPACT_ROWS", 3)
    assert compact(store) == 3
    assert len(ids(tmp_path)) == 7


def test_the_lock_keeps_others_out_and_survives_a_crash(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.create()
    code = (
        "import sys; from pipeline.results.store import Store; s = Store(sys.argv[1]); "
        "s.lock(); print('in', flush=True);sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(JobError, match=f"another job is writing there .process {other.pid}"):
            store.lock()
        other.kill()
        other.wait()
    with store.locked():
        pass


def test_write_errors_are_job_errors_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, sink = make(tmp_path, 1)
    sink.add(row("a"))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JobError, match="No space left on device"):
        sink.add(row("b"))
    monkeypatch.undo()
    assert ids(tmp_path) == ["a"]
    assert sorted(p.name for p in tmp_path.iterdir()) == part_names(store)


def test_an_output_that_cannot_be_made_is_a_job_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(JobError, match="cannot be written"):
        Store(str(tmp_path / "file" / "out")).create()


def test_results_of_several_folders(tmp_path: Path) -> None:
    for name in "ab":
        _, sink = make(tmp_path / name, 1)
        sink.add(row(name))
    assert sorted(read_results([tmp_path / "a", tmp_path / "b"])["document_id"].to_pylist()) == ["a", "b"]
    assert read_results(tmp_path / "a", columns=["status"]).column_names == ["status"]
    with pytest.raises(JobError, match="holds no results"):
        read_results(tmp_path / "c")


def test_a_half_written_journal_is_ignored(tmp_path: Path) -> None:
    store, sink = make(tmp_path, 1)
    sink.add(row("a"))
    (tmp_path / "compaction.json").write_text(json.dumps({"merged": "x"})[:-3])
    assert ids(tmp_path) == ["a"]
    assert recover(store) == []
    assert not (tmp_path / "compaction.json").exists()


def test_what_arrow_reads_is_not_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads may outlive Python, and abort the process if they then let go of an object of Python's."""
    data = parts.encode(to_table([row("a")], result_schema()))
    held = sys.getrefcount(data)
    seen: list[int] = []

    class Watched(pq.ParquetFile):  # type: ignore[misc]
        def read(self, *arguments: Any, **settings: Any) -> pa.Table:
            seen.append(sys.getrefcount(data))
            return super().read(*arguments, **settings)

    monkeypatch.setattr(pq, "ParquetFile", Watched)
    assert parts.decode(data)["document_id"].to_pylist() == ["a"]
    assert seen[0] <= held + 1, "decode's own argument, and no buffer of Arrow's"


def test_rows_of_a_version_that_asked_one_question_are_of_the_summary(tmp_path: Path) -> None:
    store, sink = make(tmp_path)
    old = to_table([row("a", output="words")], result_schema()).drop(["question_id"])
    store.write("part-000000-00000000.parquet", parts.encode(old))
    sink.add(row("b"), row("c"))
    for _ in range(2):
        assert read_results(tmp_path)["question_id"].to_pylist() == [SUMMARY] * 3
        assert read_results(tmp_path, ["document_id"]).column_names == ["document_id"]
        assert read_results(tmp_path, wide=True)[SUMMARY].to_pylist()[0] == "words"
        assert sinks.keys(done_rows(store)) == [(name, SUMMARY) for name in "abc"]
        compact(store)
