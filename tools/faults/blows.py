"""A job whose worker, driver and both halves of Ray are killed in turn, in mid-work."""

from __future__ import annotations

import contextlib
import random
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.faults import processes
from tools.faults.corpus import Count
from tools.faults.runs import ENDING_SECONDS, Place, prepare

# What `blows` strikes, and what its processes are called.
VICTIMS = {"worker": "", "driver": "", "raylet": "/raylet", "gcs": "/gcs_server"}


@dataclass(frozen=True)
class Blow:
    """A kill in mid-work. lines: what the driver printed after it; where Ray was hit, one of them is an error."""

    victim: str
    code: int | None
    seconds: float
    lines: tuple[str, ...]

    @property
    def problem(self) -> str:
        """What is not as it should be, empty if all is."""
        errors = [line for line in self.lines if line.startswith("error: ")]
        if self.victim not in ("raylet", "gcs"):
            return ""
        if self.code != 1 or len(errors) != 1 or self.lines[-1] != errors[0]:
            return f"exit code {self.code}, last lines {self.lines[-2:]}"
        noise = [line for line in self.lines[:-1] if "/s ·" not in line and " workers ready" not in line]
        return f"it printed more: {noise[:2]}" if noise else ""


def blows(
    folder: Path, victims: Sequence[str], *, documents: int, workers: int = 2, seed: int = 0, **job: Any
) -> tuple[list[Blow], Count]:
    """Run a job to its end while its worker, driver, raylet or control service is killed, one after another."""
    chance, struck = random.Random(seed), []
    place = prepare(folder, documents, workers, **job)
    todo = list(victims)
    while todo:
        with processes.driver(place.arguments, place.log, place.engine_log) as driver:
            while todo and driver.poll() is None:
                _wait_for_work(place, driver, chance.uniform(0.2, 2.0))
                victim = todo.pop(0)
                struck.append(_blow(place, driver, victim))
                print(f"{victim}: {struck[-1].problem or 'as it should be'}", flush=True)
            if driver.wait() in (0, 2):
                break  # there was nothing left to do
    with processes.driver(place.arguments, place.log, place.engine_log) as driver:
        driver.wait()
    return struck, place.count()


def _wait_for_work(place: Place, driver: subprocess.Popen[bytes], seconds: float) -> None:
    """Until documents are taken, and for some time more; or the driver ends."""
    taken = place.taken
    while place.taken == taken and driver.poll() is None:
        time.sleep(0.05)
    with contextlib.suppress(subprocess.TimeoutExpired):
        driver.wait(seconds)


def _blow(place: Place, driver: subprocess.Popen[bytes], victim: str) -> Blow:
    below, before, begun = processes.descendants(driver.pid), place.log.stat().st_size, time.monotonic()
    if victim == "worker":
        processes.kill((processes.workers(driver.pid) or [driver.pid])[0])
        return Blow(victim, None, 0.0, ())
    named = [pid for pid in below if processes.name(pid).partition(" ")[0].endswith(VICTIMS[victim])]
    processes.kill(driver.pid if victim == "driver" else named[0])
    driver.wait(150)
    seconds = time.monotonic() - begun
    processes.left_over(below, ENDING_SECONDS, ending=processes.AGENTS)
    lines = place.log.read_bytes()[before:].decode(errors="replace").splitlines()
    return Blow(victim, driver.returncode, seconds, tuple(lines))
