"""Outputs that are cut off at --max-new-tokens are counted wherever a job is summed up."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from result_rows import make_row

from jobs.report.__main__ import main as report_main
from jobs.summarize import show
from pipeline.job.progress import Progress
from pipeline.results.rows import result_schema
from pipeline.results.sink import Sink
from pipeline.results.store import Store
from pipeline.results.summary import JobReport, rows_for_table, summarize_results


@pytest.fixture
def results(tmp_path: Path) -> Path:
    store = Store(str(tmp_path))
    store.create()
    sink = Sink(store, result_schema(), flush_documents=10, flush_seconds=1)
    for number, reason in enumerate(["stop", "length", "length", None]):
        status = "ok" if reason else "error"
        flags = [["copied"], ["cut", "copied"], ["cut"], None][number]
        sink.add(make_row(f"d{number}", "x", status, output="out", finish_reason=reason, prompt_tokens=5, flags=flags))
    sink.flush()
    return tmp_path


def summed(results: Path) -> JobReport:
    return summarize_results(Store(str(results)), 4)


def test_the_summary_of_a_job_counts_them(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = summed(results)
    assert (report.ok, report.cut, report.exit_code) == (3, 2, 2)
    told = "2 of 3 end at --max-new-tokens; raise it for another output folder"
    assert ("outputs cut off", told) in rows_for_table(report)
    show(report)
    out = capsys.readouterr().out
    assert told in out
    assert "2 outputs are cut off at --max-new-tokens" in out.splitlines()[-1]


def test_of_each_failed_document_the_summary_names_one_row(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    sink = Sink(store, result_schema(), flush_documents=99, flush_seconds=99)
    for name in ("empty.txt", "scan.pdf"):
        for question in ("what", "why", "when"):
            sink.add(make_row(name, name, "error", f"{name} has no text", question_id=question))
    sink.flush()
    found = summarize_results(store, 2, ("what", "why", "when")).first_errors
    assert [who for who, *_ in found] == ["empty.txt (what)", "scan.pdf (what)"]


def test_without_any_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(str(tmp_path))
    Sink(store, result_schema(), flush_documents=1, flush_seconds=1).add(make_row("a", "x", "ok", finish_reason="stop"))
    show(summarize_results(store, 1))
    assert "cut off" not in capsys.readouterr().out


def test_reports_and_progress_count_them(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("table", "json"):
        report_main([str(results), "--format", kind])
        out = capsys.readouterr().out
        assert ("outputs cut off" in out) if kind == "table" else ('"cut_off": 2' in out)
    progress = Progress(3, 3, stream=io.StringIO())
    progress.add([make_row("a", "x", "ok", finish_reason="length")], 1)
    progress.add([make_row("b", "x", "ok", finish_reason="stop")], 1)
    progress.add([make_row("c", "x", "error")], 1)
    assert "1 failed · 1 cut off" in progress.line()


def test_a_job_ends_with_its_flags(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = summed(results)
    assert (report.flagged, report.flags) == (3, {"copied": 2, "cut": 2})
    show(report)
    assert "3 of 3 outputs are flagged: 2 copied, 2 cut (column flags)" in capsys.readouterr().out
    show(replace(report, flagged=1, flags={"cut": 1}))
    assert "1 of 3 outputs is flagged: 1 cut (column flags)" in capsys.readouterr().out
    show(replace(report, flagged=0, flags={}))
    assert "flagged" not in capsys.readouterr().out


def test_a_small_job_ends_with_its_first_outputs_in_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    store.create()
    sink = Sink(store, result_schema(), flush_documents=2, flush_seconds=1)
    sink.add(make_row("broken", "x", "error", "no text"))
    sink.add(make_row("long", "x", output="way too long " * 500))
    sink.add(make_row("short", "x", output="First line,\x1b[2Jand a\nsecond. " + "word " * 40, flags=["cut"]))
    sink.add(make_row("asked", "x", output="[bold]An answer[/bold].", question_id="why"))
    for number in range(3):
        sink.add(make_row(f"later-{number}", "x", output="One of many."))
    sink.flush()
    report = summarize_results(store, 7)
    show(report)
    out = capsys.readouterr().out
    assert "short (cut)\nFirst line,\\x1b[2Jand a\nsecond. word word" in out
    assert "asked (why)\n[bold]An answer[/bold].\n" in out
    assert "way too long" not in out
    assert "later-" not in out, "three are enough"
    show(replace(report, counts={"ok": 1000}))
    assert "An answer" not in capsys.readouterr().out, "the log of a large job"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show(replace(report, counts={"ok": 1000}))
    assert "An answer" in capsys.readouterr().out, "somebody looks"
