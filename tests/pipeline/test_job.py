"""Whole jobs with an engine that answers at once: rows, resume, faults. On a real Ray cluster where that matters."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from patience import patient

from pipeline import read_results
from pipeline.errors import JobError
from pipeline.job.job import run, run_job
from pipeline.results.rows import NAMES
from pipeline.results.summary import JobReport
from pipeline.settings.config import JobConfig

FAKE = "fake_engine:FakeEngine"


@pytest.fixture(autouse=True)
def place(request: pytest.FixtureRequest) -> None:
    """Where workers run: in this process, unless the test asks for the cluster."""
    if "ray_cluster" not in request.fixturenames:
        request.getfixturevalue("ray_here")


def write(folder: Path, texts: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [json.dumps({"id": name, "text": text, "n": i}) for i, (name, text) in enumerate(texts.items())]
    (folder / "docs.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def job(docs: Path, out: Path, model: Path, **settings: Any) -> JobReport:
    grace = settings.pop("grace", 1.0)
    defaults = {"workers": 1, "max_new_tokens": 8, "device": "cpu", "flush_documents": 3}
    config = JobConfig(input=str(docs), output=str(out), model=str(model), **(defaults | settings))  # type: ignore[arg-type]
    return run(config, engine_factory=FAKE, grace=grace)


def rows(out: Path) -> dict[str, dict[str, Any]]:
    found = read_results(out).to_pylist()
    assert len({row["document_id"] for row in found}) == len(found), "one row a document"
    return {row["document_id"]: row for row in found}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


TEXTS = {f"d{i:02}": f"document {i} " * (i + 1) for i in range(12)}


def test_thinking_has_its_column_and_a_cut_inside_it_is_no_answer(tmp_path: Path, out: Path, model: Path) -> None:
    docs = write(tmp_path / "docs", {"thought": "THINK", "cut": "THINK CUT", "plain": "The committee met."})
    report = job(docs, out, model, thinking="auto")
    assert report.counts == {"ok": 2, "error": 1}
    found = rows(out)
    assert {name: (row["output"], row["reasoning"]) for name, row in found.items()} == {
        "thought": ("the answer", "a plan"), "cut": (None, "a plan"), "plain": ("the answer", None),
    }  # fmt: skip
    error = found["cut"]["error"]
    assert error.startswith("--max-new-tokens 8 cut the model off inside its thinking, before its answer; give a")
    assert "--thinking off helps" in error
    again = job(docs, out, model, thinking="auto", retry_failed=True)
    assert rows(out)["cut"]["finished_at"] > found["cut"]["finished_at"], again.counts


def test_rows_have_flags_and_evidence(tmp_path: Path, out: Path, model: Path) -> None:
    where = "It rained on Monday. " * 9 + "Nobody but the clerk has the answer. " + "It rained on Monday. " * 9
    docs = write(tmp_path / "docs", {"says": where, "cut": f"CUT {where}", "other": "It rained.", "bad": "ALWAYSOOM"})
    report = job(docs, out, model)
    assert (report.flagged, report.flags) == (1, {"cut": 1})
    found = rows(out)
    assert {name: row["flags"] for name, row in found.items()} == {"says": [], "cut": ["cut"], "other": [], "bad": None}
    (passage,) = found["says"]["evidence"]
    begin = where.index("the answer")
    assert passage == {
        "output_start": 0, "output_end": 10, "start": begin, "end": begin + len("the answer."),
        "score": pytest.approx(1.0),
    }  # fmt: skip
    assert found["cut"]["evidence"][0]["start"] == begin + 4
    assert found["other"]["evidence"] == []
    assert found["bad"]["evidence"] is None
    job(docs, out, model, evidence="off", retry_failed=True)
    assert rows(out)["says"]["evidence"], "a job goes on with another setting"
    plain = job(docs, tmp_path / "plain", model, evidence="off")
    assert plain.flags == {"cut": 1}
    assert {row["evidence"] for row in rows(tmp_path / "plain").values()} == {None}


def test_evidence_of_documents_in_parts_and_of_truncated_ones(tmp_path: Path, model: Path) -> None:
    text = "It rained on Monday. " * 90 + "Nobody but the clerk has the answer. " + "It rained on Tuesday. " * 90
    docs = write(tmp_path / "docs", {"long": text})
    for policy, there in (("map-reduce", True), ("truncate", False)):
        job(docs, tmp_path / policy, model, too_long=policy, max_context=400)
        (row,) = rows(tmp_path / policy).values()
        assert (row["status"], row["parts"] > 1, row["truncated_tokens"] > 0) == ("ok", there, not there)
        begins = [each["start"] for each in row["evidence"]]
        assert begins == ([text.index("the answer")] if there else [])


def test_every_document_has_a_full_row(tmp_path: Path, out: Path, model: Path) -> None:
    bad = {"empty": "", "good": "The text is fine."}
    docs = write(tmp_path / "docs", TEXTS | bad)
    with (docs / "docs.jsonl").open("ab") as file:
        file.write(b"{broken\n")
    (docs / "binary.txt").write_bytes(b"abc\xff")
    report = job(docs, out, model, keep_columns=["n"])
    assert report.exit_code == 2
    assert report.counts == {"ok": 13, "error": 3}
    found = rows(out)
    assert sorted(found) == sorted([*TEXTS, "empty", "good", "docs.jsonl:15", "binary.txt"])
    assert found["binary.txt"]["error"].startswith("invalid UTF-8 at byte 3")
    assert "0 bytes" in found["empty"]["error"]
    assert found["docs.jsonl:15"]["attempts"] == 0
    row = found["good"]
    assert set(row) == {*NAMES, "n"}
    assert (row["output"], row["n"], row["attempts"], row["status"]) == ("the answer", 13, 1, "ok")
    assert row["source"].endswith("docs.jsonl line 14")
    filled = set(NAMES) - {
        "truncated_tokens",
        "kept_error",
        "density_by_layer",
        "output_error",
        "reasoning",
        "input_note",
        "page_starts",
        "answer",
        "answer_error",
        "tokens_per_step",
    }
    assert not [name for name in filled if row[name] is None]
    assert row["prompt_hash"] == json.loads((out / "manifest.json").read_text())["questions"]["summary"]["fingerprint"]
    assert row["tokenize_seconds"] + row["prefill_seconds"] + row["decode_seconds"] <= row["total_seconds"]
    assert row["started_at"].utcoffset().total_seconds() == 0
    assert row["started_at"] <= row["finished_at"]
    assert (row["finished_at"] - row["started_at"]).total_seconds() == pytest.approx(row["total_seconds"], abs=0.05)


def test_a_finished_job_does_nothing_and_a_lost_part_is_redone(tmp_path: Path, out: Path, model: Path) -> None:
    docs = write(tmp_path / "docs", TEXTS)
    assert job(docs, out, model).exit_code == 0
    parts = {path: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert len(parts) >= 4
    again = job(docs, out, model)
    assert "nothing to do" in again.messages[-1]
    assert (again.done_now, again.exit_code) == (0, 0)
    assert {path: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")} == parts
    before = rows(out)
    victim = sorted(parts)[1]
    lost = set(pq.read_table(victim)["document_id"].to_pylist())
    victim.unlink()
    report = job(docs, out, model)
    after = rows(out)
    assert report.done_now == len(lost) == 3
    assert sorted(after) == sorted(TEXTS)
    assert {name for name in after if after[name]["finished_at"] != before[name]["finished_at"]} == lost


def test_another_job_on_the_same_output_is_refused(tmp_path: Path, out: Path, model: Path) -> None:
    docs = write(tmp_path / "docs", {"a": "text"})
    job(docs, out, model)
    with pytest.raises(JobError, match=r"another config \(max_new_tokens: 8 -> 9\).*--force"):
        job(docs, out, model, max_new_tokens=9)
    with pytest.raises(JobError, match="another prompt"):
        job(docs, out, model, prompt_file=str(_prompt_file(tmp_path)))
    with pytest.raises(JobError, match=r"another reading \(keep_columns: \[\] -> \['n'\]\)"):
        job(docs, out, model, keep_columns=["n"])
    write(docs, {"b": "text"})
    with pytest.raises(JobError, match="1 rows are of documents that the input does not hold"):
        job(docs, out, model)
    report = job(docs, out, model, force=True)
    assert report.done_now == 1
    assert sorted(rows(out)) == ["a", "b"]
    write(docs, {"a": "text", "b": "text"})
    with pytest.raises(JobError, match="holds results already"):
        job(docs, out, model, resume=False)
    (out / "manifest.json").write_text("{half")
    with pytest.raises(JobError, match="damaged"):
        job(docs, out, model)


def _prompt_file(folder: Path) -> Path:
    path = folder / "prompt.jinja"
    path.write_text("{{ document }} {{ question }} please")
    return path


def test_failed_documents_are_retried_on_request(tmp_path: Path, out: Path, model: Path) -> None:
    docs = write(tmp_path / "docs", {"a": "text", "b": "ALWAYSOOM", "c": "more"})
    assert job(docs, out, model).counts == {"ok": 2, "oom": 1}
    write(docs, {"a": "text", "b": "FIXED", "c": "more"})
    report = job(docs, out, model, retry_failed=True)
    assert report.counts == {"ok": 3}
    assert report.done_now == 1
    assert len(rows(out)) == 3


def test_a_failed_row_whose_document_is_gone_is_kept_with_force(tmp_path: Path, out: Path, model: Path) -> None:
    docs = write(tmp_path / "docs", {"a": "text", "b": "ALWAYSOOM", "c": "ALWAYSOOM"})
    assert job(docs, out, model).counts == {"ok": 1, "oom": 2}
    write(docs, {"a": "text", "b": "FIXED"})
    assert job(docs, out, model, retry_failed=True, force=True).done_now == 1
    assert {name: row["status"] for name, row in rows(out).items()} == {"a": "ok", "b": "ok", "c": "oom"}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_document_that_kills_its_worker_is_found(tmp_path: Path, out: Path, model: Path) -> None:
    docs = write(tmp_path / "docs", TEXTS | {"killer": "please CRASH now " * 8})
    report = job(docs, out, model)
    found = rows(out)
    assert report.counts == {"ok": 12, "worker_died": 1}
    assert found["killer"]["status"] == "worker_died"
    assert found["killer"]["attempts"] == 3
    assert "worker process ended" in found["killer"]["error"]


def test_an_engine_that_breaks_is_the_error_of_the_document_alone_in_it(tmp_path: Path, out: Path, model: Path) -> None:
    docs = write(tmp_path / "docs", {"bad": "RAISE"})
    assert job(docs, out, model, max_attempts=1).counts == {"error": 1}
    assert "RuntimeError: the fake engine is broken" in rows(out)["bad"]["error"]


def test_a_document_that_hangs_the_engine_times_out_alone(tmp_path: Path, out: Path, model: Path) -> None:
    docs = write(tmp_path / "docs", {"a": "text", "b": "more text", "hang": "HANG " * 9, "c": "text"})
    report = job(docs, out, model, deadline=patient(1.0), workers=1, grace=0.5)
    assert report.counts == {"ok": 3, "timeout": 1}
    assert rows(out)["hang"]["attempts"] == 2


def test_a_slow_document_times_out_without_harm_to_its_worker(tmp_path: Path, out: Path, model: Path) -> None:
    docs = write(tmp_path / "docs", {f"slow{i}": "SLOW" for i in range(3)} | {"quick": "x" * 999})
    report = job(docs, out, model, deadline=0.25)
    found = rows(out)
    assert report.counts == {"ok": 1, "timeout": 3}
    assert "not done after 0.25 s" in found["slow0"]["error"]
    assert len({row["worker"] for row in found.values()}) == 1


def test_a_bad_document_does_not_wait_for_an_engine_that_is_busy(tmp_path: Path, out: Path, model: Path) -> None:
    docs = write(tmp_path / "docs", {f"slow{i:02}": "SLOW " * (20 - i) for i in range(14)} | {"e0": "", "e1": ""})
    report = job(docs, out, model, grace=0.05)
    assert report.counts == {"ok": 14, "error": 2}
    assert {row["attempts"] for row in rows(out).values()} == {1}


def test_out_of_memory_is_tried_again_alone(tmp_path: Path, out: Path, model: Path) -> None:
    docs = write(tmp_path / "docs", {"first": "SLOW " * 80, "a": "OOM " * 30, "never": "ALWAYSOOM", "c": "text"})
    report = job(docs, out, model)
    assert report.counts == {"ok": 3, "oom": 1}
    assert rows(out)["a"]["attempts"] == 2


def test_workers_that_cannot_start_end_the_job(tmp_path: Path, out: Path, model: Path) -> None:
    docs = write(tmp_path / "docs", {"a": "text"})
    config = JobConfig(input=str(docs), output=str(out), model=str(model), device="cpu", workers=1)  # type: ignore[arg-type]
    with pytest.raises(JobError, match=r"no worker could start in 3 tries.*NoSuchEngine"):
        run(config, engine_factory="fake_engine:NoSuchEngine")


def test_too_long_documents_by_policy(tmp_path: Path, out: Path, model: Path) -> None:
    docs = write(
        tmp_path / "docs", {"long": "CUT. " + "The quiet committee met again. " * 60, "short": "The committee."}
    )
    options: dict[str, Any] = {"max_context": 120, "question": "Findings?"}
    job(docs, out, model, **options)
    found = rows(out)
    assert (found["long"]["status"], found["short"]["status"]) == ("too_long", "ok")
    assert "the limit is 112" in found["long"]["error"]
    job(docs, tmp_path / "cut", model, too_long="truncate", **options)
    cut = rows(tmp_path / "cut")
    assert (cut["long"]["status"], cut["long"]["prompt_tokens"]) == ("ok", 112)
    assert cut["long"]["truncated_tokens"] > 200
    assert cut["short"]["truncated_tokens"] == 0
    report = job(docs, tmp_path / "parts", model, too_long="map-reduce", **options)
    parts = rows(tmp_path / "parts")
    assert [parts[name]["finish_reason"] for name in ("long", "short")] == ["length", "stop"], "of one part"
    assert report.cut == 1
    assert parts["long"]["status"] == "ok"
    assert parts["long"]["parts"] >= 4
    assert parts["long"]["prompt_tokens"] > 360
    assert parts["short"]["parts"] == 1


def test_a_stop_keeps_what_is_finished_and_the_next_run_goes_on(tmp_path: Path, out: Path, model: Path) -> None:
    docs = write(tmp_path / "docs", {f"d{i}": "SLOW" for i in range(16)})

    def stop_when_something_is_there() -> None:
        while not list(out.glob("part-*.parquet")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_something_is_there).start()
    report = job(docs, out, model)
    assert report.exit_code == 130
    first = rows(out)
    assert 3 <= len(first) < 16
    report = job(docs, out, model)
    assert report.done_now == 16 - len(first)
    after = rows(out)
    assert len(after) == 16
    assert all(after[name] == row for name, row in first.items())


def test_megabytes_of_text_and_a_parquet_input(tmp_path: Path, out: Path, model: Path) -> None:
    texts = ["The report was mapped last winter. " * 100_000, "short"]
    pq.write_table(pa.table({"document_id": [1, 2], "text": texts}), tmp_path / "docs.parquet")
    report = job(tmp_path / "docs.parquet", out, model, too_long="truncate")
    assert report.counts == {"ok": 2}
    assert rows(out)["1"]["truncated_tokens"] > 400_000


def test_the_python_interface_takes_settings_and_refuses_unknown_ones(tmp_path: Path, out: Path, model: Path) -> None:
    with pytest.raises(JobError, match="'max_tokens' is not a setting; it is max_new_tokens here"):
        run_job(input=tmp_path, output=out, model=model, max_tokens=3)
    docs = write(tmp_path / "docs", {"a": "text"})
    job(docs, out, model)
    report = run_job(input=docs, output=out, model=model, workers=1, max_new_tokens=8, device="cpu", flush_documents=3)
    assert report.documents == report.ok == 1


@pytest.mark.parametrize(
    ("entry", "began"), [("prompt_date", "2001-02-03"), ("written_at", "2001-02-03T04:05:06+00:00")]
)
def test_a_job_goes_on_with_the_date_of_its_beginning(
    tmp_path: Path, out: Path, model: Path, entry: str, began: str
) -> None:
    """With a chat template that prints the date: here the number of the year, in as many words."""
    dated = shutil.copytree(model, tmp_path / "model")
    (dated / "chat_template.jinja").write_text("{{ 'day ' * strftime_now('%y')|int }}{{ messages[0].content }}")
    docs = write(tmp_path / "docs", {"a": "some text", "b": "some text"})
    job(docs, out, dated)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest.pop("prompt_date") == date.today().isoformat()
    del manifest["seal"]  # that of another content; older versions wrote none
    before = rows(out)
    # As if the job had been begun in another year, by this version or an older one, and left off before b.
    (out / "manifest.json").write_text(json.dumps(manifest | {entry: began}))
    write(docs, {"a": "some text", "b": "some texts"})
    job(docs, out, dated)
    after = rows(out)
    assert after["a"] == before["a"]
    assert before["b"]["prompt_tokens"] - after["b"]["prompt_tokens"] > 20, "a word for each year since 2001"
    assert json.loads((out / "manifest.json").read_text())["prompt_date"] == "2001-02-03"
