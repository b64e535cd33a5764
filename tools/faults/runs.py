"""The long runs: kills, restarts, soak."""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import JobError
from tools.faults import processes
from tools.faults.corpus import Count, count_rows, write_documents, write_model

# In-flight documents of a worker (decoded together, and ahead of that), and rows that wait to be written.
LIVE, AHEAD, FLUSH = 8, 2, 64
# Ray's processes end with their driver; one that was only starting tries for a minute to reach the others.
ENDING_SECONDS = 90.0


@dataclass
class Outcome:
    """What a run did to a job, and what became of it. Memory in MiB."""

    worker_kills: int = 0
    driver_kills: int = 0
    runs: int = 0
    refused: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    driver_memory: list[tuple[float, float]] = field(default_factory=list)  # of each run: after its start, at its end
    seconds: float = 0.0
    count: Count | None = None

    @property
    def recomputed_bound(self) -> int:
        """The most that can have been computed again: what was in flight, and rows that waited to be written."""
        return self.worker_kills * (LIVE + AHEAD) + self.driver_kills * (2 * (LIVE + AHEAD) + FLUSH)


@dataclass(frozen=True)
class Place:
    """Where a run has its files."""

    folder: Path
    ids: list[str]
    arguments: list[str]

    @property
    def output(self) -> Path:
        return self.folder / "out"

    @property
    def engine_log(self) -> Path:
        return self.folder / "engine.log"

    @property
    def taken(self) -> int:
        """Bytes in the engines' log; more of them mean that documents were taken."""
        return self.engine_log.stat().st_size if self.engine_log.exists() else 0

    @property
    def documents_taken(self) -> int:
        """How many times an engine took a document."""
        return self.engine_log.read_bytes().count(b"\n") if self.engine_log.exists() else 0

    @property
    def log(self) -> Path:
        return self.folder / "driver.log"

    def count(self) -> Count:
        """The rows as they are now."""
        return count_rows(self.output, self.ids, self.engine_log)


def refuse_used(folder: Path) -> None:
    """Raise JobError if a folder holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise JobError(f"--folder {folder}: it is not empty; give another")


def prepare(
    folder: Path, documents: int, workers: int, *, model: Path | None = None, words: int = 12, **flags: object
) -> Place:
    """Documents, model and command line of a job in an empty folder. model: copied; None is a small random one."""
    refuse_used(folder)
    ids = write_documents(folder / "docs", documents, words)
    if model is None:
        write_model(folder / "model")
    else:
        shutil.copytree(model, folder / "model")
    values: dict[str, object] = {"input": folder / "docs", "output": folder / "out", "model": folder / "model"}
    values |= {"workers": workers, "device": "cpu", "max_new_tokens": 8, "max_context": 256, "max_live": LIVE}
    values |= {"flush_documents": FLUSH, "flush_seconds": 2} | flags
    return Place(folder, ids, [f"--{name.replace('_', '-')}={value}" for name, value in values.items()])


def kills(
    folder: Path, *, documents: int, workers: int = 2, worker_every: float, driver_every: float, seed: int = 0,
    first_kill: tuple[float, float] | None = None, max_driver_kills: int = 1 << 30, max_seconds: float = 7200.0,
    **job: Any,
) -> Outcome:  # fmt: skip
    """Run a job to its end while workers and driver are killed with SIGKILL; each time the driver starts again.

    worker_every, driver_every: seconds between kills, as long as documents are being taken: on a busy machine a process
    may need longer to start than it is given to live, and nothing would ever get done. first_kill: draw the driver's
    time from this range instead, counted from its start. job: model and flags, as for `prepare`.
    """
    chance, outcome, begun = random.Random(seed), Outcome(), time.monotonic()
    place = prepare(folder, documents, workers, **job)
    next_worker = begun + worker_every
    while time.monotonic() - begun < max_seconds:
        life = chance.uniform(*first_kill) if first_kill else driver_every
        may_kill = outcome.driver_kills < max_driver_kills
        outcome.runs += 1
        with processes.driver(place.arguments, place.log, place.engine_log) as driver:
            end = time.monotonic() + life if first_kill else float("inf")
            early = late = 0.0
            taken = taken_at_kill = place.taken
            while driver.poll() is None:
                time.sleep(0.1)
                now = time.monotonic()
                late = processes.memory_mib(driver.pid) or late
                running = processes.workers(driver.pid) if now >= next_worker or not early else []
                early = early or (late if running else 0.0)
                if place.taken > taken and end == float("inf"):
                    end = now + life
                if now >= next_worker and running and place.taken > taken_at_kill:
                    taken_at_kill = place.taken
                    outcome.worker_kills += processes.kill(chance.choice(running))
                    next_worker = now + worker_every
                if may_kill and now >= end:
                    below = processes.descendants(driver.pid)
                    if processes.kill(driver.pid):
                        outcome.driver_kills += 1
                        driver.wait()
                        outcome.left_over += processes.left_over(below, ENDING_SECONDS, ending=processes.AGENTS)
                    break
        outcome.driver_memory.append((early, late))
        code = driver.wait()
        if code in (0, 2):
            break
        if code == 1:
            outcome.refused.append(place.log.read_text().strip().splitlines()[-1])
            if len(outcome.refused) > 20:
                break
    outcome.seconds = time.monotonic() - begun
    outcome.count = place.count()
    return outcome


@dataclass(frozen=True)
class Sample:
    """Memory in MiB at a moment of a soak. taken: documents that engines were given by then."""

    seconds: float
    driver: float
    workers: tuple[float, ...]
    taken: int


def soak(
    folder: Path, *, minutes: float, workers: int = 2, documents: int = 400_000, **job: Any
) -> tuple[list[Sample], Count]:
    """Work for `minutes` without a pause, then stop with SIGTERM; memory every half minute, and the rows."""
    place = prepare(folder, documents, workers, **job)
    samples: list[Sample] = []
    begun = 0.0
    with processes.driver(place.arguments, place.log, place.engine_log) as driver:
        while driver.poll() is None and (not begun or time.monotonic() - begun < 60 * minutes):
            running = processes.workers(driver.pid)
            taken = place.documents_taken
            if taken and not begun:
                begun = time.monotonic()
            if begun:
                memory = tuple(processes.memory_mib(pid) for pid in sorted(running))
                samples.append(Sample(time.monotonic() - begun, processes.memory_mib(driver.pid), memory, taken))
            time.sleep(30.0 if begun else 1.0)
    return samples, place.count()
