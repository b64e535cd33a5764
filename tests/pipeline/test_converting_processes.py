"""The processes that convert: whatever a parser does there costs its document alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import patient

from pipeline.errors import DocumentError
from pipeline.imports import ROOT
from pipeline.source import processes
from pipeline.source.processes import Converters

FAKE = "fake_converter"  # beside this file, which is on sys.path


@pytest.fixture
def converters() -> Iterator[Converters]:
    made = Converters(patient(20), 0.25)
    yield made
    made.close()


def ask(converters: Converters, what: str) -> str:
    return converters.convert(FAKE, what.encode(), "utf-8").text


def told(converters: Converters, what: str) -> str:
    with pytest.raises(DocumentError) as raised:
        ask(converters, what)
    return str(raised.value)


def test_a_process_is_kept_for_the_next_document(converters: Converters) -> None:
    one, other = ask(converters, "a"), ask(converters, "b")
    assert one.split()[0] == other.split()[0] != str(os.getpid())
    assert told(converters, "refuse it is no file") == "it is no file"
    assert told(converters, "raise x") == "it cannot be read: KeyError: 'x'"
    assert ask(converters, "print 5") == one[:-1] + "print", "what a parser prints is no answer"
    assert "cannot be read: OSError" in told(converters, f"write /tmp/{os.getpid()}-none")
    assert ask(converters, "c").split()[0] == one.split()[0]


@pytest.mark.parametrize("how", ["sleep 600", "spin"])
def test_a_parser_that_hangs_is_ended(how: str) -> None:
    converters = Converters(1.0, 0.25)
    ask(converters, "warm")
    begin = time.monotonic()
    assert told(converters, how) == (
        "it was not converted within 1 s; --conversion-seconds gives it more, or split the file"
    )
    assert time.monotonic() - begin < patient(5)
    assert ask(converters, "after").endswith("after")
    converters.close()


def test_a_process_that_does_not_even_start_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.5)
    stopped = Converters(0.5, 0.25)
    real = subprocess.Popen

    def sleeping(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        return real(["sleep", "600"], **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(subprocess, "Popen", sleeping)
    assert "not converted within 0.5 s" in told(stopped, "a")


@pytest.mark.parametrize(("how", "ending"), [("crash", "SIGSEGV"), ("exit", "exit code 3")])
def test_a_parser_that_crashes_is_told(converters: Converters, how: str, ending: str) -> None:
    for _ in range(2):
        assert told(converters, how) == (
            f"its parser crashed ({ending}), as damaged files and too little memory make it; repair the file, or give "
            "--conversion-memory more than 0.25 GiB"
        )
        assert ask(converters, "after").endswith("after")


def test_a_document_that_needs_too_much_memory_is_told(converters: Converters) -> None:
    assert told(converters, f"eat {1 << 30}") == (
        "it needs more than 0.25 GiB of memory to be converted; --conversion-memory gives it more"
    )
    assert ask(converters, "after").endswith("after")


def test_what_others_left_in_a_process_costs_no_document(converters: Converters) -> None:
    """Two that need 100 MiB each and leak it: a process of 256 MiB ends at the second one, and a new one reads it."""
    found = {ask(converters, f"eat {100 << 20}").split()[0] for _ in range(4)}
    assert len(found) > 1


def test_a_process_gives_way_to_a_new_one(converters: Converters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MOST_DOCUMENTS", 2)
    found = [ask(converters, "a").split()[0] for _ in range(4)]
    assert found[0] == found[1] != found[2] == found[3]


def test_documents_are_converted_together_up_to_a_bound(converters: Converters) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(ask(converters, "sleep 0.5"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({text.split()[0] for text in found}) == processes.TOGETHER
    assert len(found) == 6


ORPHAN = """
import sys
from pipeline.source.processes import Converters
converters = Converters(float(sys.argv[1]), 0.25)
print(converters.convert("fake_converter", b"a", "utf-8").text.split()[0], flush=True)
converters.convert("fake_converter", sys.argv[2].encode(), "utf-8")
print("idle", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("busy", [False, True])
def test_no_process_outlives_a_worker_that_was_killed(busy: bool) -> None:
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    command = [sys.executable, "-c", ORPHAN, "3", "spin" if busy else "b"]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout
        child = int(worker.stdout.readline())
        if not busy:
            worker.stdout.readline()
        worker.send_signal(signal.SIGKILL)
    end = time.monotonic() + patient(10)
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < end, "it runs on"
        time.sleep(0.1)
