"""Shards as the world writes them: read, promoted, or told per row; one file never costs the others their outputs."""

from __future__ import annotations

import json
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from result_rows import kept_columns, make_row

from pipeline.errors import DocumentError, JobError
from pipeline.job import manifest
from pipeline.job.plan import make_plan, survey_input
from pipeline.results.kept_columns import Kept
from pipeline.results.parts import read_results
from pipeline.results.rows import result_schema
from pipeline.results.sink import Sink
from pipeline.results.store import Store
from pipeline.settings.config import JobConfig
from pipeline.source import Catalogue, DocumentReader, find_files, input_hash, list_documents


def listed(folder: Path, **options: Any) -> Catalogue:
    return list_documents(find_files((str(folder),))[0], **options)


def told(catalogue: Catalogue) -> dict[str, str]:
    """By id, the text or what is wrong with it."""
    reader, found = DocumentReader("text", catalogue.kept), {}
    for position in range(len(catalogue)):
        document = catalogue.document(position)
        try:
            found[document.document_id] = document.error or reader.read(document)[0]
        except DocumentError as error:
            found[document.document_id] = str(error)
    return found


def kept(catalogue: Catalogue) -> dict[str, Kept]:
    reader = DocumentReader("text", catalogue.kept)
    return {document.document_id: reader.read(document)[1] for document in catalogue.documents()}


def parquet(path: Path, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def jsonl(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def strings(*values: str | None, kind: pa.DataType | None = None) -> pa.Array:
    return pa.array(values, pa.string()).cast(kind or pa.string())


def test_a_shard_that_is_empty_or_has_no_such_column_costs_nothing_or_itself(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", id=["a"], text=["fine"], year=[1])
    pq.write_table(pa.table({"whatever": pa.array([], pa.null())}), tmp_path / "empty.parquet")
    pq.write_table(pa.table({}), tmp_path / "nothing.parquet")
    parquet(tmp_path / "nulls.parquet", id=["n"], text=pa.nulls(1), year=pa.nulls(1))
    parquet(tmp_path / "other.parquet", id=["o"], body=["x"])
    parquet(tmp_path / "number.parquet", id=["o"], text=[5])
    pq.write_table(
        pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"]), tmp_path / "two.parquet"
    )
    jsonl(tmp_path / "keys.jsonl", {"id": "j", "text": "also fine"})
    jsonl(tmp_path / "body.jsonl", {"id": "k", "body": "x"})
    found = told(listed(tmp_path, keep_columns=("year",)))
    assert {name: text for name, text in found.items() if text.endswith("fine")} == {"a": "fine", "j": "also fine"}
    assert found["n"] == "its text is null"
    assert found["k"] == "it has no 'text'; found: id, body"
    assert found["other.parquet"] == "it has no column 'text'; found: id, body; its 1 rows are not read"
    assert found["number.parquet"].startswith("its column 'text' is int64, expected text")
    assert found["two.parquet"].startswith("it has 2 columns of the name 'text'; rename them")
    assert len(found) == 7


def test_a_column_that_no_shard_has_ends_the_job(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", id=["a"], text=["fine"])
    jsonl(tmp_path / "b.jsonl", {"id": "b", "text": "fine"})
    for options in ({"text_column": "body"}, {"id_column": "body"}, {"keep_columns": ("body",)}):
        with pytest.raises(JobError, match="body: no file or line of the input has it; found: id, text"):
            listed(tmp_path, **options)
    (tmp_path / "b.jsonl").write_text('{"id": "b", "text": "fine", "body": 1}\n')
    found = told(listed(tmp_path, id_column="body"))
    assert found == {"1": "fine", "a.parquet": "it has no column 'body'; found: id, text; its 1 rows are not read"}


@pytest.mark.parametrize("folder", ["_temporary/0/_temporary", "_delta_log", "_spark_metadata", "sub/_temporary"])
def test_what_writers_keep_beside_their_tables_is_no_input(tmp_path: Path, folder: str) -> None:
    parquet(tmp_path / "a.parquet", id=["a"], text=["fine"])
    parquet(tmp_path / folder / "b.parquet", id=["a"], text=["half written"])
    assert told(listed(tmp_path)) == {"a": "fine"}


TEXTS = [
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(4),
    pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.large_string()),
]  # fmt: skip


def test_texts_and_ids_of_every_type_side_by_side(tmp_path: Path) -> None:
    for number, kind in enumerate(TEXTS):
        texts, ids = (pa.array([f"{what}{number:03}"]) for what in "ti")
        if pa.types.is_dictionary(kind):
            texts, ids = (values.cast(kind.value_type).dictionary_encode().cast(kind) for values in (texts, ids))
        elif pa.types.is_fixed_size_binary(kind):
            texts, ids = (pa.array([values[0].as_py().encode()], kind) for values in (texts, ids))
        else:
            texts, ids = texts.cast(kind), ids.cast(kind)
        parquet(tmp_path / f"{number}.parquet", id=ids, text=texts)
    storage = pa.array(['{"a": 1}'])
    json_text = pa.ExtensionArray.from_storage(pa.json_(), storage)
    uuid = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"\xff" * 16], pa.binary(16)))
    parquet(tmp_path / "extension.parquet", id=uuid, text=json_text)
    expected = {f"i{number:03}": f"t{number:03}" for number in range(len(TEXTS))}
    assert told(listed(tmp_path)) == expected | {"ffffffff-ffff-ffff-ffff-ffffffffffff": '{"a": 1}'}


