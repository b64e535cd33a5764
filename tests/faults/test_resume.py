"""Resume by content: what changed is done again, what was only touched is not, and nobody ever sees two rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline import manifest
from pipeline.config import JobConfig
from pipeline.errors import JobError
from pipeline.plan import Plan, make_plan, survey_input
from pipeline.records import new_row, result_schema, utc_now
from pipeline.sink import Sink, drop_rows, read_results
from pipeline.source import DocumentReader, input_hash
from pipeline.store import Store

TEXTS = {f"d{i}": f"text number {i}" for i in range(6)}


def write(folder: Path, kind: str, texts: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    rows = [{"id": name, "text": text} for name, text in texts.items()]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "docs.parquet", row_group_size=2)
    elif kind == "jsonl":
        (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        for name, text in texts.items():
            path = folder / f"{name}.txt"
            if not path.exists() or path.read_text() != text:
                path.write_text(text)


def config(tmp_path: Path, model: Path, **settings: Any) -> JobConfig:
    return JobConfig(
        **({"input": str(tmp_path / "docs"), "output": str(tmp_path / "out"), "model": str(model)} | settings)
    )


def finish(settings: JobConfig) -> Plan:
    """What a job does, with the document's own text as its output: plan, drop what is outdated, do what is pending."""
    survey, store = survey_input(settings), Store(settings.output)
    store.create()
    plan = make_plan(survey, store)
    ids = pa.array(plan.outdated, pa.string())
    drop_rows(store, lambda table: pc.invert(pc.is_in(table["document_id"], value_set=ids)))
    manifest.save(store, settings, survey.prints)
    sink = Sink(store, result_schema(survey.catalogue.kept), flush_documents=4, flush_seconds=9)
    reader = DocumentReader("text", survey.catalogue.kept)
    for document in plan.pending.documents():
        text, kept = reader.read(document)
        about = {"input_stamp": document.stamp, "input_hash": input_hash(text, kept), "finished_at": utc_now()}
        sink.add(new_row(document.document_id, document.source, "ok", output=text, **about) | kept)
    sink.flush()
    return plan


def outputs(settings: JobConfig) -> dict[str, str]:
    found = read_results(settings.output).to_pylist()
    assert len({row["document_id"] for row in found}) == len(found), "one row a document"
    return {row["document_id"].removesuffix(".txt"): row["output"] for row in found}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "text"])
def test_a_changed_document_is_done_again_and_no_other(tmp_path: Path, model: Path, kind: str) -> None:
    settings = config(tmp_path, model)
    write(tmp_path / "docs", kind, TEXTS)
    assert len(finish(settings).pending) == 6
    assert len(finish(settings).pending) == 0
    changed = TEXTS | {"d3": "quite another text"}
    write(tmp_path / "docs", kind, changed)
    plan = finish(settings)
    assert [name.removesuffix(".txt") for name in plan.outdated] == ["d3"]
    assert "1 documents have changed since" in plan.messages[0]
    assert plan.already == 5
    assert outputs(settings) == changed
    write(tmp_path / "docs", kind, changed | {"new": "one more"})
    plan = finish(settings)
    assert [document.document_id.removesuffix(".txt") for document in plan.pending.documents()] == ["new"]
    assert outputs(settings) == changed | {"new": "one more"}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "text"])
def test_a_file_that_was_only_touched_or_copied_is_not(tmp_path: Path, model: Path, kind: str) -> None:
    settings = config(tmp_path, model)
    write(tmp_path / "docs", kind, TEXTS)
    finish(settings)
    for path in (tmp_path / "docs").iterdir():
        os.utime(path, (1, 1))
    plan = finish(settings)
    assert (len(plan.pending), plan.outdated) == (0, ())


def test_rows_that_moved_inside_a_file_are_known_by_their_text(tmp_path: Path, model: Path) -> None:
    settings = config(tmp_path, model)
    write(tmp_path / "docs", "jsonl", TEXTS)
    finish(settings)
    write(tmp_path / "docs", "jsonl", {"first": "a new first line"} | TEXTS)
    plan = finish(settings)
    assert [document.document_id for document in plan.pending.documents()] == ["first"]


def test_a_changed_kept_column_counts_as_a_change(tmp_path: Path, model: Path) -> None:
    settings = config(tmp_path, model, keep_columns=["year"])
    (tmp_path / "docs").mkdir()
    for year in (1999, 2000):
        row = {"id": "a", "text": "same", "year": year}
        (tmp_path / "docs" / "a.jsonl").write_text(json.dumps(row) + "\n")
        assert len(finish(settings).pending) == 1
    assert read_results(settings.output)["year"].to_pylist() == [2000]


def test_a_crash_between_dropping_and_doing_loses_nothing(tmp_path: Path, model: Path) -> None:
    settings = config(tmp_path, model)
    write(tmp_path / "docs", "jsonl", TEXTS)
    finish(settings)
    write(tmp_path / "docs", "jsonl", TEXTS | {"d1": "changed"})
    drop_rows(Store(settings.output), lambda table: pc.not_equal(table["document_id"], "d1"))
    assert "d1" not in outputs(settings), "rather no row than one of the earlier text"
    finish(settings)
    assert outputs(settings) == TEXTS | {"d1": "changed"}


def test_rows_of_documents_that_are_gone_need_force(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "docs", "jsonl", TEXTS)
    finish(config(tmp_path, model))
    write(tmp_path / "docs", "jsonl", {"d0": TEXTS["d0"]})
    with pytest.raises(JobError, match="5 rows are of documents that the input does not hold"):
        finish(config(tmp_path, model))
    forced = config(tmp_path, model, force=True)
    assert len(finish(forced).pending) == 0
    assert outputs(forced) == TEXTS


def test_rows_of_an_earlier_version_without_stamps_are_done_again(tmp_path: Path, model: Path) -> None:
    settings = config(tmp_path, model)
    write(tmp_path / "docs", "jsonl", TEXTS)
    finish(settings)
    for part in (tmp_path / "out").glob("part-*.parquet"):
        pq.write_table(pq.read_table(part).drop_columns(["input_stamp", "input_hash"]), part)
    assert len(finish(settings).pending) == 6
    assert outputs(settings) == TEXTS
