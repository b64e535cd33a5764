"""Each fault once, on a small job of its own with the real engine: what was lost, doubled, computed again."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import read_results
from pipeline.errors import JobError, nearest
from tools.faults import processes
from tools.faults.corpus import Count
from tools.faults.runs import AHEAD, LIVE, Place, prepare

# As in tools.faults.engines, which needs torch and is not imported here.
VICTIM, BAD_WORD = "victim", "BADTOKEN"
IN_FLIGHT = LIVE + AHEAD
# (documents, words in the shortest) where a worker is hurt, and where the driver is, which must still have work then.
FEW, MANY = (24, 150), (400, 40)
VICTIM_WORDS = 600
PART = 32
# What `ray job stop` gives between SIGTERM and SIGKILL, in seconds.
STOP_SECONDS = 3.0


@dataclass(frozen=True)
class Fault:
    """Something that happens to a job.

    engine: of tools.faults.engines. status: of the document "victim" in the end. mark: the file beside the model that
    tells that the fault happened. again: most documents that may be computed again. to_driver: a signal for the
    driver, after which the job is run once more. word: in the victim's text. flags: of the job.
    """

    name: str
    about: str
    engine: str = "CountingEngine"
    status: str = "ok"
    mark: str = ""
    again: int = IN_FLIGHT
    to_driver: int = 0
    word: str = ""
    flags: dict[str, Any] = field(default_factory=dict)


UNWRITTEN = {"flush_documents": 100_000, "flush_seconds": 100_000}
FAULTS = {
    fault.name: fault
    for fault in (
        Fault("prefill", "kill -9 of a worker in prefill", "DiesInPrefill", mark="prefill.once"),
        Fault("decode", "kill -9 of a worker in decode", "DiesInDecode", mark="decode.once"),
        Fault(
            "results", "kill -9 of a worker between result and write", "DiesAfterResults", mark="results.once",
            flags=UNWRITTEN,
        ),
        Fault(
            "killer", "a document that kills its worker each time", "DiesOfVictim", "worker_died",
            again=IN_FLIGHT + 1, flags={"max_attempts": 2},
        ),
        Fault(
            "hang", "a document that hangs its worker", "Hangs", "timeout", again=IN_FLIGHT + 1,
            flags={"deadline": 15.0, "grace": 2.0},
        ),
        Fault("tokenizer", "a tokenizer that raises on a document", "BadTokenizer", "error", again=0, word=BAD_WORD),
        Fault(
            "oom", "out of memory on a document", "ShortOfMemory", again=1, flags={"chunk_tokens": 512},
        ),
        Fault(
            "oom-always", "out of memory on a document, in small steps too", "ShortOfMemory", "oom", again=1,
            flags={"chunk_tokens": 1024},
        ),
        Fault(
            "driver", "kill -9 of the driver, then the same command again", again=IN_FLIGHT + PART,
            to_driver=signal.SIGKILL, flags={"flush_documents": PART},
        ),
        Fault(
            "sigterm", "SIGTERM, kill -9 after 3 s, the same command again", to_driver=signal.SIGTERM, flags=UNWRITTEN
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Tried:
    """What became of a job. problem: what is not as it should be, empty if all is."""

    fault: Fault
    count: Count
    seconds: float
    problem: str


def choose(names: Sequence[str]) -> list[Fault]:
    """Faults by name, all if there are none. Raises JobError for a name that is not one."""
    for name in names:
        if name not in FAULTS:
            raise JobError(f"--only {name}: no such fault{nearest(name, FAULTS)}; there are {', '.join(FAULTS)}")
    return [FAULTS[name] for name in names or FAULTS]


def table(folder: Path, faults: Sequence[Fault], *, at_once: int = 1, limit: float = 600.0, **job: Any) -> list[Tried]:
    """Try faults, so many at a time, each in a folder of its own and for at most `limit` seconds.

    A line is printed for each when it is done. job: as for `prepare`.
    """
    tried = []
    with ThreadPoolExecutor(at_once) as pool:
        for future in as_completed(
            [pool.submit(try_fault, fault, folder / fault.name, limit, **job) for fault in faults]
        ):
            tried.append(future.result())
            about = tried[-1]
            print(f"{about.fault.about}: {about.problem or 'as it should be'} ({about.seconds:.0f} s)", flush=True)
    return sorted(tried, key=lambda one: faults.index(one.fault))


def try_fault(fault: Fault, folder: Path, limit: float, **job: Any) -> Tried:
    """Run a job with a fault to its end, or until it has taken `limit` seconds."""
    begun = time.monotonic()
    until = begun + limit
    documents, words = MANY if fault.to_driver else FEW
    flags: dict[str, Any] = {
        "max_context": 4096,
        "chunk_tokens": 256,
        "max_new_tokens": 16,
        "question": "List the key findings.",
    }
    place = prepare(folder, documents, 1, words=words, **(flags | fault.flags | {"engine": fault.engine} | job))
    text = " ".join(["The harbour committee met."] * (VICTIM_WORDS // 4))
    text += f" Key finding: The Calder bridge budget was 12,410 dollars. {fault.word}"
    (folder / "docs" / "victim.jsonl").write_text(json.dumps({"id": VICTIM, "text": text}) + "\n")
    place.ids.append(VICTIM)
    try:
        problem = _strike(place, fault.to_driver, until) if fault.to_driver else ""
        problem = problem or _problem(place, fault, _run(place, until))
    except subprocess.TimeoutExpired:
        problem = f"not done after {limit:.0f} s: {_last_line(place)}"
    return Tried(fault, place.count(), time.monotonic() - begun, problem)


def _run(place: Place, until: float) -> int:
    with processes.driver(place.arguments, place.log, place.engine_log) as driver:
        return driver.wait(max(0.0, until - time.monotonic()))


def _strike(place: Place, number: int, until: float) -> str:
    """Run the job until it is well under way, send the driver the signal, and end it. Returns what went wrong."""
    with processes.driver(place.arguments, place.log, place.engine_log) as driver:
        while place.documents_taken < 2 * PART or (number == signal.SIGKILL and not place.count().statuses):
            if driver.poll() is not None or time.monotonic() > until:
                return f"it ended, or its time was up, before it was struck: {_last_line(place)}"
            time.sleep(0.02)
        below = processes.descendants(driver.pid)
        taken = place.documents_taken
        processes.kill(driver.pid, number)
        if number == signal.SIGTERM:
            time.sleep(STOP_SECONDS)
            processes.kill(driver.pid)
        driver.wait()
    processes.left_over(below, 15.0, ending=processes.AGENTS)
    rows = sum(place.count().statuses.values())
    if number == signal.SIGTERM and rows < taken - IN_FLIGHT:
        return f"of {taken} documents that were taken only {rows} had rows {STOP_SECONDS:g} s after the signal"
    return ""


def _problem(place: Place, fault: Fault, code: int) -> str:
    """What is not as it should be at the end of a job."""
    count = place.count()
    if code not in (0, 2) or not count.exact:
        return f"exit code {code}, {count.lost} rows lost, {count.doubled} doubled: {_last_line(place)}"
    expected = Counter(["ok"] * (count.documents - 1) + [fault.status])
    if count.statuses != expected:
        return f"statuses {count.statuses}, expected {dict(expected)}"
    (victim,) = [row for row in read_results(place.output).to_pylist() if row["document_id"] == VICTIM]
    if victim["status"] != fault.status:
        return f"the victim's row is {victim['status']}, expected {fault.status}"
    if fault.mark and not (place.folder / "model" / fault.mark).exists():
        return "the fault did not happen"
    if fault.engine == "ShortOfMemory" and victim["attempts"] != 2:
        return f"the victim was tried {victim['attempts']} times, expected 2"
    if count.again > fault.again:
        return f"{count.again} documents were computed again, at most {fault.again} should be"
    return ""


def _last_line(place: Place) -> str:
    return (place.log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1][:300]


def markdown(tried: Sequence[Tried]) -> str:
    """The table, for people and README."""
    lines = [
        "| fault | documents | lost | doubled | computed again (at most) | rows | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in tried:
        rows = ", ".join(f"{number} {status}" for status, number in sorted(one.count.statuses.items()))
        again = f"{one.count.again} ({one.fault.again})"
        problem = f" **{one.problem}**" if one.problem else ""
        lines.append(
            f"| {one.fault.about}{problem} | {one.count.documents} | {one.count.lost} | {one.count.doubled} "
            f"| {again} | {rows} | {one.seconds:.0f} |"
        )
    return "\n".join(lines)