IDS = {
    "number": (pa.array([2**64 - 1], pa.uint64()), str(2**64 - 1)),
    "decimal": (pa.array([Decimal("5")], pa.decimal128(20, 0)), "5"),
    "bytes": (pa.array([b"\xff\x00" * 8], pa.binary(16)), "ff00" * 8),
    "date": (pa.array([2**31 - 1], pa.int32()).cast(pa.date32()), "<value out of range: 2147483647>"),
    "time": (pa.array([1], pa.timestamp("us")), "1970-01-01 00:00:00.000001"),
    "nanoseconds": (pa.array([1], pa.time64("ns")), "00:00:00.000000001"),
}


@pytest.mark.parametrize("name", IDS)
def test_ids_of_types_that_are_no_text(tmp_path: Path, name: str) -> None:
    ids, expected = IDS[name]
    parquet(tmp_path / "a.parquet", id=ids, text=["fine"])
    assert told(listed(tmp_path)) == {expected: "fine"}


@pytest.mark.parametrize("ids", [pa.array([["a"]]), pa.nulls(1), pa.array([""]), pa.array(["x" * 70_000])])
def test_ids_that_are_none_cost_their_row(tmp_path: Path, ids: pa.Array) -> None:
    parquet(tmp_path / "a.parquet", id=ids, text=["x"])
    parquet(tmp_path / "b.parquet", id=["b"], text=["fine"])
    found = told(listed(tmp_path))
    assert found["b"] == "fine"
    assert "row 0: its id (id) is " in found["a.parquet:0"]


