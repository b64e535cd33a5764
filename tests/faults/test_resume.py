"""Resume by content: what changed is done again, what was only touched is not, and nobody ever sees two rows."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from result_rows import kept_columns, make_row

from pipeline.errors import JobError
from pipeline.job import manifest
from pipeline.job.job import run
from pipeline.job.plan import JobPlan, make_plan, survey_input
from pipeline.results.columns import utc_now
from pipeline.results.parts import read_results, recover, remove_rows
from pipeline.results.rows import result_schema
from pipeline.results.sink import Sink
from pipeline.results.store import Store
from pipeline.settings.config import JobConfig
from pipeline.source import DocumentReader, input_hash
from tools.faults.corpus import count_rows

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


def finish(settings: JobConfig, flush_documents: int = 4) -> JobPlan:
    """What a job does, with the document's own text as its output: plan, and do what is pending."""
    survey, store = survey_input(settings), Store(settings.output)
    store.create()
    recover(store)
    plan = make_plan(survey, store)
    remove_rows(store, plan.stale_errors)
    manifest.save(store, settings, survey.prints)
    schema = result_schema(survey.catalogue.kept)
    sink = Sink(store, schema, flush_documents=flush_documents, flush_seconds=9, replaces=plan.replaced)
    reader = DocumentReader("text", survey.catalogue.kept)
    for document in plan.pending.documents():
        if document.error:
            sink.add(
                make_row(document.document_id, document.source, "error", document.error, input_stamp=document.stamp)
            )
            continue
        text, kept = reader.read(document)
        about: Any = {"input_stamp": document.stamp, "input_hash": input_hash(text, kept), "finished_at": utc_now()}
        sink.add(make_row(document.document_id, document.source, "ok", output=text, **about, **kept_columns(kept)))
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
    assert [(name.removesuffix(".txt"), question) for name, question in plan.replaced] == [("d3", "summary")]
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
    assert (len(plan.pending), plan.replaced) == (0, ())


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


