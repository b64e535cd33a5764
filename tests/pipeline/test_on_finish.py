"""--on-finish: what a command and a web address get, and that nothing they do touches the job."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from result_rows import make_row

from pipeline.errors import JobError
from pipeline.job import job as job_module
from pipeline.job.manifest import config_values
from pipeline.job.on_finish import broken_off, finished, notify
from pipeline.results.rows import result_schema
from pipeline.results.sink import Sink
from pipeline.results.store import Store
from pipeline.results.summary import summarize_results
from pipeline.settings.config import JobConfig

SECRET = "hf_" + "a1B2" * 8
Received = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def told(tmp_path: Path) -> dict[str, Any]:
    """The summary of a job with an output and a failure that names a secret."""
    store = Store(str(tmp_path / "results"))
    store.create()
    sink = Sink(store, result_schema(), flush_documents=10, flush_seconds=1)
    sink.add(make_row("a", "x", "ok", output="out", prompt_tokens=50, output_tokens=3, flags=["cut"]))
    sink.add(make_row("b", "x", "error", f"no such key {SECRET}"))
    sink.flush()
    return finished(summarize_results(store, 3))


class Server:
    """A web server that keeps what it gets, and answers with `codes` in turn (the last one from then on)."""

    def __init__(self, *codes: int, location: str = "") -> None:
        self.received: Received = []
        left = list(codes)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.received.append((f"{self.path} {self.headers['Content-Type']}", json.loads(body)))
                self.send_response(left.pop(0) if len(left) > 1 else left[0])
                if location:
                    self.send_header("Location", location)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None: ...

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}/services/T0/very-secret"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Any]:
    made: list[Server] = []

    def make(*codes: int, location: str = "") -> Server:
        made.append(Server(*codes, location=location))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_command_gets_the_summary_and_the_environment(tmp_path: Path, told: dict[str, Any]) -> None:
    messages: list[str] = []
    command = f"cat > {tmp_path}/summary; echo $STEMLINE_STATUS $STEMLINE_FAILED $HOME > {tmp_path}/environment"
    notify(command, told, messages.append)
    assert messages == []
    summary = json.loads((tmp_path / "summary").read_text())
    assert summary == told
    assert (summary["status"], summary["exit_code"], summary["ok"], summary["missing"]) == ("some_failed", 2, 1, 1)
    assert summary["flags"] == {"cut": 1}
    assert summary["first_errors"] == [{"document": "b", "status": "error", "error": "no such key ***"}]
    assert (tmp_path / "environment").read_text() == f"some_failed 1 {os.environ['HOME']}\n"


def test_secrets_are_in_none_of_it(told: dict[str, Any]) -> None:
    assert SECRET not in json.dumps(told)
    failed = broken_off("out", JobError(f"the hub refused {SECRET}"))
    assert (failed["status"], failed["exit_code"], failed["error"]) == ("failed", 1, "the hub refused ***")


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("exit 3", "the command ended with exit code 3"),
        ("no-such-program-here 2>/dev/null", "the command ended with exit code 127"),
        ("kill -9 $$", "the command ended with signal 9"),
        ("exec sleep 60", "the command was ended after 0.5 s"),
        ("sleep 60 & wait", "the command was ended after 0.5 s"),
    ],
)
def test_a_command_that_fails_is_one_line(told: dict[str, Any], command: str, problem: str) -> None:
    messages: list[str] = []
    begun = time.monotonic()
    notify(command, told, messages.append, command_seconds=0.5)
    assert messages == [f"--on-finish: {problem}; the results are not concerned"]
    assert time.monotonic() - begun < 30


def test_what_a_command_started_ends_with_it(tmp_path: Path, told: dict[str, Any]) -> None:
    notify(f"(sleep 60 & echo $! > {tmp_path}/pid; wait)", told, lambda message: None, command_seconds=1.0)
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("it still runs")


def test_a_summary_larger_than_a_pipe_goes_to_a_command_that_reads_none_of_it() -> None:
    messages: list[str] = []
    notify("true", broken_off("out", JobError("x")) | {"error": "y" * 1_000_000}, messages.append)
    assert len(messages) == 1, "an environment of a megabyte"
    assert "the command cannot be started" in messages[0]
    notify("true", {"status": "ok", "much": "y" * 1_000_000}, messages.append)
    assert len(messages) == 1


def test_an_address_gets_one_request(told: dict[str, Any], server: Any) -> None:
    hook, messages = server(204), []
    notify(hook.address, told, messages.append)
    assert messages == []
    assert hook.received == [("/services/T0/very-secret application/json", told)]


def test_a_request_is_tried_twice_and_the_address_stays_secret(told: dict[str, Any], server: Any) -> None:
    hook, messages = server(503, 200), []
    notify(hook.address, told, messages.append, pause_seconds=0.0)
    assert (len(hook.received), messages) == (2, [])
    hook = server(500)
    notify(hook.address, told, messages.append, pause_seconds=0.0)
    assert len(hook.received) == 2
    assert "http://127.0.0.1: the server answered 500" in messages[0]
    notify("http://127.0.0.1:1/services/very-secret", told, messages.append, pause_seconds=0.0)
    assert "it cannot be reached: [Errno 111] Connection refused" in messages[1]
    notify("https://a b/very-secret", told, messages.append, pause_seconds=0.0)
    assert "it cannot be reached" in messages[2]
    assert not any("very-secret" in message for message in messages)


def test_a_redirect_is_not_followed(told: dict[str, Any], server: Any) -> None:
    other, messages = server(200), []
    notify(server(302, location=other.address).address, told, messages.append, pause_seconds=0.0)
    assert other.received == []
    assert "the server answered 302" in messages[0]


def test_a_server_that_never_ends_its_answer_does_not_keep_the_job(told: dict[str, Any]) -> None:
    listening = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        while True:
            connection, _ = listening.accept()
            try:
                while True:
                    connection.sendall(b"x")
                    time.sleep(0.1)
            except OSError:
                connection.close()

    threading.Thread(target=drip, daemon=True).start()
    messages: list[str] = []
    begun = time.monotonic()
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    notify(address, told, messages.append, post_seconds=0.5, pause_seconds=0.0)
    assert messages == ["--on-finish http://127.0.0.1: no answer in 0.5 s; the results are not concerned"]
    assert time.monotonic() - begun < 10


def test_a_job_tells_its_end_whatever_that_is(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    out = tmp_path / "out"
    settings: dict[str, Any] = {"input": (str(tmp_path / "a.txt"),), "model": str(model), "device": "cpu"}
    config = JobConfig(output=str(out), on_finish=f"cat > {tmp_path}/told; exit 7", **settings)
    report = job_module.run(config)
    assert report.exit_code == 2, "the one document is empty: no worker was needed, and 7 is the hook's own"
    assert json.loads((tmp_path / "told").read_text())["status"] == "some_failed"
    assert "--on-finish: the command ended with exit code 7" in capsys.readouterr().err
    with pytest.raises(JobError, match="it was made with another"):
        job_module.run(JobConfig(output=str(out), on_finish=f"cat > {tmp_path}/told", max_new_tokens=3, **settings))
    failed = json.loads((tmp_path / "told").read_text())
    assert (failed["status"], failed["output"]) == ("failed", str(out))
    assert "it was made with another" in failed["error"]


def test_neither_the_address_nor_the_command_is_kept(tmp_path: Path) -> None:
    config = JobConfig(input=("a",), output="b", model="c", on_finish="https://hooks.example/very-secret")
    assert "very-secret" not in json.dumps(config_values(config))
