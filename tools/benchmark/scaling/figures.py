"""What the rows of a job say of its speed, and jobs with other numbers of workers side by side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.errors import JobError
from tools.benchmark._measure import table

COLUMNS = (
    "document_id", "status", "error", "attempts", "output", "prompt_tokens", "output_tokens", "density", "attention",
    "worker", "gpu", "precision", "started_at", "finished_at",
)  # fmt: skip
# Heading -> format, of the table.
FORMATS = {
    "workers": "", "documents": ",d", "start-up s": ".1f", "work s": ".1f", "documents/h": ",.0f",
    "prompt tokens/s": ",.0f", "efficiency": ".1%", "late starts apart": ".1%", "idle": ".1%", "idle at start": ".1%",
    "idle at end": ".1%", "density": ".3f", "same outputs": ".1%",
}  # fmt: skip

Row = Mapping[str, Any]


def check_rows(rows: Sequence[Row], expected: Mapping[str, int], workers: int) -> None:
    """Raise JobError unless each document has one row, is ok, was tried once and has the expected prompt tokens."""
    ids = [row["document_id"] for row in rows]
    if sorted(ids) != sorted(expected):
        doubled, lost = len(ids) - len(set(ids)), len(expected.keys() - set(ids))
        raise JobError(f"{workers} workers: of {len(expected)} documents {lost} have no row, {doubled} have two")
    for row in rows:
        name = row["document_id"]
        if row["status"] != "ok":
            raise JobError(f"{workers} workers: {name} ended with {row['status']}: {row['error']}")
        if row["attempts"] != 1:
            raise JobError(f"{workers} workers: {name} took {row['attempts']} attempts: a worker was lost")
        if row["prompt_tokens"] != expected[name]:
            raise JobError(f"{name} has {row['prompt_tokens']} prompt tokens instead of {expected[name]}")


def figures(rows: Sequence[Row], begun: datetime, stats: Mapping[str, Any], workers: int) -> dict[str, Any]:
    """Seconds, rates and shares of a job with `workers` workers.

    start_seconds: from `begun` to the first document's start. seconds: from there to the last row. late_seconds and
    ended_seconds: of all workers, from the job's first document to their own, and from their last row to the job's; one
    that had no document was late for all of it.
    idle: of all workers' seconds, the share in which their engines had no work; None where a worker did not tell.
    stats: of the job's report. outputs: a hash of each output, by id.
    """
    first, last = min(row["started_at"] for row in rows), max(row["finished_at"] for row in rows)
    seconds = (last - first).total_seconds()
    names = {row["worker"] for row in rows}
    late, ended = (workers - len(names)) * seconds, 0.0
    for worker in names:
        own = [row for row in rows if row["worker"] == worker]
        late += (min(row["started_at"] for row in own) - first).total_seconds()
        ended += (last - max(row["finished_at"] for row in own)).total_seconds()
    prompt, busy = sum(row["prompt_tokens"] for row in rows), stats.get("engine_seconds")
    told = busy is not None and stats.get("workers") == workers
    return {
        "workers": workers,
        "documents": len(rows),
        "start_seconds": (first - begun).total_seconds(),
        "seconds": seconds,
        "late_seconds": late,
        "ended_seconds": ended,
        "documents_per_hour": 3600 * len(rows) / seconds,
        "prompt_tokens": prompt,
        "prompt_tokens_per_second": prompt / seconds,
        "output_tokens": sum(row["output_tokens"] for row in rows),
        "idle": 1 - busy / (workers * seconds) if told and busy is not None else None,
        "density": sum(row["density"] for row in rows) / len(rows),
        "attention": sorted({row["attention"] for row in rows}),
        "gpu": sorted({row["gpu"] for row in rows}),
        "precision": sorted({row["precision"] for row in rows}),
        "outputs": {row["document_id"]: hashlib.sha256(row["output"].encode()).hexdigest()[:16] for row in rows},
    }


def join(contents: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Results of several files (name, content) as one, by number of workers; of the same number the last one's.

    Raises JobError where settings or GPUs differ.
    """
    (name, whole), *others = contents
    for other, content in others:
        ours, theirs = whole["settings"], content["settings"]
        differ = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
        if differ:
            what = ", ".join(f"{key} {ours.get(key)!r} and {theirs.get(key)!r}" for key in differ)
            raise JobError(f"{name} and {other} do not go into one table: {what}")
    runs = {run["workers"]: run for _, content in contents for run in content["runs"]}
    gpus = {str(run["gpu"]) for run in runs.values()}
    if len(gpus) > 1:
        raise JobError(f"measured on different devices: {' and '.join(sorted(gpus))}; compare the same ones only")
    return {"settings": dict(whole["settings"]), "runs": [runs[count] for count in sorted(runs)]}


def read(path: Path) -> tuple[str, dict[str, Any]]:
    """A file that this benchmark wrote, with its name. Raises JobError for any other."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.keys() >= {"settings", "runs"}:
            return str(path), content
    except (OSError, ValueError) as error:
        raise JobError(f"{path} cannot be read: {error}") from None
    raise JobError(f"{path} is not a file of tools.benchmark scaling")


def compared(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row of the table for each run; efficiency and outputs against the run with the fewest workers.

    efficiency: documents a second, by what as many workers would do at that run's rate. late starts apart: a worker
    counts from its own first document on. same outputs: share of the documents.
    """
    base = min(runs, key=lambda run: run["workers"])
    found = []
    for run in sorted(runs, key=lambda run: run["workers"]):
        n, whole = run["workers"], run["workers"] * run["seconds"]
        same = sum(base["outputs"].get(name) == output for name, output in run["outputs"].items())
        found.append(
            {
                "workers": str(n),
                "documents": run["documents"],
                "start-up s": run["start_seconds"],
                "work s": run["seconds"],
                "documents/h": run["documents_per_hour"],
                "prompt tokens/s": run["prompt_tokens_per_second"],
                "efficiency": run["documents_per_hour"] * base["workers"] / (n * base["documents_per_hour"]),
                "late starts apart": _rate(run) / _rate(base),
                "idle": run["idle"],
                "idle at start": run["late_seconds"] / whole,
                "idle at end": run["ended_seconds"] / whole,
                "density": run["density"],
                "same outputs": same / len(run["outputs"]),
            }
        )
    return found


def _rate(run: Mapping[str, Any]) -> float:
    """Documents for each second of a worker that has begun."""
    return float(run["documents"] / (run["workers"] * run["seconds"] - run["late_seconds"]))


def show(content: Mapping[str, Any]) -> str:
    """Settings and table for a person."""
    settings, runs = content["settings"], content["runs"]
    devices = ", ".join(runs[0]["gpu"])
    heading = (
        f"{settings['shape']}, {', '.join(runs[0]['precision'])}, {settings['documents']} documents of "
        f"{', '.join(format(length, ',') for length in settings['lengths'])} tokens, {settings['new_tokens']} new; "
        f"each worker {settings['gpus_per_worker']} x {devices}"
    )
    return f"{heading}\n{table(compared(runs), FORMATS)}"
