"""A job's terminal, pipe and network: it answers signals, lets no name command the terminal, exits by its rows."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import patient
from result_rows import make_row

from jobs.cli import run_main
from jobs.summarize import main, show
from pipeline.errors import DocumentError, JobError, visible
from pipeline.imports import ROOT
from pipeline.interruptible import interruptible, left_behind, stop_signals, uninterrupted
from pipeline.job import manifest
from pipeline.job.progress import Progress
from pipeline.location import open_filesystem
from pipeline.results.lock import FolderLock
from pipeline.results.rows import result_schema
from pipeline.results.sink import Sink
from pipeline.results.store import Store
from pipeline.results.summary import summarize_results
from pipeline.source import DocumentReader, find_files, list_documents

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\u2066\u2028"
FULL = Path("/dev/full")
COMMANDS = [char for char in EVIL if not char.isprintable()]


def program(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)


# A job whose rows are there already, of which some failed: what it prints is a report of many lines.
FINISHED = """
import sys
from jobs import summarize
from jobs.cli import run_main
from pipeline.results.rows import Outcome, Row, result_schema
from pipeline.results.sink import Sink
from pipeline.results.store import Store
from pipeline.results.summary import summarize_results

def run(config):
    store = Store(config.output)
    store.create()
    sink = Sink(store, result_schema(), flush_documents=1, flush_seconds=1)
    outcome = Outcome(status=sys.argv[2], error="no" if sys.argv[2] == "error" else "")
    sink.add(Row(document_id="a", source="x", outcome=outcome))
    return summarize_results(store, 1)

import pipeline.job.job
pipeline.job.job.run = run
run_main(summarize.main, ["--input", "x", "--output", sys.argv[1], "--model", "m"])
"""


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("error", 2)])
@pytest.mark.parametrize("out", ["closed pipe", "full disk", "no output"])
def test_the_exit_code_is_that_of_the_rows_wherever_the_report_goes(
    tmp_path: Path, out: str, status: str, code: int
) -> None:
    with contextlib.ExitStack() as stack:
        if out == "full disk":
            options: dict[str, Any] = {"stdout": stack.enter_context(FULL.open("w"))}
        elif out == "closed pipe":
            reading, writing = os.pipe()
            os.close(reading)
            options = {"stdout": stack.enter_context(os.fdopen(writing, "w"))}
        else:
            options = {"preexec_fn": lambda: os.close(1)}
        with program(FINISHED, tmp_path / "out", status, **options) as process:
            _, err = process.communicate(timeout=patient(120))
    assert (process.returncode, err) == (code, "")


@pytest.mark.parametrize(("out", "code", "told"), [("pipe", 0, ""), ("disk", 1, "error: standard output cannot be")])
def test_other_commands_end_quietly_too(out: str, code: int, told: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with FULL.open("w") if out == "disk" else os.fdopen(writing, "w") as stream:
        talks = "from jobs.cli import run_main\nrun_main(lambda arguments: print('x' * 100_000) or 0)"
        with program(talks, stdout=stream) as process:
            _, err = process.communicate(timeout=patient(120))
    assert process.returncode == code
    assert err.startswith(told)
    assert err.count("\n") == bool(told)


SUMMARIZE = "import sys; from jobs import cli, summarize; cli.run_main(summarize.main, sys.argv[1:])"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """An address where somebody listens and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    kept.append(server.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        for connection in kept:
            connection.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_job_that_waits_for_a_store_answers_signals(
    tmp_path: Path, silent_server: str, scheme: str, number: int
) -> None:
    query = f"?endpoint_override={silent_server}&scheme=http"
    place = f"gs://anonymous@b/docs{query}" if scheme == "gs" else f"s3://a:b@b/docs{query}&region=us-east-1"
    flags = ["--input", place, "--output", tmp_path / "out", "--model", "models/tiny-reader"]
    # Where the tests themselves run under nohup, their children would ignore SIGHUP.
    heeded = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    with program(SUMMARIZE, *flags, stdout=subprocess.DEVNULL, preexec_fn=heeded) as process:
        wait_for_connection(process.pid, silent_server)
        begun = time.monotonic()
        process.send_signal(number)
        _, err = process.communicate(timeout=patient(60))
    assert (process.returncode, err) == (130, "stopped\n")
    assert time.monotonic() - begun < patient(10)


def wait_for_connection(pid: int, address: str) -> None:
    port = f":{int(address.rpartition(':')[2]):04X} 01"
    until = time.monotonic() + patient(60)
    while time.monotonic() < until:
        if port in Path(f"/proc/{pid}/net/tcp").read_text():
            time.sleep(0.3)
            return
        time.sleep(0.05)
    raise AssertionError("it did not connect")


def test_a_terminal_that_closes_stops_a_job_but_not_under_nohup() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in stop_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert signal.SIGHUP not in stop_signals()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_calls_that_were_interrupted_are_left_behind() -> None:
    begun, gate = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        gate.wait()

    def tell() -> None:
        begun.wait()
        os.kill(os.getpid(), signal.SIGALRM)

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        threading.Thread(target=tell).start()
        with pytest.raises(KeyboardInterrupt):
            interruptible(True, wait)
        assert left_behind()
    finally:
        signal.signal(signal.SIGALRM, before)
        gate.set()
    assert interruptible(True, lambda: threading.current_thread().name) == "remote"
    assert interruptible(False, lambda: threading.current_thread().name) == "MainThread"
    with pytest.raises(ZeroDivisionError):
        interruptible(True, lambda: 1 / 0)


def test_what_ends_a_job_is_not_broken_off_by_one_more_signal() -> None:
    with uninterrupted():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_command_that_was_stopped_hears_no_further_signal() -> None:
    """Ray has work to do when Python ends, and crashes where that is broken off."""
    code = (
        "import atexit, signal\n"
        "from jobs.cli import run_main\n"
        "def stopped(arguments):\n"
        "    raise KeyboardInterrupt\n"
        "atexit.register(lambda: (signal.raise_signal(signal.SIGINT), print('ended in peace')))\n"
        "run_main(stopped, [])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=patient(60))
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "ended in peace\n", "stopped\n")


def test_hugging_faces_store_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = ["--input", "hf://datasets/some/thing", "--output", "/tmp/none", "--model", "models/tiny-reader"]
    with program(SUMMARIZE, *flags, stdout=subprocess.DEVNULL) as process:
        _, err = process.communicate(timeout=patient(120))
    assert process.returncode == 1
    assert err.startswith("error: --input hf://datasets/some/thing: cannot be listed: ")
    assert err.count("\n") == 1


def test_names_do_not_command_the_terminal(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path / f"out{EVIL}"))
    store.create()
    sink = Sink(store, result_schema(), flush_documents=1, flush_seconds=1)
    sink.add(make_row(f"id{EVIL}", f"x{EVIL}", "error", f"why{EVIL}"))
    show(summarize_results(store, 1, messages=(f"told{EVIL}",)))
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.jsonl").write_text(json.dumps({"id": f"a{EVIL}", f"text{EVIL}": "t", "text": "t"}) + "\n")
    (docs / f"b{EVIL}.odt").write_text("x")
    flags = ["--input", docs, "--output", tmp_path / f"new{EVIL}", "--model", model]
    for more in (["--dry-run"], ["--text-column", f"no{EVIL}"], ["--id-column", "no"], ["--input", f"no{EVIL}"]):
        with pytest.raises(SystemExit):
            run_main(main, [str(item) for item in [*flags, *more]])
    Progress(1, 1, stream=sys.stderr).message(f"told{EVIL}")
    out, err = capsys.readouterr()
    assert "\\x1b" in out
    assert "\\x1b" in err
    assert not [char for char in out + err if char in COMMANDS]


