"""A driver as a process of its own, the processes below it, their memory and their end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipeline.imports import ROOT

WORKER = "ray::Worker"
# Names the file in which engines note the documents that they take.
LOG = "STEMLINE_FAULTS_LOG"
# What a driver may be told: this machine's resources, and how its workers share it with others. Other settings of Ray
# here are not for it.
TOLD = ("RAY_OVERRIDE_RESOURCES", "RAY_worker_niceness")
# Ray's own two agents end by themselves a minute after a driver; all else goes with it. They take the first two names
# when they are up.
AGENTS = ("DashboardAgent", "RuntimeEnvAgent", "dashboard/agent.py", "runtime_env/agent/main.py")
# How long a driver that is asked to stop may take.
PATIENCE = 15.0


@contextlib.contextmanager
def driver(arguments: list[str], log: Path, engine_log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """tools.faults.driver in a session of its own; its output is appended to `log`. Stopped at the end of the block."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_") or key in TOLD}
    environment |= {LOG: str(engine_log), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.faults.driver", *arguments],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:  # a Ctrl-C does not reach it
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()


def descendants(pid: int) -> list[int]:
    """All processes below `pid`; none if it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [process.pid for process in psutil.Process(pid).children(recursive=True)]
    return []


def workers(pid: int) -> list[int]:
    """A driver's worker processes (it started the cluster, so they are below it)."""
    return [pid for pid in descendants(pid) if name(pid).startswith(WORKER)]


def name(pid: int) -> str:
    """What a process calls itself, or its command; empty if it is gone."""
    with contextlib.suppress(psutil.Error):
        return " ".join(psutil.Process(pid).cmdline())[:200]
    return ""


def memory_mib(pid: int) -> float:
    """Resident memory of a process; 0 if it is gone."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).memory_info().rss / (1 << 20)
    return 0.0


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Signal a process; whether it was there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def left_over(pids: list[int], seconds: float, ending: tuple[str, ...] = ()) -> list[str]:
    """Names of those of `pids` that are still running after at most `seconds`; not of those named as in `ending`."""
    until = time.monotonic() + seconds
    while True:
        alive = [name(pid) for pid in pids if _running(pid)]
        alive = [text for text in alive if not any(word in text for word in ending)]
        if not alive or time.monotonic() > until:
            return alive
        time.sleep(0.2)


def _running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
