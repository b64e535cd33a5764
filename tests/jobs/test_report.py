"""Reports: figures of known rows, pages in a real browser, folders in every state, one-line errors."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from page_checks import DESKTOP, PHONE, CheckedPage
from result_rows import make_row

from jobs.report import clock
from jobs.report.__main__ import main
from jobs.report.measures import length_edges
from jobs.report.results import load_runs, short_names
from pipeline.job import manifest
from pipeline.results.parts import REQUIRED
from pipeline.results.rows import STATUSES, Row, result_schema, to_table
from pipeline.results.store import Store
from pipeline.settings.config import JobConfig

ROOT = Path(__file__).parents[2]
BEGIN = datetime(2026, 3, 1, 23, 50, tzinfo=UTC)
HOSTILE = "</script><script>alert(1)</script><b>bold</b>&lt;{{ 7*7 }}"
LAYERS = [1.0] + [0.2] * 7  # 0.3 in all
Report = Callable[..., tuple[int, str, str]]


@pytest.fixture
def report(run_command: Callable[..., tuple[int, str, str]]) -> Report:
    """Runs the command in this process: (exit code, standard output, standard error)."""

    return partial(run_command, main)


def times(at: float, seconds: float) -> dict[str, Any]:
    return {
        "started_at": BEGIN + timedelta(seconds=at),
        "finished_at": BEGIN + timedelta(seconds=at + seconds),
    }


def ok_row(name: str, tokens: int, at: float, *, seconds: float = 4.0, sparse: bool = True, **values: Any) -> Row:
    """A document that was in a worker from `at` seconds after BEGIN for `seconds`, a quarter of them waiting."""
    row = {
        "attempts": 1, "output": "out", "finish_reason": "stop", "prompt_tokens": tokens, "output_tokens": 11,
        "truncated_tokens": 0, "parts": 1, "precision": "bf16", "attention": "stem" if sparse else "dense",
        "attention_reason": "" if sparse else f"{tokens} tokens are below 512", "density": 0.3 if sparse else 1.0,
        "density_by_layer": LAYERS if sparse else None,
        "kernel": "triton", "queue_seconds": seconds / 4, "load_seconds": 0.0, "tokenize_seconds": seconds / 8,
        "prefill_seconds": seconds / 4, "decode_seconds": seconds / 8, "total_seconds": seconds,
        "time_to_first_token": seconds / 4, "peak_gpu_bytes": 3 << 30, "worker": "node:1", "gpu": "H100",
        "model": "m", **times(at, seconds),
    }  # fmt: skip
    return make_row(name, "docs.jsonl line 1", "ok", **(row | values))


def bad_row(name: str, status: str, error: str, at: float = 0.0) -> Row:
    return make_row(name, "docs.jsonl line 2", status, error, attempts=2, total_seconds=1.0, **times(at, 1.0))


def write(
    folder: Path, rows: list[Row], state: str | None = "finished", documents: int | None = None, **settings: Any
) -> Path:
    """An output folder as jobs.summarize leaves it; without a manifest if state is None."""
    store = Store(str(folder))
    store.create()
    if rows:
        pq.write_table(to_table(rows, result_schema()), folder / f"part-{len(list(folder.iterdir())):06d}-aa.parquet")
    if state:
        config = JobConfig(input="docs", output=str(folder), model="models/m", **settings)
        prints = {"config": "c0ffee", "model": "beef"}
        manifest.save(store, config, prints, state=state, documents=len(rows) if documents is None else documents)
    return folder


def many_rows(seed: int, number: int = 200) -> list[Row]:
    """A run with lengths over two decades, every status, and texts of strangers."""
    draw = np.random.default_rng(seed)
    rows = []
    for index in range(number):
        tokens = int(300 * 2 ** draw.uniform(0, 8))
        seconds = tokens / 3000 * draw.lognormal(0, 0.4)
        rows.append(ok_row(f"doc-{index}", tokens, index * 2.0, seconds=seconds, sparse=tokens > 512))
    for place, status in enumerate(name for name in STATUSES if name != "ok"):
        for again in range(2):
            name = f"{status}-{again}{HOSTILE if again else ''}"
            rows[7 * place + again] = bad_row(name, status, f"{HOSTILE} {place + again:,} tokens", 14.0 * place)
    rows[60].document_id = HOSTILE
    return rows


def measured(report: Report, *folders: Path) -> list[dict[str, Any]]:
    code, out, err = report(*folders, "--format", "json")
    assert (code, err) == (0, "")
    return json.loads(out)["runs"]


def test_the_figures_are_those_of_the_rows(tmp_path: Path, report: Report) -> None:
    rows = [ok_row("a", 1000, 0), ok_row("b", 3000, 4, seconds=8.0), ok_row("c", 400, 4, sparse=False)]
    rows += [bad_row("x", "too_long", "33037 tokens", 5), bad_row("y", "too_long", "99 tokens", 6)]
    (run,) = measured(report, write(tmp_path / "out", rows, documents=6))
    assert run["counts"] == {"ok": 3, "too_long": 2}
    assert (run["ok"], run["failed"], run["without_row"], run["tried_again"]) == (3, 2, 1, 2)
    assert (run["prompt_tokens"], run["output_tokens"]) == (4400, 33)
    assert run["time_to_first_token"] == pytest.approx({"p50": 1.0, "p95": 1.9, "max": 2.0})
    assert (run["worked_seconds"], run["runs"]) == (12.0, 1)
    assert run["documents_per_hour"] == 5 / 12 * 3600
    assert run["tokens_per_second"] == (4400 + 33) / 12
    assert run["prefill_tokens_per_second"] == 4400 / 4
    assert run["decode_tokens_per_second"] == 30 / 2
    phases = {"queue": 4.0, "load": 0.0, "tokenize": 2.0, "prefill": 4.0, "decode": 2.0, "other": 4.0}
    assert run["phase_seconds"] == phases
    assert run["density"] == {"sparse_documents": 2, "dense_documents": 1, "mean": pytest.approx(0.3)}
    assert [(item["from_tokens"], item["documents"]) for item in run["by_length"]] == [
        (256, 1), (512, 1), (1024, 0), (2048, 1)
    ]  # fmt: skip
    assert run["density_by_layer"] == pytest.approx(LAYERS)
    assert [item["density_by_layer"] for item in run["by_length"]] == [None, *[pytest.approx(LAYERS), None] * 2][:4]
    assert [row["document_id"] for row in run["slowest"]] == ["b", "a", "c"]
    assert run["reasons"] == [{"status": "too_long", "example": "33037 tokens", "documents": 2}]
    assert [row["document_id"] for row in run["failures"]] == ["x", "y"]
    assert run["peak_gpu_bytes"] == 3 << 30
    assert (run["config"]["model"], run["fingerprints"]["model"]) == ("models/m", "beef")
    assert run["versions"]["torch"]
    assert (run["started_at"], run["finished_at"]) == ("2026-03-01T23:50:00+00:00", "2026-03-01T23:50:12+00:00")


def test_answers_are_not_taken_for_documents_nor_read_tokens_for_prompts(tmp_path: Path, report: Report) -> None:
    """Two documents of two questions each; the second question shares the reading of the first."""
    first = {"question_id": "cause", "prefix_tokens": 0, "answer": {"hours": 4}}
    second = {"question_id": "cost", "prefix_tokens": 900, "prefill_seconds": 0.5, "answer": None}
    rows = [ok_row("a", 1000, 0, truncated_tokens=5, **first), ok_row("a", 1000, 0, truncated_tokens=5, **second)]
    rows += [ok_row("b", 1000, 4, **first)]
    folder = tmp_path / "out"
    folder.mkdir()
    schema = result_schema(answer=pa.struct({"hours": pa.int64()}))
    pq.write_table(to_table(rows, schema), folder / "part-000000-aa.parquet")
    config = JobConfig(input="docs", output=str(folder), model="models/m")
    known: dict[str, Any] = {"documents": 3, "asked": ["cause", "cost"], "state": "stopped"}
    manifest.save(Store(str(folder)), config, {"config": "c0ffee"}, **known)
    (run,) = measured(report, folder)
    assert (run["questions"], run["rows"], run["documents_with_row"], run["without_row"]) == (2, 3, 2, 3)
    assert (run["truncated"], run["prompt_tokens"], run["read_tokens"]) == (1, 3000, 2100)
    seconds = run["worked_seconds"]
    assert run["documents_per_hour"] == 2 / seconds * 3600
    assert run["answers_per_hour"] == 3 / seconds * 3600
    assert run["tokens_per_second"] == (2100 + 33) / seconds
    assert run["prefill_tokens_per_second"] == 2100 / 2.5
    assert run["by_length"][0]["prefill_tokens_per_second"] == 2100 / 2.5
    assert {row["question_id"] for row in run["slowest"]} == {"cause", "cost"}
    _, out, _ = report(folder, "--format", "table")
    for text in ("of 3 answers about 2 documents", "answers not there yet", "2,100 read", "Slowest answers", "cost"):
        assert text in out, text
    report(folder)
    page = (folder / "report.html").read_text()
    for text in ("A point is an answer", "mean seconds an answer", "a, cause: 1,000 tokens"):
        assert text in page, text


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_page_of_a_run_with_failures_in_a_browser(
    tmp_path: Path, width: int, report: Report, open_page: Callable[..., CheckedPage]
) -> None:
    folder = write(tmp_path / "out", many_rows(1), documents=210)
    code, out, _ = report(folder)
    assert (code, out) == (0, f"written: {folder}/report.html\n")
    seen = open_page(folder / "report.html", width=width, dark=width == PHONE)
    assert len(seen.charts) == 6
    assert seen.charts[0] > 150, "points of the documents"
    assert HOSTILE in seen.text, "as text, in the table of failed documents"
    for figure in (
        "190\nof 210 documents",
        "2 error, 2 oom, 2 timeout, 2 too_long, 2 worker_died",
        "512 to 1K",
        "beef",
    ):
        assert figure in seen.text, figure
    assert '"document_id"' not in seen.text


def test_runs_side_by_side_in_a_browser(tmp_path: Path, report: Report, open_page: Callable[..., CheckedPage]) -> None:
    one = write(tmp_path / "a" / "out", many_rows(1, 80), question="a?", task="ask")
    two = write(tmp_path / "b" / "out", many_rows(2, 80), preset="release")
    old = write(tmp_path / "old", [], state="running", documents=5)
    code, out, _ = report(one, two, old)
    assert (code, out) == (0, f"written: {one}/comparison.html\n")
    seen = open_page(one / "comparison.html", width=PHONE)
    assert len(seen.charts) == 7
    for text in (
        "a/out p95",
        "b/out p50",
        "3 runs side by side",
        "Settings that differ",
        "release",
        "old: The job is run",
    ):
        assert text in seen.text, text


def test_the_terminal_shows_what_the_page_shows(tmp_path: Path, report: Report) -> None:
    folder = write(tmp_path / "out", [*many_rows(3), bad_row("esc\x1b[31m\u202e", "error", "a\x07b")])
    code, out, _ = report(folder, "--format", "table")
    assert code == 0
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "esc\\x1b[31m\\u202e" in out
    assert "a\\x07b" in out
    (run,) = measured(report, folder)
    for figure in (
        f"{run['prompt_tokens']:,}",
        "2 worker_died" if False else "worker_died",
        "512 to 1K",
        "2K to 4K",
        "beef",
    ):
        assert figure in out, figure
    code, both, _ = report(folder, write(tmp_path / "two", many_rows(4)), "--format", "table", "--to", "-")
    header = next(line for line in both.splitlines() if line.startswith("┃"))
    assert [name.strip() for name in header.strip("┃").split("┃")] == ["", "out", "two"]


@pytest.mark.parametrize(
    ("state", "rows", "documents", "words"),
    [
        ("finished", 3, 3, "The job is finished."),
        ("finished", 3, 5, "2 documents have no row all the same"),
        ("stopped", 3, 5, "the same command goes on from there"),
        ("running", 3, 5, "if it does not run, the same command goes on from there. Its last row is"),
        ("running", 0, 5, "No document has a row yet."),
        (None, 3, None, "There is no manifest.json"),
        (None, 0, None, "No job has written here yet."),
    ],
)  # fmt: skip
def test_folders_in_every_state(
    tmp_path: Path, state: str | None, rows: int, documents: int | None, words: str, report: Report
) -> None:
    folder = write(tmp_path / "out", [ok_row(f"d{n}", 900, n) for n in range(rows)], state, documents)
    code, out, err = report(folder, "--format", "table")
    assert (code, err) == (0, "")
    assert words in " ".join(out.split())
    (run,) = measured(report, folder)
    assert (run["rows"], run["documents"]) == (rows, documents)
    assert report(folder)[0] == 0
    assert "<h1>" in (folder / "report.html").read_text()


def test_a_damaged_manifest_costs_the_settings_only(tmp_path: Path, report: Report) -> None:
    folder = write(tmp_path / "out", [ok_row("a", 900, 0)])
    (folder / "manifest.json").write_text("{half")
    code, out, err = report(folder, "--format", "table")
    assert (code, err) == (0, "")
    assert "The job's manifest.json is damaged" in out
    assert "172 an hour" not in out
    assert "900" in out


def test_rows_of_an_earlier_version_lack_columns(
    tmp_path: Path, report: Report, open_page: Callable[..., CheckedPage]
) -> None:
    folder = write(tmp_path / "out", [ok_row(f"new-{n}", 2000 + n, n) for n in range(3)])
    old = list(dict.fromkeys([*REQUIRED, "error", "prompt_tokens", "prefill_seconds"]))
    table = to_table([ok_row(f"old-{n}", 700 + n, 0) for n in range(3)], result_schema()).select(old)
    pq.write_table(table, folder / "part-000009-bb.parquet")
    (run,) = measured(report, folder)
    assert (run["rows"], run["prompt_tokens"]) == (6, 3 * 2000 + 3 + 3 * 700 + 3)
    assert run["worked_seconds"] == 6.0
    only_old = write(tmp_path / "old", [], state=None)
    pq.write_table(table, only_old / "part-000000-bb.parquet")
    assert report(folder, only_old)[0] == 0
    assert len(open_page(folder / "comparison.html").charts) == 6
    (run,) = measured(report, only_old)
    assert (run["time_to_first_token"], run["worked_seconds"], run["phase_seconds"]) == (None, None, None)
    assert report(only_old)[0] == 0
    assert open_page(only_old / "report.html").charts == []


def test_rows_that_all_failed_or_hold_no_number(tmp_path: Path, report: Report) -> None:
    rows = [make_row("a", "s", "error", "unreadable"), ok_row("b", 0, 0, seconds=0.0, density=float("nan"))]
    for number, some in enumerate((rows[:1], rows)):
        folder = write(tmp_path / str(number), some)
        for kind in ("html", "table", "json"):
            assert report(folder, "--format", kind)[0] == 0


def test_density_by_layer_and_length(tmp_path: Path, report: Report) -> None:
    """Layers that are alike share a line; a model with other layers is left out where most rows are of another."""
    windows = [1.0, 0.05, 0.4, 0.05]
    rows = [ok_row(f"w{n}", 700, n, density_by_layer=windows) for n in range(3)]
    rows += [ok_row("long", 3000, 5, density_by_layer=[1.0, 0.02, 0.2, 0.02]), ok_row("other", 700, 6)]
    folder = write(tmp_path / "out", rows)
    (run,) = measured(report, folder)
    assert run["by_length"][0]["density_by_layer"] == pytest.approx(windows)
    assert run["density_by_layer"] == pytest.approx([1.0, 0.17 / 4, 1.4 / 4, 0.17 / 4])
    _, out, _ = report(folder, "--format", "table")
    lines = [line.split("│")[1:-1] for line in out.split("Density by layer")[1].splitlines() if "│" in line][:3]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["0", "1.00", "1.00"], ["1, 3", "0.050", "0.020"], ["2", "0.400", "0.200"]
    ]  # fmt: skip
    plain = write(tmp_path / "plain", [ok_row("a", 900, 0)])
    _, out, _ = report(folder, plain, "--format", "table")
    assert re.search(r"plain +│ +1 to 7 │ +0.200 │ +- ", out)
    nothing = write(tmp_path / "nothing", [ok_row("a", 900, 0, sparse=False)])
    assert measured(report, nothing)[0]["density_by_layer"] is None
    assert "Density by layer" not in report(nothing, "--format", "table")[1]


def test_a_pause_between_runs_is_no_work(tmp_path: Path, report: Report, open_page: Callable[..., CheckedPage]) -> None:
    rows = [ok_row(f"d{n}", 1000, n * 4) for n in range(10)]
    rows += [ok_row(f"e{n}", 1000, 90_000 + n * 4) for n in range(10)]
    folder = write(tmp_path / "out", rows)
    (run,) = measured(report, folder)
    assert (run["worked_seconds"], run["runs"]) == (80.0, 2)
    assert report(folder)[0] == 0
    assert "a dotted line is where the job went on" in open_page(folder / "report.html").text


def test_sessions_and_rates_keep_every_token() -> None:
    draw = np.random.default_rng(0)
    starts = np.concatenate([draw.uniform(0, 500, 300), draw.uniform(10_000, 10_300, 200)])
    ends = starts + draw.exponential(5, 500)
    found = clock.sessions(starts, ends)
    assert [session.begin for session in found] == [starts[:300].min(), starts[300:].min()]
    begin, end = clock.elapsed(found, starts), clock.elapsed(found, ends)
    assert begin.min() == 0
    assert end.max() == pytest.approx(clock.worked_seconds(found))
    assert end - begin == pytest.approx(ends - starts)
    tokens = draw.uniform(10, 1000, 500)
    times, rates = clock.rate_over_time(begin, end, tokens)
    assert (rates * (end.max() / len(times))).sum() == pytest.approx(tokens.sum())
    assert (rates > -1e-6).all()
    _, flat = clock.rate_over_time(np.zeros(1), np.full(1, 8.0), np.full(1, 80.0))
    assert flat == pytest.approx(10.0)
    assert clock.worked_seconds(clock.sessions(np.empty(0), np.empty(0))) == 0


def test_ranges_of_length_hold_every_document(tmp_path: Path) -> None:
    for number, lengths in enumerate(([5], [8066, 13899], [100, 131072], [1024, 2048, 4096, 8192], [7, 7, 8])):
        folder = write(tmp_path / str(number), [ok_row(f"d{n}", size, 0) for n, size in enumerate(lengths)])
        edges = length_edges(load_runs([str(folder)]))
        assert edges[0] <= min(lengths)
        assert edges[-1] > max(lengths)
        assert edges[1] > min(lengths), "no empty range in front"
        assert edges[-2] <= max(lengths), "nor behind"
        assert sorted(set(edges)) == edges
    assert length_edges([]) == []


def bad_arguments(name: str, tmp_path: Path) -> list[object]:
    """What a user got wrong in one way each."""
    good = write(tmp_path / "good", [ok_row("a", 900, 0)])
    other = tmp_path / "docs"
    other.mkdir()
    (other / "a.txt").write_text("text")
    typed = write(tmp_path / "typed", [], state=None)
    columns: dict[str, Any] = {key: ["a"] for key in ("document_id", "source", "status", "error", "attempts", "output")}
    pq.write_table(pa.table(columns | {"status": [[1]]}), typed / "part-000000-x.parquet")
    damaged = write(tmp_path / "damaged", [ok_row("a", 900, 0)])
    part = next(damaged.glob("part-*"))
    part.write_bytes(part.read_bytes()[:-9])
    return {
        "no folder": [],
        "missing": [tmp_path / "nowhere"],
        "a file": [part],
        "of documents": [other],
        "twice": [good, f"{good}/"],
        "other types": [typed],
        "damaged": [damaged],
        "unknown flag": [good, "--fromat", "json"],
        "unknown format": [good, "--format", "pdf"],
        "not writable": [good, "--to", "/proc/report.html"],
        "no such place": [good, "--to", tmp_path / "x" / "y.html"],
        "bad URI": ["s4://bucket/out"],
    }[name]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no folder", "OUTPUT_DIR"),
        ("missing", r"nowhere: there is nothing there; expected the --output folder of a job.*check the path"),
        ("a file", r"that is a file; .*give the folder that it is in"),
        ("of documents", r"docs: no job wrote there \(found a.txt\); expected"),
        ("twice", "good is given twice"),
        ("other types", "its column status is list.*expected string.*give a folder that jobs.summarize wrote"),
        ("damaged", "part-000000-aa.parquet cannot be read"),
        ("unknown flag", "--fromat is not a flag; did you mean '--format'"),
        ("unknown format", "invalid choice: 'pdf'"),
        ("not writable", r"/proc/report.html: cannot be written: .*; give another place with --to FILE"),
        ("no such place", r"x/y.html: cannot be written: .*; give another place with --to FILE"),
        ("bad URI", "s4://bucket/out"),
    ],
)
def test_user_errors_are_one_line(tmp_path: Path, name: str, words: str, report: Report) -> None:
    code, out, err = report(*bad_arguments(name, tmp_path))
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(words, err), err


def test_short_names_tell_folders_apart() -> None:
    assert short_names(["a/b/out", "a/c/out", "a/d"]) == ["b/out", "c/out", "a/d"]
    assert short_names(["s3://bucket/x/"]) == ["x"]
    assert short_names(["out", "a/out"]) == ["out", "a/out"]


def test_table_and_json_need_no_plotly_and_a_page_says_so(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", [ok_row("a", 900, 0)])
    (tmp_path / "plotly.py").write_text("raise ImportError('no plotly')")
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from jobs.cli import run_main\n"
    code += "from jobs.report.__main__ import main; run_main(main)"
    line = [sys.executable, "-c", code, str(tmp_path), str(folder), "--format"]
    ended = [
        subprocess.run([*line, kind], cwd=ROOT, capture_output=True, text=True, check=False)
        for kind in ("table", "json", "html")
    ]
    assert [one.returncode for one in ended] == [0, 0, 1]
    assert ended[2].stderr == "error: charts need plotly, which is not installed: pip install plotly\n"


def test_the_command_that_a_job_names_at_its_end_runs(tmp_path: Path) -> None:
    from jobs.summarize import show
    from pipeline.results.summary import summarize_results

    folder = write(tmp_path / "with space", [ok_row("a", 900, 0)])
    with redirect_stdout(io.StringIO()) as shown:
        show(summarize_results(Store(str(folder)), 1))
    command = shown.getvalue().split("look at it: ", 1)[1].splitlines()[0]
    words = shlex.split(command)
    assert words[1:3] == ["-m", "jobs.report"]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    assert (folder / "report.html").exists()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A URI in an S3 server on this machine."""
    from moto.server import ThreadedMotoServer
    from pyarrow.fs import S3FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret-key"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    filesystem = S3FileSystem(endpoint_override=f"http://{host}:{port}", region="us-east-1", allow_bucket_creation=True)
    filesystem.create_dir("bucket")
    yield f"s3://bucket/results?endpoint_override=http://{host}:{port}&region=us-east-1"
    server.stop()


def test_results_in_an_object_store(tmp_path: Path, bucket: str, report: Report) -> None:
    code, _, err = report(bucket)
    assert code == 1
    assert "s3://bucket/results: there is nothing there" in err
    local = write(tmp_path / "out", [ok_row("a", 900, 0), bad_row("b", "oom", "no room")])
    store = Store(bucket)
    store.create()
    for file in local.iterdir():
        store.write(file.name, file.read_bytes())
    code, out, err = report(bucket, "--documents", "none")
    assert (code, out, err) == (0, "written: s3://bucket/results/report.html\n", "")
    assert b"no room" in (store.read("report.html") or b"")
    there = bucket.replace("results?", "pages/one.html?")
    assert report(bucket, local, "--documents", "none", "--to", there) == (
        0,
        "written: s3://bucket/pages/one.html\n",
        "",
    )
    (run,) = measured(report, bucket)  # type: ignore[arg-type]
    assert (run["ok"], run["failed"], run["output"]) == (1, 1, "s3://bucket/results")