NUMBERS = {
    "int and float": (pa.array([1]), pa.array([0.5]), [1.0, 0.5]),
    "int and null": (pa.array([1]), pa.nulls(1), [1, None]),
    "small and large": (pa.array([1], pa.int8()), pa.array([2**40]), [1, 2**40]),
    "signed and not": (pa.array([-1]), pa.array([2**64 - 1], pa.uint64()), [Decimal(-1), Decimal(2**64 - 1)]),
    "string and large": (strings("a"), strings("b", kind=pa.large_string()), ["a", "b"]),
    "string and view": (strings("a"), strings("b", kind=pa.string_view()), ["a", "b"]),
    "string and dictionary": (strings("a"), strings("b").dictionary_encode(), ["a", "b"]),
    "number and text": (pa.array([1]), strings("b"), ["1", "b"]),
    "whole and decimal": (pa.array([2**63 - 1]), pa.array([Decimal("0.10")]), [Decimal(2**63 - 1), Decimal("0.10")]),
    "bytes and text": (pa.array([b"\xff"]), strings("b"), [b"\xff", b"b"]),
    "list and text": (pa.array([[1, 2]]), strings("b"), ["[1, 2]", "b"]),
    "exact and inexact": (pa.array([Decimal("0.10")]), pa.array([0.5]), ["0.10", "0.5"]),
    "struct of more": (pa.array([{"a": 1}]), pa.array([{"a": 2, "b": 3}]), [{"a": 1, "b": None}, {"a": 2, "b": 3}]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_kept_columns_of_other_types_here_and_there(tmp_path: Path, name: str) -> None:
    one, other, expected = NUMBERS[name]
    parquet(tmp_path / "a.parquet", id=["a"], text=["x"], v=one)
    parquet(tmp_path / "b.parquet", id=["b"], text=["x"], v=other)
    parquet(tmp_path / "c.parquet", id=["c"], text=["x"])
    jsonl(tmp_path / "d.jsonl", {"id": "d", "text": "x"})
    (tmp_path / "e.txt").write_text("x")
    found = kept(listed(tmp_path, keep_columns=("v",)))
    values = [found[name].columns["v"][0].as_py() for name in ("a", "b", "c", "d", "e.txt")]
    assert values == [*expected, None, None, None]
    assert not any(item.problem for item in found.values())


def test_the_order_of_files_does_not_matter_to_what_is_kept(tmp_path: Path) -> None:
    for number, values in enumerate((pa.array([1]), strings("b"), pa.array([b"\xff"], pa.large_binary()))):
        parquet(tmp_path / f"{number}.parquet", id=[str(number)], text=["x"], v=values)
    found = kept(listed(tmp_path, keep_columns=("v",)))
    assert [found[name].columns["v"][0].as_py() for name in "012"] == [b"1", b"b", b"\xff"]


def test_json_values_beside_those_of_parquet(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", id=["a"], text=["x"], v=[1])
    jsonl(tmp_path / "b.jsonl", {"id": "b", "text": "x", "v": 2.5}, {"id": "c", "text": "x", "v": None})
    jsonl(tmp_path / "d.jsonl", {"id": "d", "text": "x", "v": 2**53 + 1}, {"id": "e", "text": "x", "v": 10**30})
    found = kept(listed(tmp_path, keep_columns=("v",)))
    assert [found[name].columns["v"][0].as_py() for name in "abcde"] == [1.0, 2.5, None, None, None]
    assert "v: Integer value 9007199254740993 not in range" in found["d"].problem
    assert "v: " in found["e"].problem


INFINITE = pa.array([2**31 - 1], pa.int32()).cast(pa.date32())
ODD = {
    "uint64": pa.array([2**64 - 1], pa.uint64()),
    "infinite date": INFINITE,
    "infinite time": pa.array([2**63 - 1], pa.timestamp("us")),
    "nanoseconds": pa.array([2**60 + 1], pa.timestamp("ns")),
    "nanoseconds of a day": pa.array([1], pa.time64("ns")),
    "duration": pa.array([2**62], pa.duration("ns")),
    "doubled fields": pa.StructArray.from_arrays([pa.array([1]), pa.array(["x"])], names=["a", "a"]),
    "doubled fields in a list": pa.ListArray.from_arrays(
        pa.array([0, 1], pa.int32()), pa.StructArray.from_arrays([pa.array([1]), pa.array(["x"])], names=["a", "a"])
    ),
    "NaN": pa.array([float("nan")]),
    "map": pa.array([[("k", 1), ("k", 2)]], pa.map_(pa.string(), pa.int64())),
    "half": pa.array([1.5], pa.float16()),
    "fixed list": pa.array([[1, 2]], pa.list_(pa.int8(), 2)),
    "dictionary in a list": pa.array([["x"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"\xff" * 16], pa.binary(16))),
    "views": pa.array(["x" * 20]).cast(pa.string_view()),
    "not UTF-8": pa.array([b"\xff"]).view(pa.string()),
}


@pytest.mark.parametrize("name", ODD)
def test_the_output_stays_whatever_a_kept_value_is_and_is_paid_once(tmp_path: Path, model: Path, name: str) -> None:
    path = tmp_path / "docs" / "a.parquet"
    parquet(path, id=["a"], text=["fine"], v=ODD[name])
    config = JobConfig(input=(str(path.parent),), output=str(tmp_path / "out"), model=str(model), keep_columns=("v",))
    store = Store(config.output)
    store.create()
    survey = survey_input(config)
    document = survey.catalogue.document(0)
    text, kept_values = DocumentReader("text", survey.catalogue.kept).read(document)
    about: Any = {"input_stamp": document.stamp, "input_hash": input_hash(text, kept_values)}
    Sink(store, result_schema(survey.catalogue.kept), flush_documents=1, flush_seconds=1).add(
        make_row("a", document.source, "ok", output="out", attempts=1, **about, **kept_columns(kept_values))
    )
    manifest.save(store, config, survey.prints)
    (row,) = read_results(config.output, ["status", "output", "kept_error"]).to_pylist()
    assert row["output"] == "out"
    assert (row["kept_error"] is None) == (name != "not UTF-8"), row
    os.utime(path, (1, 1))  # touched: what the hash says counts
    assert make_plan(survey_input(config), store).already == 1
    # Another shard, with which the column has another type: what is there is not done again.
    parquet(path.with_name("b.parquet"), id=["b"], text=["fine"], v=["text"])
    os.utime(path, (2, 2))
    plan = make_plan(survey_input(config), store)
    assert plan.pending.ids.to_pylist() == ["b"]
