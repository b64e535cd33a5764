"""Worker and driver killed in the middle of a job of several questions: each is answered once, as without the kills."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from patience import patient
from shell import ray_names

from pipeline import read_results
from tools.faults import processes
from tools.faults.driver import main
from tools.faults.runs import Place, prepare

DOCUMENTS = 16  # so many that the driver is stopped long before the last, on a busy machine, too
SCHEMA = {
    "type": "object", "properties": {"kind": {"enum": ["storm", "budget"]}, "urgent": {"type": "boolean"}},
    "required": ["kind", "urgent"],
}  # fmt: skip
QUESTIONS: list[dict[str, Any]] = [
    {"name": "story", "question": "Tell in order what happened."},
    {"name": "kind", "question": "What is it about?", "schema": SCHEMA},
    {"name": "who", "question": "Who wrote it?", "max_new_tokens": 20},
]
# Asked only when the job goes on: then some documents have three of four rows, others none.
LATE: dict[str, Any] = {"name": "when", "question": "When was it?", "max_new_tokens": 20}
ASKED = {(f"doc-{number:06}", each["name"]) for number in range(DOCUMENTS) for each in [*QUESTIONS, LATE]}


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ray_names():
        monkeypatch.delenv(name)


def job(folder: Path) -> Place:
    """A job that writes the rows of a document as soon as it has them."""
    questions = questions_file(folder)
    return prepare(
        folder, DOCUMENTS, 1, questions=questions, max_new_tokens=80, max_live=2, flush_documents=1, flush_seconds=0
    )


def questions_file(folder: Path) -> Path:
    """Of the job in a folder, beside it."""
    return folder.with_suffix(".json")


def keys(output: Path) -> list[tuple[str, str]]:
    """(document_id, question_id) of the rows that any Parquet reader sees."""
    found: list[tuple[str, str]] = []
    for part in sorted(output.glob("part-*.parquet")):
        columns = pq.read_table(part, columns=["document_id", "question_id"]).to_pydict()
        found += zip(columns["document_id"], columns["question_id"], strict=True)
    return found


def answers(output: Path) -> dict[tuple[str, str], tuple[Any, ...]]:
    names = ("status", "output", "answer", "question", "prompt_tokens", "output_tokens", "finish_reason")
    rows = read_results(output).to_pylist()
    return {(row["document_id"], row["question_id"]): tuple(row[name] for name in names) for row in rows}


def wait(until: Callable[[], Any], driver: Any, log: Path) -> None:
    end = time.monotonic() + patient(120)
    while not until():
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.01)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")  # where the undisturbed job runs
def test_each_question_is_answered_once_whoever_is_killed(tmp_path: Path) -> None:
    undisturbed = job(tmp_path / "undisturbed")
    questions_file(undisturbed.folder).write_text(json.dumps([*QUESTIONS, LATE]))
    assert main(undisturbed.arguments) == 0
    assert sorted(keys(undisturbed.output)) == sorted(ASKED)

    place = job(tmp_path / "run")
    questions_file(place.folder).write_text(json.dumps(QUESTIONS))
    with processes.driver(place.arguments, place.log, place.engine_log) as driver:
        wait(lambda: keys(place.output), driver, place.log)
        assert all(processes.kill(pid) for pid in processes.workers(driver.pid))
        taken, rows = place.taken, len(keys(place.output))
        wait(lambda: place.taken > taken and len(keys(place.output)) > rows, driver, place.log)
        os.kill(driver.pid, signal.SIGSTOP)  # it writes no more rows while its processes are listed
        below = processes.descendants(driver.pid)
        processes.kill(driver.pid)
        driver.wait()
    assert processes.left_over(below, 30.0, ending=processes.AGENTS) == [], "a killed driver leaves no worker behind"
    between = keys(place.output)
    assert len(set(between)) == len(between)
    assert 0 < len(between) < len(QUESTIONS) * DOCUMENTS, "it was killed in the middle"

    questions_file(place.folder).write_text(json.dumps([*QUESTIONS, LATE]))
    with processes.driver(place.arguments, place.log, place.engine_log) as driver:
        assert driver.wait(patient(120)) == 0, place.log.read_text()
    assert sorted(keys(place.output)) == sorted(ASKED), "every question to every document once"
    found = answers(place.output)
    assert found == answers(undisturbed.output)
    assert {row[0] for row in found.values()} == {"ok"}
    assert found["doc-000000", "kind"][2]["kind"] in ("storm", "budget")