class KilledError(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("survive", range(4))
def test_whenever_it_is_killed_a_changed_document_has_its_old_row_or_its_new_one(
    tmp_path: Path, model: Path, survive: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path, model)
    write(tmp_path / "docs", "jsonl", TEXTS)
    finish(settings)
    changed = TEXTS | {"d1": "changed", "d4": "changed too", "d5": "and this", "new": "one more"}
    write(tmp_path / "docs", "jsonl", changed)
    put, left = Store.put, [survive]

    def dies(store: Store, name: str, data: bytes) -> None:
        if name.startswith("part-"):
            if not left[0]:
                raise KilledError
            left[0] -= 1
        put(store, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", dies)
        with pytest.raises(KilledError) if survive < 3 else contextlib.nullcontext():
            finish(settings)
    assert count_rows(tmp_path / "out", list(TEXTS)).exact, "as any reader of the files sees it"
    between = outputs(settings)
    assert all(between[name] in (TEXTS[name], changed[name]) for name in TEXTS)
    assert (between == TEXTS, between == changed) == (survive == 0, survive == 3)
    finish(settings)
    assert outputs(settings) == changed


def test_failed_rows_stay_until_their_retry_is_done(tmp_path: Path, model: Path) -> None:
    settings = config(tmp_path, model)
    write(tmp_path / "docs", "jsonl", TEXTS)
    finish(settings)
    part = next((tmp_path / "out").glob("part-*.parquet"))
    table = pq.read_table(part)
    status = pa.array(["oom", *table["status"].to_pylist()[1:]])
    pq.write_table(table.set_column(table.column_names.index("status"), table.field("status"), status), part)
    retried = config(tmp_path, model, retry_failed=True)
    plan = make_plan(survey_input(retried), Store(retried.output))
    assert (len(plan.pending), plan.already, len(plan.replaced)) == (1, 5, 1)
    assert plan.messages == ("--retry-failed: 1 documents are done again",)
    assert make_plan(survey_input(settings), Store(settings.output)).replaced == ()
    assert read_results(settings.output)["status"].to_pylist().count("oom") == 1
    finish(retried)
    assert set(read_results(settings.output)["status"].to_pylist()) == {"ok"}
    assert outputs(settings) == TEXTS


@pytest.mark.usefixtures("ray_here")
def test_a_job_whose_engine_does_not_start_costs_no_row(tmp_path: Path, model: Path) -> None:
    settings = config(tmp_path, model, device="cpu", workers=1)
    write(tmp_path / "docs", "jsonl", TEXTS)
    finish(settings)
    before = read_results(settings.output).to_pylist()
    write(tmp_path / "docs", "jsonl", TEXTS | {"d3": "changed"})
    with pytest.raises(JobError, match="no worker could start"):
        run(settings, engine_factory="fake_engine:NoSuchEngine")
    assert read_results(settings.output).to_pylist() == before
    assert len(finish(settings).pending) == 1
    after = {row["document_id"]: row for row in read_results(settings.output).to_pylist()}
    assert len(after) == 6
    assert [row["document_id"] for row in before if row != after[row["document_id"]]] == ["d3"]


def test_a_kept_column_may_change_its_type(tmp_path: Path, model: Path) -> None:
    settings = config(tmp_path, model, keep_columns=["year"])
    (tmp_path / "docs").mkdir()
    years: list[Any] = [1999, 2000]
    for changed in (2000, "MM", 0.5):
        years[1] = changed
        lines = [json.dumps({"id": str(i), "text": "same", "year": year}) + "\n" for i, year in enumerate(years)]
        (tmp_path / "docs" / "a.jsonl").write_text("".join(lines))
        plan = finish(settings)
        assert len(plan.pending) == (2 if changed == 2000 else 1), "the other document is the same"
    assert read_results(settings.output)["year"].to_pylist() == ["1999", "0.5"]


def test_rows_of_documents_that_are_gone_need_force(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "docs", "jsonl", TEXTS)
    finish(config(tmp_path, model))
    write(tmp_path / "docs", "jsonl", {"d0": TEXTS["d0"]})
    with pytest.raises(JobError, match="5 rows are of documents that the input does not hold"):
        finish(config(tmp_path, model))
    forced = config(tmp_path, model, force=True)
    assert len(finish(forced).pending) == 0
    assert outputs(forced) == TEXTS


@pytest.mark.parametrize("flush_documents", [1, 4])
def test_a_line_that_is_mended_takes_the_place_of_its_error(tmp_path: Path, model: Path, flush_documents: int) -> None:
    """The row of a line that could not be read has an id made of its place; once it can be, it has one of its own."""
    settings = config(tmp_path, model)
    write(tmp_path / "docs", "jsonl", TEXTS)
    path = tmp_path / "docs" / "docs.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace('"text": "text number 3"}', ""))
    finish(settings, flush_documents)
    statuses = dict(zip(*read_results(settings.output, ["document_id", "status"]).to_pydict().values(), strict=True))
    assert statuses == {name: "ok" for name in TEXTS if name != "d3"} | {"docs.jsonl:4": "error"}
    path.write_text(whole)
    plan = finish(settings)
    assert plan.stale_errors == ("docs.jsonl:4",)
    assert [document.document_id for document in plan.pending.documents()] == ["d3"]
    assert outputs(settings) == TEXTS


@pytest.mark.parametrize("before", ["died", "damaged", "gone"])
def test_a_job_that_finds_all_rows_there_leaves_a_whole_manifest(tmp_path: Path, model: Path, before: str) -> None:
    settings = config(tmp_path, model)
    write(tmp_path / "docs", "jsonl", TEXTS)
    finish(settings)  # its manifest does not say that it is done
    path = tmp_path / "out" / manifest.NAME
    if before != "died":
        path.unlink() if before == "gone" else path.write_text("{")
        with pytest.raises(JobError, match="--force"):
            run(settings)
        run(config(tmp_path, model, force=True))
    assert "nothing to do" in run(settings).messages[-1]
    assert json.loads(path.read_text())["state"] == "finished"
    written = path.read_bytes()
    run(settings)
    assert path.read_bytes() == written


def test_results_inside_the_input_are_no_input(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "docs", "jsonl", TEXTS)
    (tmp_path / "link").symlink_to(tmp_path / "docs")
    for output in ("docs", "docs/out", "link/out"):
        settings = config(tmp_path, model, output=str(tmp_path / output))
        finish(settings)
        assert len(finish(settings).pending) == 0
        for path in (tmp_path / output).glob("*.*"):
            if path.suffix != ".jsonl":
                path.unlink()
    # Another job may well take them for its documents.
    settings = config(tmp_path, model)
    finish(settings)
    again = config(tmp_path, model, input=settings.output, output=str(tmp_path / "again"), text_column="output")
    assert len(survey_input(again).catalogue) == len(TEXTS)


def test_rows_of_an_earlier_version_without_stamps_are_done_again(tmp_path: Path, model: Path) -> None:
    settings = config(tmp_path, model)
    write(tmp_path / "docs", "jsonl", TEXTS)
    finish(settings)
    for part in (tmp_path / "out").glob("part-*.parquet"):
        pq.write_table(pq.read_table(part).drop_columns(["input_stamp", "input_hash"]), part)
    assert len(finish(settings).pending) == 6
    assert outputs(settings) == TEXTS