def test_ordinary_text_stays_as_it_is() -> None:
    for text in ("ordinary", "naïve 港湾", "a\u00a0b", "two\nlines"):
        assert visible(text) == text


@pytest.mark.parametrize("target", ["file", "nothing", "folder"])
def test_a_lock_that_is_a_link_is_refused_and_its_target_stays(tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / target)
    with pytest.raises(JobError, match=r"\.lock .*is a link; remove it"):
        FolderLock(tmp_path / "out", "out").acquire()
    assert (tmp_path / "file").read_text() == "precious"
    assert not (tmp_path / "nothing").exists()


def test_a_lock_of_another_kind_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(JobError, match="is no ordinary file; remove it"):
        FolderLock(tmp_path, "out").acquire()
    (tmp_path / ".lock").unlink()
    (tmp_path / "file").write_text("precious")
    (tmp_path / ".lock").hardlink_to(tmp_path / "file")
    with pytest.raises(JobError, match="is no ordinary file; remove it"):
        FolderLock(tmp_path, "out").acquire()
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    "content",
    [
        [], 5, None, "x", {"format": 2}, {"format": 2, "fingerprints": []}, {"format": 1, "fingerprints": {}},
        {"format": 2, "fingerprints": {}, "config": []}, {"format": 2, "fingerprints": {}, "state": 5},
        {"format": 2, "fingerprints": {}, "documents": "many"}, {"format": 2, "fingerprints": {}, "seal": 0},
        {"format": 2, "fingerprints": {}, "versions": "x"}, {"format": [EVIL], "fingerprints": {}},
    ],
)  # fmt: skip
def test_a_manifest_of_other_types_is_refused_in_words(tmp_path: Path, content: Any) -> None:
    (tmp_path / manifest.NAME).write_text(json.dumps(content))
    with pytest.raises(JobError, match=r"manifest\.json is damaged \(.*--force writes a new one"):
        manifest.load(Store(str(tmp_path)))


def test_a_manifest_that_is_no_text_is_refused_in_words(tmp_path: Path) -> None:
    for data in (b"\xff", b"[" * 100_000, b"", b"{"):
        (tmp_path / manifest.NAME).write_bytes(data)
        with pytest.raises(JobError, match=r"manifest\.json is damaged"):
            manifest.load(Store(str(tmp_path)))


def test_inputs_that_raise_anything_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class OddError(Exception):
        """As clients of HTTP have."""

    def fails(location: str) -> Any:
        raise OddError(f"no\nnetwork {EVIL}")

    monkeypatch.setattr("pipeline.source.files._find", fails)
    with pytest.raises(JobError, match=r"cannot be listed: no network \\x1b"):
        find_files(("mock:///x",))


def test_a_store_that_raises_anything_while_a_document_is_read_costs_that_document(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = open_filesystem("mock:///odd/docs")
    files.create_dir("odd/docs", recursive=True)
    with files.open_output_stream("odd/docs/a.txt") as stream:
        stream.write(b"fine")
    document = list_documents(find_files(("mock:///odd/docs",))[0]).document(0)

    def fails(uri: str) -> Any:
        raise ZeroDivisionError("the client's own\nmistake")

    assert DocumentReader("text", []).read(document)[0] == "fine"
    monkeypatch.setattr("pipeline.source.streams.open_filesystem", fails)
    with pytest.raises(DocumentError, match="cannot be read: the client's own mistake"):
        DocumentReader("text", []).read(document)
