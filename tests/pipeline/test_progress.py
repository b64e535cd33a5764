"""What people see while a job runs: on terminals of any width, in logs, and when nobody looks any more."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import struct
import termios
import time
from pathlib import Path
from typing import Any, TextIO

import pytest
from fake_engine import FakeEngine
from result_rows import make_row

from pipeline import summarize
from pipeline.engine.config import EngineConfig, SoFar
from pipeline.errors import JobError
from pipeline.job.job import run
from pipeline.job.progress import TERMINAL_EVERY, Progress
from pipeline.results.rows import Row
from pipeline.settings.config import JobConfig

OK = {"prompt_tokens": 1_234_000, "output_tokens": 567, "prefill_seconds": 120 / 49}


class Screen:
    """A terminal: `stream` to write to, and what was written."""

    def __init__(self, columns: int) -> None:
        self._master, slave = os.openpty()
        self.stream: TextIO = os.fdopen(slave, "w")
        self.resize(columns)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def read(self) -> str:
        os.set_blocking(self._master, False)
        text = b""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._master, 65536):
                text += chunk
        return text.decode()

    def hang_up(self) -> None:
        os.close(self._master)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def capable_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


def row(status: str = "ok") -> Row:
    return make_row("d", "d.txt", status, **(OK if status == "ok" else {}))


def running(stream: TextIO, clock: Clock) -> Progress:
    progress = Progress(200, 200_000, stream=stream, clock=clock)
    progress.workers(2, 0, 8)
    progress.start_clock()
    clock.now += 60.0
    for _ in range(49):
        progress.add([row()], 1000)
    progress.add([row("oom")], 1000)
    return progress


def redrawn(text: str) -> list[str]:
    """The states of the live line."""
    return text.split("\r\x1b[2K")[1:]


FULL = "50/200 documents · 60,493,783 tokens · 1,008,230 tokens/s · 1 failed · about 3:04 left"


def test_a_wide_terminal_has_one_line_that_renews_itself(clock: Clock) -> None:
    screen = Screen(120)
    progress = running(screen.stream, clock)
    for _ in range(3):
        clock.now += 0.5
        progress.tick()
    lines = redrawn(screen.read())
    assert len(lines) == 3
    assert lines[0].startswith("50/200 documents · 60,493,783 tokens · ")
    assert not any("\n" in line for line in lines)
    assert progress.line().count(" · ") == 4


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (len(FULL) + 1, FULL),
        (len(FULL), "50/200 documents · 1,008,230 tokens/s · 1 failed · about 3:04 left"),
        (60, "50/200 documents · 1 failed · about 3:04 left"),
        (40, "50/200 documents · 1 failed"),
        (20, "50/200 documents"),
        (10, "50/200 do"),
    ],
)
def test_a_narrow_terminal_gets_what_matters_most_in_one_line(clock: Clock, columns: int, expected: str) -> None:
    screen = Screen(columns)
    progress = running(screen.stream, clock)
    progress.tick()
    assert redrawn(screen.read()) == [expected]


def test_the_width_is_that_of_the_moment_and_a_terminal_without_one_has_80_columns(clock: Clock) -> None:
    screen = Screen(200)
    progress = running(screen.stream, clock)
    for columns in (200, 30, 0):
        screen.resize(columns)
        clock.now += 0.5
        progress.tick()
    wide, narrow, unknown = (len(line) for line in redrawn(screen.read()))
    assert narrow < 30 < unknown < 80 < wide


def test_while_workers_start_that_is_what_it_says(clock: Clock) -> None:
    progress = Progress(12, 1000, stream=io.StringIO(), clock=clock)
    progress.workers(0, 2, 0)
    clock.now = 95.0
    assert progress.line() == "0/12 documents · starting 2 workers for 1:35 · a large model takes minutes"
    assert progress.line(50) == "0/12 documents · starting 2 workers for 1:35"
    progress.workers(1, 1, 4)
    progress.start_clock()
    clock.now += 10.0
    assert progress.line() == "0/12 documents · 4 in work for 0:10 · 1 of 2 workers ready"
    progress.workers(2, 0, 8)
    progress.add([row("error")], 10)
    assert progress.line() == "1/12 documents · 8 in work for 0:10 · 1 failed"
    progress.workers(0, 1, 0)
    assert progress.line().endswith("0 of 1 workers ready"), "all were lost"


def test_what_is_read_of_documents_in_work_counts(clock: Clock) -> None:
    progress = Progress(2, 2_000_000, stream=io.StringIO(), clock=clock)
    progress.workers(1, 0, 2)
    progress.start_clock()
    clock.now += 60.0
    progress.reading({"d": SoFar(90_000, 0), "e": SoFar(10_000, 0)})
    assert progress.line() == "0/2 documents · 100,000 tokens · 1,667 tokens/s"
    progress.reading({"d": SoFar(99_000, 100, 59.0, 1.0, 1_000_000), "e": SoFar(0, 0, 0.0, 0.0, 1_000_000)})
    assert progress.line().endswith(" · at most 1:03 left"), "no output has ended; both may come to 256 tokens"
    progress.add([make_row("d", "d.txt", prompt_tokens=99_000, output_tokens=1_000)], 1_000_000)
    assert progress.line().startswith("1/2 documents · 100,000 tokens · ")
    assert " · about " in progress.line()


def test_it_knows_how_long_outputs_can_be(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(documents: int, total_bytes: int, *, most: int) -> Progress:
        raise JobError(f"at most {most} tokens")

    monkeypatch.setattr("pipeline.job.job.Progress", told)
    monkeypatch.setattr("pipeline.api.Progress", told)
    (tmp_path / "a.txt").write_text("A text.")
    settings: Any = {"model": str(model), "device": "cpu", "question": ["What?", "Why?"], "max_new_tokens": 20}
    with pytest.raises(JobError, match="at most 40 tokens"):
        run(JobConfig(input=str(tmp_path), output=str(tmp_path / "out"), **settings))
    with pytest.raises(JobError, match="at most 40 tokens"):
        summarize(["A text."], **settings, engine_factory="fake_engine:FakeEngine", progress=True)


@pytest.mark.parametrize("dumb", [False, True])
def test_a_log_has_plain_lines_of_any_length(clock: Clock, dumb: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(40)
    if dumb:
        monkeypatch.setenv("TERM", "dumb")
    stream = screen.stream if dumb else io.StringIO()
    progress = running(stream, clock)
    progress.message("worker 0 lost")
    progress.tick()
    progress.tick()
    progress.finish()
    text = screen.read().replace("\r\n", "\n") if dumb else stream.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in text
    assert "\r" not in text
    first, *told = text.splitlines()
    assert first == "worker 0 lost"
    assert len(told) == 2
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d " + re.escape(FULL), line) for line in told)


def test_messages_take_the_place_of_the_live_line_and_the_last_word_ends_it(clock: Clock) -> None:
    screen = Screen(200)
    progress = running(screen.stream, clock)
    progress.tick()
    progress.message("worker 0 lost")
    progress.finish()
    assert screen.read() == f"\r\x1b[2K{FULL}\r\x1b[2Kworker 0 lost\r\n\r\x1b[2K{FULL}\r\n"
    idle = Progress(3, 10, stream=screen.stream, clock=clock)
    idle.finish()
    assert screen.read() == "", "nothing was done and nothing shown"


def test_a_terminal_that_is_gone_does_not_end_the_job(clock: Clock) -> None:
    screen = Screen(80)
    progress = running(screen.stream, clock)
    screen.hang_up()
    progress.tick()
    progress.message("still there")
    progress.finish()
    with pytest.raises(OSError, match="Input/output error"):
        screen.stream.flush()  # so it was written to


class LateEngine(FakeEngine):
    """Starts so slowly that one sees it."""

    def __init__(self, config: EngineConfig) -> None:
        time.sleep(2 * TERMINAL_EVERY)
        super().__init__(config)


@pytest.mark.usefixtures("ray_here")
def test_a_job_on_a_terminal_whose_disk_is_full_at_the_end(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen(50)
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("SLOW " * 8)

    def full(*arguments: object) -> None:
        raise JobError("the disk is full")

    monkeypatch.setattr("pipeline.results.sink.Sink._write", full)
    config = JobConfig(input=str(tmp_path), output=str(tmp_path / "out"), model=str(model), device="cpu", workers=1)  # type: ignore[arg-type]
    with pytest.raises(JobError, match="the disk is full"):
        run(config, engine_factory=f"{__name__}:LateEngine", progress=Progress(3, 120, stream=screen.stream))
    lines = redrawn(screen.read())
    assert all(len(line) < 50 for line in lines if not line.endswith("\r\n"))
    assert any(line.startswith("0/3 documents · starting 1 worker for 0:0") for line in lines)
    assert re.fullmatch(r"3/3 documents · .*\r\n", lines[-1]), "the error that follows has a line of its own"
