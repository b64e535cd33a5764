"""pipeline.summarize and Summarizer: texts and paths in, the job's rows out, in this process."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from patience import patient

import pipeline
from pipeline.api import Summarizer, summarize
from pipeline.errors import JobError
from pipeline.results.rows import result_schema

ROOT = Path(__file__).parents[2]
REPORT = (ROOT / "examples" / "documents" / "report-01.txt").read_text(encoding="utf-8")
FAKE = {"engine_factory": "fake_engine:FakeEngine", "max_new_tokens": 8}
# Small blocks, so that texts of a few hundred tokens are sparse.
SPARSE = {"preset": "sampled", "budget": 0.4, "block_size": 16, "dense_layers": 0, "dense_below": 0}
QUESTION = "List the key findings in order."
# Columns that no two runs have in common.
OF_THE_RUN = re.compile(r".*_seconds|time_to_first_token|worker|started_at|finished_at|source|input_stamp")


def rows(table: pa.Table) -> dict[str, dict[str, Any]]:
    return {row["document_id"]: row for row in table.to_pylist()}


def sentences(first: int, last: int) -> str:
    """Some sentences of a report, in one paragraph."""
    return " ".join(re.split(r"(?<=[.])\s+", REPORT)[first:last])


@pytest.mark.usefixtures("ray_here")
def test_rows_are_those_of_the_job(tmp_path: Path, model: Path) -> None:
    """Same prompts, outputs, statuses, densities and configuration, with the real engine."""
    texts = {"finding": sentences(55, 110), "short": "A storm.", "blank": "  ", "long": REPORT[:9000]}
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps({"id": i, "text": t}) for i, t in texts.items()))
    settings: dict[str, Any] = SPARSE | {"question": QUESTION, "max_new_tokens": 40, "max_context": 1800}
    pipeline.run_job(input=tmp_path / "docs.jsonl", output=tmp_path / "out", model=model, workers=1, **settings)
    job = rows(pipeline.read_results(tmp_path / "out"))
    table = summarize(texts, model=model, **settings)
    here = rows(table)
    assert table.schema == result_schema()
    assert table["document_id"].to_pylist() == list(texts)
    assert [row["status"] for row in here.values()] == ["ok", "ok", "error", "too_long"]
    assert here["finding"]["attention"] == "stem"
    assert here["finding"]["density"] < 0.6
    assert "Nobody reviewed the student after the storm" in here["finding"]["output"]
    for name, row in here.items():
        shared = {column for column in row if not OF_THE_RUN.fullmatch(column)}
        assert {column: row[column] for column in shared} == {column: job[name][column] for column in shared}


def test_a_list_of_anything_gives_one_row_each_in_order(model: Path) -> None:
    """Whatever is wrong with a document is in its row."""
    texts = ["one", "", None, 3.5, "two \udc80", b"three", b"\xff", np.str_("four"), "one"]
    table = summarize(texts, model=model, **FAKE)
    assert table["document_id"].to_pylist() == [str(i) for i in range(len(texts))]
    assert table["status"].to_pylist() == ["ok", "error", "error", "error", "error", "ok", "error", "ok", "ok"]
    said = table["error"].to_pylist()
    for place, message in {1: "empty", 2: "null", 3: "float", 4: "surrogate", 6: "UTF-8 at byte 0"}.items():
        assert message in said[place]
    assert set(table["attempts"].to_pylist()) == {1}


def test_an_answer_stands_though_its_review_is_late(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.workers.asking.find_flags", lambda *_: time.sleep(patient(2.0)) or ())
    with Summarizer(model=model, deadline=patient(1.0), **FAKE) as summarizer:
        (row,) = summarizer({"a": "One short text."}).to_pylist()
    assert row["status"] == "ok"
    assert row["output"]
    assert row["flags"] is None, "its review was not waited for"


def test_documents_that_break_the_engine_cost_nobody_else_a_row(model: Path) -> None:
    """As in the job: suspects are tried alone, in a new engine, and the next call finds one that works."""
    with Summarizer(model=model, grace=0.3, deadline=patient(1.0), **FAKE) as summarizer:
        found = rows(summarizer({"good": "fine", "bad": "RAISE it", "big": "an OOM once", "huge": "ALWAYSOOM"}))
        assert {name: row["status"] for name, row in found.items()} == {
            "good": "ok", "bad": "error", "big": "ok", "huge": "oom",
        }  # fmt: skip
        assert "the fake engine is broken" in found["bad"]["error"]
        assert (found["bad"]["attempts"], found["big"]["attempts"]) == (3, 2)
        hung = rows(summarizer({"good": "fine", "stuck": "HANG"}))
        assert {name: row["status"] for name, row in hung.items()} == {"good": "ok", "stuck": "timeout"}
        assert rows(summarizer("fine"))["0"]["status"] == "ok"


def test_an_engine_that_cannot_be_built_again_leaves_rows_that_say_so(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Summarizer(model=model, **FAKE) as summarizer:
        summarizer.load()
        monkeypatch.setenv("FAKE_ENGINE", "NOSTART")
        found = rows(summarizer({f"d{i}": "RAISE" if i == 3 else "x" for i in range(12)}))
        assert set(found) == {f"d{i}" for i in range(12)}
        lost = [row for row in found.values() if row["status"] == "error"]
        assert lost
        assert all("does not start" in row["error"] for row in lost)
        with pytest.raises(RuntimeError, match="does not start"):
            summarizer(["x"])
        monkeypatch.delenv("FAKE_ENGINE")
        assert rows(summarizer(["x"]))["0"]["status"] == "ok"


def test_paths_are_read_and_strings_are_texts(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("the first")
    (tmp_path / "b.md").write_bytes(b"\xff")
    (tmp_path / "c.jsonl").write_text('{"text": "x", "n": 7}\n{broken\n')
    table = summarize([Path("a.txt"), "a text", Path("c.jsonl")], input="*.md", model=model, keep_columns="n", **FAKE)
    assert table["document_id"].to_pylist() == ["a.txt", "1", "c.jsonl:1", "c.jsonl:2", "b.md"]
    assert table["status"].to_pylist() == ["ok", "ok", "ok", "error", "error"]
    assert table["n"].to_pylist() == [None, None, 7, None, None]
    assert table["attempts"].to_pylist() == [1, 1, 1, 0, 1]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("the second")
    named = rows(summarize({"mine": Path("a.txt"), "theirs": Path("other/a.txt"), 2: "a text"}, model=model, **FAKE))
    assert {name: row["source"].removeprefix(f"{tmp_path}/") for name, row in named.items()} == {
        "mine": "a.txt", "theirs": "other/a.txt", "2": "memory",
    }  # fmt: skip
    assert summarize(Path(), model=model, **FAKE).num_rows == 5


@pytest.mark.parametrize(
    ("documents", "settings", "message"),
    [
        (["a.txt"], {}, r"documents\[0\] is 'a.txt', the name of a file"),
        ("s3://bucket/docs", {}, "a URI.*use input="),
        ([Path("none.txt")], {}, "does not exist"),
        ({"x": Path("two.jsonl")}, {}, "holds 2 documents"),
        ([Path("a.txt"), Path("a.txt")], {}, "a document id occurs more than once: 'a.txt'"),
        ({1: "a", "1": "b"}, {}, "two documents have the id '1'"),
        ([], {}, "there are no documents"),
        (5, {}, "documents must be texts"),
        (["x"], {"output": "out"}, "output is a setting of the job.*run_job"),
        (["x"], {"workers": 2}, "workers is a setting of the job"),
        (["x"], {"max_tokens": 2}, "'max_tokens' is not a setting; it is max_new_tokens here"),
        (["x"], {"model": "/no/such/model"}, "does not exist"),
    ],
)
def test_mistakes_are_named_before_a_model_is_loaded(
    documents: Any, settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "two.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    if "model" not in settings:
        monkeypatch.setattr("pipeline.workers.inprocess.LocalPool.load", lambda self: pytest.fail("it loads"))
    with pytest.raises(JobError, match=message):
        summarize(documents, **{"model": model, **settings})


def test_it_works_inside_a_running_event_loop_and_leaves_no_thread(model: Path) -> None:
    """A notebook's cell runs in one."""

    async def cell() -> pa.Table:
        return summarize(["x"], model=model, **FAKE)

    before = set(threading.enumerate())
    assert asyncio.run(cell())["status"].to_pylist() == ["ok"]
    assert not {thread.name for thread in set(threading.enumerate()) - before} & {"engine", "worker"}


def test_an_interrupted_call_stops_and_the_next_one_works(model: Path) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Summarizer(model=model, **FAKE) as summarizer:
            summarizer.load()
            signal.setitimer(signal.ITIMER_REAL, 0.7)
            started = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                summarizer([f"SLOW {i}" for i in range(100)])
            assert time.monotonic() - started < patient(10)
            assert rows(summarizer(["SLOW 1"]))["0"]["status"] == "ok", "ids of the interrupted call are free again"
    finally:
        signal.signal(signal.SIGALRM, before)


def test_importing_it_starts_nothing_heavy() -> None:
    """`from pipeline import summarize` in a notebook: no Ray, no model."""
    import subprocess

    code = "import sys; from pipeline import summarize; assert 'ray' not in sys.modules, 'ray'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
